"""The one door to the compiled extension.

`import aiotransfer` must work where the extension could not be built, so the import is tried once here and
the reason of a failure is kept for `open_engine` and `doctor` to tell. Nothing outside this folder imports
the extension.
"""

from __future__ import annotations

import sys
from typing import Any

from aiotransfer.errors import ProviderUnavailableError

ffi: Any = None
lib: Any = None
failure: str | None = None

try:
    import aiotransfer._native as _native

    ffi, lib = _native.ffi, _native.lib
except ImportError as error:
    import json
    from pathlib import Path

    failure = str(error)
    facts = Path(__file__).parent.parent / "_build_facts.json"
    try:
        failure = json.loads(facts.read_text()).get("reason") or failure
    except (OSError, ValueError):
        pass

# What an installation without a compiler or without a library's headers left in pip's cache would be
# installed again.
REINSTALL = "pip install --no-cache-dir --force-reinstall aiotransfer"

has_shm: bool = lib is not None and hasattr(lib, "at_shm_begin")
has_fabric: bool = lib is not None and hasattr(lib, "at_ofi_built") and lib.at_ofi_built() != 0
has_verbs: bool = lib is not None and hasattr(lib, "at_verbs_built") and lib.at_verbs_built() != 0
has_loopback: bool = lib is not None and hasattr(lib, "at_sim_connect")


def require() -> None:
    """Raise `ProviderUnavailableError` with the reason when there is no extension."""
    if lib is None:
        raise ProviderUnavailableError(
            f"the native extension of aiotransfer is not available: {failure}",
            attempts=[("native", failure or "unknown")],
            hint=f"install a C compiler and the Python headers, then `{REINSTALL}` without AIOTRANSFER_SKIP_NATIVE "
            f"(Python {sys.version_info.major}.{sys.version_info.minor} on {sys.platform})",
        )


def text(status: int) -> str:
    """The lane's words for a status."""
    return str(ffi.string(lib.at_strerror(status)).decode())
