"""What `doctor` finds out: records, and the machine they are read from. Text and JSON are made of the same
records."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Fact:
    """One finding. A *problem* keeps the library from working here; a *note* may cost speed or a feature.
    `hint`: what to do."""

    name: str
    text: str
    level: Level = "ok"
    hint: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Host:
    """A machine as its files show it: `/` for this one, a folder of samples for a test."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def path(self, name: str) -> Path:
        """The path of an absolute name on that machine."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """A file's text without blanks around it; None where there is none (or it may not be read)."""
        try:
            return self.path(name).read_text(errors="replace").strip()
        except OSError:
            return None

    def number(self, name: str) -> int | None:
        """A file that holds a number."""
        try:
            return int(self.read(name) or "")
        except ValueError:
            return None

    def names(self, name: str) -> list[str]:
        """What is in a folder, sorted; nothing where there is none."""
        try:
            return sorted(os.listdir(self.path(name)), key=lambda entry: (len(entry), entry))
        except OSError:
            return []

    def fields(self, name: str) -> dict[str, str]:
        """A file of `Name: value` lines, as /proc has them."""
        lines = (line.partition(":") for line in (self.read(name) or "").splitlines())
        return {key.strip(): value.strip() for key, colon, value in lines if colon}

    def link(self, name: str) -> str | None:
        """Where a link leads, as it is written."""
        try:
            return os.readlink(self.path(name))
        except OSError:
            return None

    def limit(self, name: str) -> int | None:
        """A soft limit of this process from /proc/self/limits; None: unlimited (or unknown)."""
        for line in (self.read("/proc/self/limits") or "").splitlines():
            if line.startswith(name):
                soft = line[len(name) :].split()[0]
                return None if soft == "unlimited" else int(soft)
        return None

    def capable(self, bit: int) -> bool:
        """Whether this process has a capability."""
        return bool(int(self.fields("/proc/self/status").get("CapEff", "0"), 16) >> bit & 1)


def size(nbytes: int | None) -> str:
    """A number of bytes as people read it; None is "unlimited"."""
    if nbytes is None:
        return "unlimited"
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < 4:
        value, unit = value / 1024, unit + 1
    return f"{value:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
