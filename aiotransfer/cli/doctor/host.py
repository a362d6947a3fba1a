"""Facts about the host and the rights of this process: limits, container, memory, clock, ports. Read from
files alone."""

from __future__ import annotations

from collections.abc import Callable

from aiotransfer.cli.doctor.facts import Fact, Host, Level, size

LEAST_FILES, FEWEST_FILES = 1024, 64  # a peer takes about ten; below the second not even one engine is at ease
SYS_PTRACE, IPC_LOCK = 19, 14
FIRST_PID_NAMESPACE = "pid:[4026531836]"  # the kernel's own number of the host's
GOOD_CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page")
FEWEST_PORTS = 1000
SMALL_SHM = 1 << 30


def container(host: Host) -> Fact:
    """Whether this is a container, and which rights it has."""
    status = host.fields("/proc/self/status")
    marks = {
        "docker": host.path("/.dockerenv").exists(),
        "podman": host.path("/run/.containerenv").exists(),
        "kubernetes": "KUBERNETES_SERVICE_HOST" in host.environ,
        "own process namespace": host.link("/proc/self/ns/pid") not in (None, FIRST_PID_NAMESPACE),
    }
    kinds = [name for name, found in marks.items() if found]
    seccomp = status.get("Seccomp", "0") != "0"
    ptrace, lock = host.capable(SYS_PTRACE), host.capable(IPC_LOCK)
    namespaces = {kind: host.link(f"/proc/self/ns/{kind}") for kind in ("ipc", "net", "pid", "user")}
    rights = f"seccomp filter {'on' if seccomp else 'off'}, SYS_PTRACE {_yes(ptrace)}, IPC_LOCK {_yes(lock)}"
    data = {"kinds": kinds, "seccomp": seccomp, "sys_ptrace": ptrace, "ipc_lock": lock, "namespaces": namespaces}
    if not kinds:
        return Fact("container", f"none; {rights}", data=data)
    hint = (
        "containers of one host reach each other by shm only when they share a network namespace (--network=container:NAME); "
        "registered (not allocated) memory also needs a common process namespace (--pid=...), and perhaps --cap-add=SYS_PTRACE"
    )
    return Fact("container", f"{', '.join(kinds)}; {rights}", "ok" if ptrace and not seccomp else "note", hint, data)


def yama(host: Host) -> Fact:
    """Whether yama lets a process write registered memory of other processes of this user."""
    scope = host.number("/proc/sys/kernel/yama/ptrace_scope")
    data = {"ptrace_scope": scope}
    if not scope:
        return Fact("yama", "no restriction" if scope is None else "ptrace_scope 0", data=data)
    if scope < 3 and host.capable(SYS_PTRACE):
        return Fact("yama", f"ptrace_scope {scope}, but this process has SYS_PTRACE", data=data)
    hint = (
        "memory of other processes that was registered instead of allocated may be out of reach: use engine.allocate(), "
        "or sysctl kernel.yama.ptrace_scope=0"
    )
    return Fact("yama", f"ptrace_scope {scope}", "note", hint, data)


def descriptors(host: Host) -> Fact:
    """How many files may be open."""
    soft = host.limit("Max open files")
    text = f"{soft if soft is not None else 'unlimited'} may be open"
    if soft is None or soft >= LEAST_FILES:
        return Fact("descriptors", text, data={"soft": soft})
    level: Level = "problem" if soft < FEWEST_FILES else "note"
    return Fact("descriptors", text, level, "each peer takes about ten: ulimit -n 65536", {"soft": soft})


def memlock(host: Host) -> Fact:
    """How much memory may be pinned: what RDMA and GPUs need, and nothing else does."""
    soft, exempt = host.limit("Max locked memory"), host.capable(IPC_LOCK)
    data = {"soft": soft, "exempt": exempt}
    text = f"{size(soft)}{' (IPC_LOCK: no limit for this process)' if exempt else ''}"
    if soft is None or exempt or not host.names("/sys/class/infiniband"):
        return Fact("memlock", text, data=data)
    hint = "an RDMA device pins what it is given: ulimit -l unlimited, LimitMEMLOCK=infinity, docker --ulimit memlock=-1"
    return Fact("memlock", text, "note", hint, data)


def memory(host: Host) -> Fact:
    """What memory there is, and what the control group leaves of it."""
    meminfo = host.fields("/proc/meminfo")
    total = _kib(meminfo.get("MemTotal")) or 0
    limit = host.number("/sys/fs/cgroup/memory.max") or host.number("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    if limit is not None and limit >= total:
        limit = None
    text = size(total) + (f", limited to {size(limit)} by the control group" if limit is not None else "")
    hint = "allocated memory counts against this limit in the process that touches it first" if limit is not None else ""
    return Fact("memory", text, hint=hint, data={"total": total, "limit": limit})


def shared_memory(host: Host) -> Fact:
    """/dev/shm. Ours is memfd, which needs no mount; torch and others beside us do."""
    for line in (host.read("/proc/mounts") or "").splitlines():
        _, where, kind, options, *_ = [*line.split(), "", "", "", ""]
        if where == "/dev/shm":
            named = next((o.removeprefix("size=") for o in options.split(",") if o.startswith("size=")), "")
            nbytes = int(named[:-1]) * 1024 if named.endswith("k") and named[:-1].isdigit() else None
            text = f"/dev/shm is a {kind}{f' of {size(nbytes)}' if nbytes else ''} (aiotransfer uses memfd instead)"
            if nbytes is not None and nbytes < SMALL_SHM:
                hint = "small for torch and NCCL: docker --shm-size=8g, or --ipc=host"
                return Fact("shared memory", text, "note", hint, {"size": nbytes})
            return Fact("shared memory", text, data={"size": nbytes})
    return Fact("shared memory", "no /dev/shm (aiotransfer uses memfd instead)", data={"size": None})


def huge_pages(host: Host) -> Fact:
    """Huge pages, for information: the library does not need them."""
    meminfo = host.fields("/proc/meminfo")
    total, each = meminfo.get("HugePages_Total", "0"), meminfo.get("Hugepagesize", "?")
    modes = {name: _chosen(host.read(f"/sys/kernel/mm/transparent_hugepage/{name}")) for name in ("enabled", "shmem_enabled")}
    shown = f"transparent: {modes['enabled'] or '-'}, for shared memory: {modes['shmem_enabled'] or '-'}"
    return Fact("huge pages", f"{total} of {each} reserved; {shown}", data={"reserved": int(total), **modes})


def numa(host: Host) -> Fact:
    """Memory nodes, and which cores lie at which."""
    folder = "/sys/devices/system/node"
    nodes = {name: host.read(f"{folder}/{name}/cpulist") or "" for name in host.names(folder) if _node(name)}
    text = "; ".join(f"{name}: cores {cores or 'none'}" for name, cores in nodes.items()) or "one node"
    hint = "run each process on the node of its NIC (--topology): numactl --cpunodebind=N --membind=N" if len(nodes) > 1 else ""
    return Fact("numa", text, hint=hint, data={"nodes": nodes})


def clock(host: Host) -> Fact:
    """What reading the clock costs: a slow source makes it a system call."""
    source = host.read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    data = {"source": source}
    if source is None or source in GOOD_CLOCKS:
        return Fact("clock", source or "unknown", data=data)
    hint = "each look at this clock costs a system call; boot with clocksource=tsc if that is stable"
    return Fact("clock", source, "note", hint, data)


def ports(host: Host) -> Fact:
    """Ports that engines and connections get when none is named."""
    low, high = [int(p) for p in (host.read("/proc/sys/net/ipv4/ip_local_port_range") or "32768 60999").split()]
    used = set()
    for name in ("tcp", "tcp6"):
        for line in (host.read(f"/proc/net/{name}") or "").splitlines()[1:]:
            port = int(line.split()[1].rpartition(":")[2], 16)
            if low <= port <= high:
                used.add(port)
    free = max(high - low + 1 - len(used), 0)
    data = {"low": low, "high": high, "free": free}
    text = f"{free} of {low} to {high} are free"
    if free >= FEWEST_PORTS:
        return Fact("ports", text, data=data)
    return Fact("ports", text, "note" if free else "problem", "sysctl net.ipv4.ip_local_port_range='20000 60999'", data)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _kib(text: str | None) -> int | None:
    return int(text.split()[0]) * 1024 if text else None


def _chosen(text: str | None) -> str | None:
    """The chosen word of a list as sysfs writes it: that of `always [madvise] never` is `madvise`."""
    return text.partition("[")[2].partition("]")[0] if text else None


def _node(name: str) -> bool:
    return name.startswith("node") and name[4:].isdigit()


ALL: tuple[Callable[[Host], Fact], ...] = (
    container, yama, descriptors, memlock, memory, shared_memory, huge_pages, numa, clock, ports,
)  # fmt: skip
