"""Facts about systems that this library plugs into: which is installed, and whether our part of it can be
used. Tried in a child process, since importing them takes seconds and leaves threads behind."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

from aiotransfer.cli.doctor.facts import Fact

SECONDS = 60.0  # for an import on a busy machine
PROGRAM = "from aiotransfer.integrations import ray; ray.register(); print('registered')"


def ray() -> Fact:
    """Ray: its version, and whether the tensor transport registers with it."""
    versions = {name: installed(name) for name in ("ray", "torch")}
    if versions["ray"] is None:
        return Fact("ray", "not installed (needed by its tensor transport alone)", data={**versions, "registers": False})
    why = _refusal()
    shown = f"{versions['ray']}, torch {versions['torch'] or '-'}"
    data = {**versions, "registers": not why}
    if why:
        return Fact("ray", f"{shown}; the tensor transport does not register: {why}", "note", "docs/guide/ray.md", data)
    return Fact("ray", f"{shown}; the tensor transport registers (python -m aiotransfer.integrations.ray tries it)", data=data)


def installed(name: str) -> str | None:
    """The version of a distribution that is installed; None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _refusal() -> str:
    """Why the transport does not register; empty where it does."""
    try:
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"importing Ray took more than {SECONDS:g} s"
    if done.returncode == 0 and done.stdout.strip().endswith("registered"):
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("hint:")]
    return lines[-1] if lines else f"exit status {done.returncode}"
