"""Several hosts on one machine: network namespaces, each with one cable to a common switch. Nothing leaves the machine.

    with Hosts(4) as hosts:
        hosts[1].popen([sys.executable, "-m", ...])     a process of that host
        with hosts[0].inside():                         this thread lives there meanwhile, and so do the sockets it makes
            ...
        hosts[1].cut()                                  and so on

A host's processes see a boot identity of their own, so that shared memory is refused for the reason for which it would be between
real machines. This process keeps that of the machine. Names are unique for each run, and everything goes at the end.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

KEY = "a secret that all hosts have"
CLONE_NEWNET = 0x40000000
NOWHERE = "02:00:00:00:00:99"  # nobody's hardware address
_AS_HOST = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'


class Weather(NamedTuple):
    """What frames meet at the switch: seconds of delay and of jitter (which reorders), shares lost and doubled, and how many
    bytes go out of each port in a second (0: as many as can be)."""

    delay: float = 0.0
    jitter: float = 0.0
    lost: float = 0.0
    doubled: float = 0.0
    rate: float = 0.0


def ip(*arguments: str) -> str:
    """Run `ip`. Raises `OSError` with what it says."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def missing() -> str | None:
    """Why no hosts can be made here; None: they can."""
    if os.geteuid() != 0:
        return "network namespaces are made by root"
    if shutil.which("ip") is None:
        return "there is no `ip` (apt-get install iproute2)"
    try:
        Hosts.sweep()
        with Hosts(1) as hosts:
            hosts[0].popen(["true"]).wait()
    except OSError as error:
        return str(error)
    return None


def setns(fd: int) -> None:
    """The calling thread moves to a network namespace, and threads that it starts begin there."""
    if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread lives in a network namespace meanwhile."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(there)
        yield
    finally:
        setns(before)
        os.close(there)
        os.close(before)


class Place(Protocol):
    """Where an engine may live."""

    @property
    def listen(self) -> str:
        """For `open_engine`: an address of it, any port."""
        ...

    def inside(self) -> Any:
        """A context: the calling thread lives there."""
        ...


class Host:
    """One of them."""

    def __init__(self, net: Hosts, index: int) -> None:
        self._net = net
        self.namespace = f"{net.token}-{index}"
        self.port = f"port{index}"  # of the switch
        self.address = f"10.99.0.{index + 1}"
        self._boot = net.folder / f"boot{index}"
        self._boot.write_text(f"{uuid.uuid4()}\n")
        self._processes: list[subprocess.Popen[bytes]] = []
        ip("netns", "add", self.namespace)
        net.made.append(self.namespace)
        ip("-n", self.namespace, "link", "set", "lo", "up")
        ip("-n", net.switch, "link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        self.set_mtu(1500)
        ip("-n", self.namespace, "link", "set", "eth0", "up")
        ip("-n", net.switch, "link", "set", self.port, "up")

    @property
    def listen(self) -> str:
        """For `open_engine`: its own address, any port."""
        return f"{self.address}:0"

    def inside(self) -> Any:
        """A context: the calling thread lives on this host."""
        return inside(self.namespace)

    def popen(self, command: Sequence[str], *, contained: bool = False, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process of this host. It has the common key, and is killed at the end. `contained`: the host is no machine
        but a container on this one."""
        environ = {**os.environ, "AIOTRANSFER_KEY": KEY}
        identity = [] if contained else ["sh", "-c", _AS_HOST, str(self._boot)]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *identity, *command], env=environ, **options
        )
        self._processes.append(process)
        return process

    # ---- what may happen to it ----

    def cut(self) -> None:
        """Somebody pulls its cable out."""
        ip("-n", self._net.switch, "link", "set", self.port, "down")

    def mend(self) -> None:
        """And puts it in again."""
        ip("-n", self._net.switch, "link", "set", self.port, "up")

    def cut_towards(self, other: Host) -> None:
        """What it sends to `other` gets lost, without a word; what `other` sends still comes."""
        ip("-n", self.namespace, "neigh", "replace", other.address, "lladdr", NOWHERE, "dev", "eth0", "nud", "permanent")

    def mend_towards(self, other: Host) -> None:
        """It gets there again."""
        ip("-n", self.namespace, "neigh", "del", other.address, "dev", "eth0")

    def move(self, address: str) -> None:
        """It loses its address and gets another one."""
        ip("-n", self.namespace, "address", "del", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace, "address", "add", f"{address}/24", "dev", "eth0")
        self.address = address

    def set_mtu(self, nbytes: int) -> None:
        """The largest packet of its cable."""
        ip("-n", self.namespace, "link", "set", "eth0", "mtu", str(nbytes))
        ip("-n", self._net.switch, "link", "set", self.port, "mtu", str(nbytes))

    def stop(self) -> None:
        """All its processes stop where they are."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """And go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """All its processes die."""
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


class Hosts:
    """So many hosts at one switch; with `weather`, the switch is a process that treats frames badly."""

    def __init__(self, n: int, *, weather: Weather | None = None) -> None:
        self._n, self._weather = n, weather
        self.token = f"at{os.getpid():x}-{secrets.token_hex(3)}"
        self.switch = f"{self.token}-switch"
        self.made: list[str] = []
        self._hosts: list[Host] = []
        self._relay: subprocess.Popen[bytes] | None = None

    @staticmethod
    def sweep() -> None:
        """What runs left behind that were killed: their names say which process had made them."""
        for name in os.listdir("/run/netns") if os.path.isdir("/run/netns") else ():
            made_by = re.fullmatch(r"at([0-9a-f]+)-[0-9a-f]{6}-(\d+|switch)", name)
            if made_by and not os.path.exists(f"/proc/{int(made_by[1], 16)}"):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)  # somebody else may be at it

    def __enter__(self) -> Hosts:
        self.folder = Path(tempfile.mkdtemp(prefix=self.token))
        try:
            ip("netns", "add", self.switch)
            self.made.append(self.switch)
            for index in range(self._n):
                self._hosts.append(Host(self, index))
            if self._weather is None:
                self._bridge()
            else:
                self._start_relay(self._weather)
        except BaseException:
            self.close()
            raise
        return self

    def _bridge(self) -> None:
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        for host in self._hosts:
            ip("-n", self.switch, "link", "set", host.port, "master", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")

    def _start_relay(self, weather: Weather) -> None:
        """In user space, so that it is the same everywhere: not every kernel has netem."""
        from tests.hosts.weather import frames_as_sent

        for host in self._hosts:
            with host.inside():
                frames_as_sent("eth0")
        ports = [host.port for host in self._hosts]
        with inside(self.switch):
            self._relay = subprocess.Popen(
                [sys.executable, "-m", "tests.hosts.weather", json.dumps(weather), *ports], stdout=subprocess.PIPE
            )
        assert self._relay.stdout is not None
        self._relay.stdout.readline()

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def close(self) -> None:
        """Nothing of it is left."""
        for host in self._hosts:
            host.kill()
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
            if self._relay.stdout is not None:
                self._relay.stdout.close()
        for namespace in self.made:
            ip("netns", "del", namespace)
        self.made.clear()
        shutil.rmtree(self.folder)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
