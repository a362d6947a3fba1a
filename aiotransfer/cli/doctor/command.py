"""`doctor`: what this machine offers, what is missing and what to do about it; ends with one write by each
provider, checked.

Exit status 0 when nothing keeps the library from working here, 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import dataclasses
import errno
import json
import mmap
import os
import platform
import stat
import subprocess
import sys
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer.cli.doctor import topology as tree
from aiotransfer.cli.doctor.devices import ALL as OF_DEVICES
from aiotransfer.cli.doctor.facts import Fact, Host
from aiotransfer.cli.doctor.host import ALL as OF_HOST
from aiotransfer.cli.doctor.systems import installed, ray
from aiotransfer.config import PREFIX, Config
from aiotransfer.control.key import LEAST_BYTES, key_place
from aiotransfer.errors import ConfigurationError
from aiotransfer.providers import native
from aiotransfer.providers.fabric import libfabric
from aiotransfer.providers.host.sysfs import read_topology
from aiotransfer.providers.selection.availability import availability

PACKAGES = ("numpy", "cffi", "msgspec", "anyio", "uvloop", "torch")
TEST_BYTES = 1 << 20
NOWHERE = 1  # an address that nothing is mapped at
MARKS = {"ok": "    ", "note": "note", "problem": "BAD "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--topology", action="store_true", help="only draw where NICs, GPUs and memory are")


def run(args: argparse.Namespace) -> int:
    """Look at the machine, try what it offers, print; the exit status."""
    if args.topology:
        print(topology(Host(), as_json=args.json, encoding=sys.stdout.encoding))
        return 0
    facts = examine(Host())
    print(json.dumps(record(facts)) if args.json else text(facts))
    return 0 if works(facts) else 1


def examine(host: Host) -> list[Fact]:
    """Everything that `doctor` prints: what was tried here, and what `host` shows."""
    here = [versions(), extension(), settings(host), key(host), memfd(), foreign_memory(), providers(), fabric_library(host)]
    return [*here, *(look(host) for look in (*OF_HOST, *OF_DEVICES)), ray(), self_test()]


def works(facts: list[Fact]) -> bool:
    """Whether nothing keeps the library from working."""
    return all(fact.level != "problem" for fact in facts)


def record(facts: list[Fact]) -> dict[str, Any]:
    """The facts as values for JSON, for programs."""
    return {"works": works(facts), "facts": {fact.name: dataclasses.asdict(fact) for fact in facts}}


def text(facts: list[Fact]) -> str:
    """The facts as text for a terminal."""
    lines = []
    for fact in facts:
        lines.append(f"{MARKS[fact.level]} {fact.name:<16} {fact.text}")
        if fact.hint:
            lines.append(f"{'':<21} -> {fact.hint}")
    bad = ", ".join(fact.name for fact in facts if fact.level == "problem")
    lines.append(f"aiotransfer does not work here: {bad}" if bad else "aiotransfer works here")
    return "\n".join(lines)


def topology(host: Host, *, as_json: bool, encoding: str | None) -> str:
    """Where NICs, GPUs and memory are: a tree, of letters that the terminal has."""
    found = read_topology(host.root)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else frozenset[int]()
    if as_json:
        return json.dumps(tree.record(found, allowed))
    pen = tree.LINES if (encoding or "").lower().replace("-", "") == "utf8" else tree.ASCII
    return tree.draw(found, allowed, pen)


# ---- what is tried on this machine ----


def versions() -> Fact:
    """This package, Python, the system, and the packages that matter."""
    packages = {name: installed(name) for name in PACKAGES}
    shown = ", ".join(f"{name} {version or '-'}" for name, version in packages.items())
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    python, cores = platform.python_version(), os.cpu_count()
    data = {"aiotransfer": at.__version__, "python": python, "system": system, "cores": cores, "packages": packages}
    text = f"aiotransfer {at.__version__}, Python {python}, {shown}; {system}, {cores} cores"
    return Fact("versions", text, data=data)


def extension() -> Fact:
    """Whether the native half is there."""
    if native.lib is not None:
        return Fact("extension", f"built, {native.ffi.string(native.lib.at_version()).decode()}")
    hint = f"install a C compiler and the headers of this Python, then `{native.REINSTALL}`"
    return Fact("extension", f"missing: {native.failure}", "problem", hint)


def settings(host: Host) -> Fact:
    """What an engine that is opened here is given where the program says nothing; as text only what the
    environment changes."""
    try:
        given = Config().with_environment(host.environ)
    except ConfigurationError as error:
        return Fact("settings", error.message, "problem", "no engine can be opened until that variable is corrected or unset")
    data = dataclasses.asdict(given)
    changed = [f"{name} {value!r}" for name, value in data.items() if value != getattr(Config(), name)]
    text = ", ".join(changed) + " (from the environment)" if changed else f"defaults; {PREFIX}... changes them"
    return Fact("settings", text, data=data)


def key(host: Host) -> Fact:
    """The key by which engines authenticate each other."""
    secret = host.environ.get("AIOTRANSFER_KEY")
    if secret:
        if len(secret.encode(errors="surrogateescape")) < LEAST_BYTES:
            return Fact("key", "AIOTRANSFER_KEY is too short", "problem", f"it needs at least {LEAST_BYTES} bytes")
        return Fact("key", "AIOTRANSFER_KEY: every process that has it may connect")
    try:
        directory, why = key_place(host.environ)
    except ConfigurationError as error:
        return Fact("key", error.message, "problem", error.hint or "")
    only = "only processes of this user on this host may connect"
    advice = "for several hosts, give all of them one AIOTRANSFER_KEY"
    try:
        info = directory.lstat()
    except FileNotFoundError:
        return Fact("key", f"a file in {directory} ({why}), made at the first use: {only}", hint=advice)
    except OSError as error:
        return Fact("key", f"{directory} cannot be read: {error}", "problem", "set AIOTRANSFER_KEY")
    if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
        hint = f"remove {directory}, or set AIOTRANSFER_KEY"
        return Fact("key", f"{directory} belongs to another user or is open to others", "problem", hint)
    return Fact("key", f"a file in {directory} ({why}): {only}", hint=advice)


def memfd() -> Fact:
    """Whether memory can be shared by a sealed memfd, as `allocate` does it."""
    try:
        fd = os.memfd_create("aiotransfer-doctor", os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            mmap.mmap(fd, mmap.PAGESIZE).close()
        finally:
            os.close(fd)
    except (OSError, AttributeError) as error:
        return Fact("memfd", f"refused: {error}", "problem", "needs Linux, and a seccomp profile that allows memfd_create")
    return Fact("memfd", "works")


def foreign_memory() -> Fact:
    """Whether the kernel lets this process at another one's memory: asked for an address where nothing is."""
    try:
        call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (OSError, AttributeError):
        return Fact("foreign memory", "this system has no process_vm_readv", "note", "use engine.allocate()")
    byte = ctypes.c_char()
    mine, theirs = (ctypes.c_size_t * 2)(ctypes.addressof(byte), 1), (ctypes.c_size_t * 2)(NOWHERE, 1)
    with subprocess.Popen(["sleep", "60"]) as child:
        call(child.pid, mine, 1, theirs, 1, 0)
        code = ctypes.get_errno()
        child.kill()
    if code == errno.EFAULT:  # the rights were looked at before the address
        return Fact("foreign memory", "of a child process: within reach", data={"errno": code})
    hint = "registered memory of other processes is out of reach: use engine.allocate(), or docker --cap-add=SYS_PTRACE"
    return Fact("foreign memory", f"of a child process: {os.strerror(code)}", "note", hint, {"errno": code})


def providers() -> Fact:
    """Which can be used here, and why the others cannot."""
    known = availability()
    text = ", ".join(f"{name} ({reason})" if reason else name for name, reason in known.items())
    return Fact("providers", text, data={name: reason or "ok" for name, reason in known.items()})


def fabric_library(host: Host) -> Fact:
    """Which libfabric is taken, and why."""
    found = libfabric.candidates(host.environ)
    data = {"candidates": [one._asdict() for one in found]}
    chosen = next((one for one in found if one.reason is None), None)
    if chosen is None:
        return Fact("libfabric", libfabric.missing(host.environ) or "none", data=data)  # which says what to do
    others = "; ".join(f"{one.path}: {one.reason}" for one in found if one.reason not in (None, "no such file"))
    return Fact("libfabric", f"{chosen.path} ({chosen.source}){f'; {others}' if others else ''}", data=data)


def self_test() -> Fact:
    """One write by each provider that can be used."""
    results = {name: asyncio.run(_try(name)) for name, reason in availability().items() if reason is None}
    failed = [name for name, result in results.items() if result != "ok"]
    text = ", ".join(f"{name} {result}" for name, result in results.items()) or "no provider can be used here"
    if not results or len(failed) == len(results):
        return Fact("self test", text, "problem", "see the lines above", results)
    hint = f"without {', '.join(failed)}: see the lines above" if failed else ""
    return Fact("self test", text, "note" if failed else "ok", hint, results)


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
