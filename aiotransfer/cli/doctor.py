"""`doctor`: what this machine offers, what is missing and what to do about it; ends with one write that is checked.

Exit status 0 when at least one provider carried that write, 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import resource
import stat
from pathlib import Path
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer.control.key import key_directory
from aiotransfer.providers import native
from aiotransfer.providers.select import availability

PACKAGES = ("numpy", "cffi", "msgspec", "anyio", "uvloop", "torch")
TEST_BYTES = 1 << 20
LEAST_FILES = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Look, try, print."""
    report = examine()
    print(json.dumps(report) if args.json else text(report))
    return 0 if report["works"] else 1


def examine() -> dict[str, Any]:
    """Everything that `doctor` prints, as one record."""
    hints: list[str] = []
    report: dict[str, Any] = {
        "aiotransfer": at.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "extension": _extension(hints),
        "providers": {name: reason or "ok" for name, reason in availability().items()},
        "limits": _limits(hints),
        "foreign_memory": _foreign_memory(hints),
        "key_file": _key_file(hints),
    }
    report["self_test"] = {
        name: asyncio.run(_try(name)) for name, reason in availability().items() if reason is None
    } or {"none": "no provider can be used here"}
    report["works"] = "ok" in report["self_test"].values()
    report["hints"] = hints
    return report


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension(hints: list[str]) -> str:
    if native.lib is not None:
        return f"built, {native.ffi.string(native.lib.at_version()).decode()}"
    hints.append("install a C compiler and the headers of this Python, then install aiotransfer again")
    return f"missing: {native.failure}"


def _limits(hints: list[str]) -> dict[str, Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < LEAST_FILES:
        hints.append(f"only {soft} descriptors are allowed: each peer takes about ten (ulimit -n, at most {hard} here)")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {"descriptors": soft, "locked_memory": "unlimited" if locked == resource.RLIM_INFINITY else locked}


def _foreign_memory(hints: list[str]) -> str:
    """Whether registered (not allocated) memory of another process of this user can be written."""
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        return "allowed (no yama)"
    if scope == 0 or (os.geteuid() == 0 and scope < 3):
        return f"allowed (ptrace_scope {scope})"
    hints.append(
        f"kernel.yama.ptrace_scope is {scope}: memory of other processes that was registered instead of allocated may be out of "
        "reach; use engine.allocate(), or set it to 0"
    )
    return f"restricted (ptrace_scope {scope})"


def _key_file(hints: list[str]) -> str:
    directory = key_directory(os.environ)
    try:
        info = directory.lstat()
    except FileNotFoundError:
        return f"{directory} (made at the first use)"
    except OSError as error:
        hints.append(f"the key directory cannot be read: {error}")
        return f"{directory}: {error}"
    if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
        hints.append(f"{directory} belongs to or is open to somebody else: remove it, or set AIOTRANSFER_KEY")
        return f"{directory}: not trusted"
    return str(directory)


async def _try(provider: str) -> str:
    """One write of a MiB between two engines of this process."""
    try:
        async with at.open_engine(providers=provider, timeout=5) as left, at.open_engine(providers=provider, timeout=5) as right:
            peer = await left.connect(right.address)
            source, target = left.allocate(TEST_BYTES), right.allocate(TEST_BYTES)
            source.numpy()[:] = np.arange(TEST_BYTES) % 251
            right.publish("test", target)
            await left.write(source, await peer.lookup("test"), imm=1)
            await right.counter(imm=1).wait(1, timeout=5)
            return "ok" if np.array_equal(source.numpy(), target.numpy()) else "the bytes differ"
    except (at.TransferError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def text(report: dict[str, Any]) -> str:
    """For a terminal."""
    lines = []
    for name, value in report.items():
        if name in ("works", "hints"):
            continue
        shown = ", ".join(f"{k} {v if v is not None else '-'}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"{name.replace('_', ' '):<16} {shown}")
    lines += [f"hint             {hint}" for hint in report["hints"]]
    lines.append("aiotransfer works here" if report["works"] else "aiotransfer does not work here")
    return "\n".join(lines)
