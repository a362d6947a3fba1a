"""Where libibverbs is, and a rail on one of its devices.

The library is the system's own: it belongs to the kernel and to the drivers beside it (ibverbs-providers), so
no wheel carries one. `AIOTRANSFER_VERBS_DEVICE` names the device to use; otherwise the one that carries the
local address of the control connection is taken, or else the first with an active port.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiotransfer.providers import native
from aiotransfer.providers.fabric.libfabric import SYSTEM_FOLDERS
from aiotransfer.quote import quote

FILE = "libibverbs.so.1"
DEVICE = "AIOTRANSFER_VERBS_DEVICE"


def choose(environ: Mapping[str, str] = os.environ) -> str | None:
    """The file that is loaded, or None."""
    folders = (*filter(None, environ.get("LD_LIBRARY_PATH", "").split(":")), *SYSTEM_FOLDERS)
    return next((str(path) for path in (Path(folder, FILE) for folder in folders) if path.is_file()), None)


def devices(root: Path = Path("/")) -> list[str]:
    """Devices that are reached by verbs: all RDMA devices but those of EFA, which has no reliable
    connections."""
    where = root / "sys" / "class" / "infiniband"
    if not where.is_dir():
        return []
    drivers = {device.name: device / "device" / "driver" for device in where.iterdir()}
    return sorted(name for name, link in drivers.items() if not (link.is_symlink() and link.readlink().name == "efa"))


def named_device() -> str | None:
    """The one device that the environment names."""
    return os.environ.get(DEVICE)


def missing(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> str | None:
    """Why verbs cannot be used here; None: it can."""
    if not native.has_verbs:
        return f"the extension was built without libibverbs's headers (apt-get install libibverbs-dev, then `{native.REINSTALL}`)"
    found = devices(root)
    if not found:
        return "this machine has no RDMA device"
    if choose(environ) is None:
        return "libibverbs is not installed (apt-get install libibverbs1 ibverbs-providers)"
    if (named := environ.get(DEVICE)) and named not in found:
        return f"{DEVICE}={quote(named)} is none of {', '.join(found)}"
    return None


def load(environ: Mapping[str, str] = os.environ) -> None:
    """Load it, once per process. Raises `OSError` with the reason."""
    chosen = choose(environ)
    if chosen is None:
        raise OSError(missing(environ) or "libibverbs is not installed")
    if native.lib.at_verbs_load(chosen.encode()) != 0:
        raise OSError(f"{chosen} cannot be loaded: {native.ffi.string(native.lib.at_fab_why()).decode()}")


def open_rail(lane: Any, host: str, limits: Any, out: Any, facts: Any) -> int:
    """A status of the lane; `out` and `facts` are filled in by `at_verbs_open`."""
    ffi, named = native.ffi, limits.verbs_device or os.environ.get(DEVICE)
    device = ffi.new("char[]", named.encode()) if named else ffi.NULL
    node = ffi.new("char[]", host.encode())
    return int(native.lib.at_verbs_open(lane, device, node, limits.most_bytes, limits.most_posted, out, facts))
