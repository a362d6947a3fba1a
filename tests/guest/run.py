"""Runs one command in a guest that has soft-RoCE, on this machine's own Python and checkout.

    python -m tests.guest.run [--seconds 480] [--rails 2] -- .venv/bin/python -m pytest tests/guest

The guest sees this machine's files read-only, and what it writes is gone afterwards. Its output comes out here. The exit code is
the command's; 124: it took too long; 125: there was no guest, and why is said.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.guest import kernel

PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV")
BOOT_SECONDS = 120.0
RDTSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"  # rdtsc; shl rdx, 32; or rax, rdx; ret


def tsc_khz() -> int:
    """How fast this machine's time stamps count. The guest would ask an emulated timer, which errs when the machine is busy."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(RDTSC)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))

    def sample() -> tuple[float, int]:
        looks = [(time.monotonic_ns(), read(), time.monotonic_ns()) for _ in range(50)]
        before, ticks, after = min(looks, key=lambda look: look[2] - look[0])  # the one least disturbed
        return (before + after) / 2, ticks

    start, first = sample()
    time.sleep(0.1)
    end, last = sample()
    return round((last - first) / (end - start) * 1e6)


def machine(cache: Path, exchange: Path, out: int) -> list[str]:
    """QEMU's command line. Emulated: what virtualisation there is here does not start this kernel."""
    words = f"console=ttyS0 quiet panic=-1 tsc=reliable tsc_early_khz={tsc_khz()} "
    words += "nokaslr mitigations=off random.trust_cpu=on net.ifnames=0"
    return [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max", "-m", "2G", "-smp", "2",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-kernel", str(cache / "vmlinux"), "-initrd", str(cache / "initramfs.cpio"), "-append", words,
        "-chardev", f"file,id=console,path={exchange}/console.txt", "-serial", "chardev:console",
        "-device", "virtio-serial", "-chardev", f"file,id=out,path=/proc/self/fd/{out},append=on",
        "-device", "virtserialport,chardev=out,name=out",
        "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
        "-fsdev", f"local,id=exchange,path={exchange},security_model=none,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=exchange,mount_tag=exchange",
    ]  # fmt: skip


def echo(pipe: int) -> None:
    """What the guest says."""
    while data := os.read(pipe, 65536):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def wait(process: subprocess.Popen[bytes], exchange: Path, seconds: float) -> str | None:
    """Until it has powered off. Why it was stopped, or None."""
    start, ready = time.monotonic(), None
    while process.poll() is None:
        now = time.monotonic() - start
        if ready is None and (exchange / "ready").exists():
            ready = now
        if ready is None and now > BOOT_SECONDS:
            return f"it was not up after {BOOT_SECONDS:g} s"
        if ready is not None and now > ready + seconds + 30:
            return "it did not stop"
        time.sleep(0.05)
    return None


def run(command: list[str], seconds: float, rails: int) -> int:
    """Boot, run, power off: the exit code."""
    cache = kernel.build()
    exchange = Path(tempfile.mkdtemp(prefix="guest-"))
    try:
        shutil.copy(kernel.HERE / "second.sh", exchange)
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "TESTS_REQUIRE": "verbs"}
        lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
        (exchange / "command.sh").write_text("\n".join([*lines, f"exec {shlex.join(command)}"]) + "\n")
        (exchange / "settings.sh").write_text(f"FOLDER={shlex.quote(os.getcwd())}\nSECONDS_ALLOWED={seconds:g}\nRAILS={rails}\n")
        reader, writer = os.pipe()  # a character device on our own output would close with our input
        process = subprocess.Popen(machine(cache, exchange, writer), stdin=subprocess.DEVNULL, pass_fds=(writer,))
        os.close(writer)
        pump = threading.Thread(target=echo, args=(reader,), daemon=True)
        pump.start()
        try:
            trouble = wait(process, exchange, seconds)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            pump.join(5)
        result = exchange / "code"
        if trouble is None and result.exists():
            return int(result.read_text())
        console = exchange / "console.txt"
        print(f"guest: {trouble or 'it ended without a result'}; its console:", file=sys.stderr)
        print("\n".join(console.read_text(errors="replace").splitlines()[-60:]) if console.exists() else "", file=sys.stderr)
        return 125
    finally:
        shutil.rmtree(exchange, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--rails", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    sys.exit(run(given.command[1:] if given.command[:1] == ["--"] else given.command, given.seconds, given.rails))
