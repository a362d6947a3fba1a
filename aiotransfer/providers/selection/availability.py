"""The known providers: which of them can be used on this machine, and why the others cannot."""

from __future__ import annotations

from collections.abc import Sequence

from aiotransfer.providers import native
from aiotransfer.providers.fabric import libfabric, libibverbs
from aiotransfer.quote import quote

KNOWN = ("shm", "loopback", "tcp", "efa", "verbs")


def availability() -> dict[str, str | None]:
    """For each known provider None, or why it cannot be used here."""
    if native.lib is None:
        return dict.fromkeys(KNOWN, f"no native extension: {native.failure}")
    result: dict[str, str | None] = {"verbs": libibverbs.missing()}
    result["tcp"] = libfabric.missing()
    result["efa"] = libfabric.missing() or libfabric.no_efa()
    result["shm"] = None if native.has_shm else "needs Linux"
    result["loopback"] = None if native.has_loopback else "the extension was built without the simulator"
    return {name: result[name] for name in KNOWN}


def check_names(providers: str | Sequence[str]) -> str | tuple[str, ...]:
    """`"auto"` or a tuple of known names. Raises `TypeError` or `ValueError` with the value."""
    if providers == "auto":
        return "auto"
    names = (providers,) if isinstance(providers, str) else tuple(providers)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"a provider is a str, not {quote(name)}")
        if name not in KNOWN:
            raise ValueError(f"{quote(name)} is no provider; there are {', '.join(KNOWN)}")
    if not names:
        raise ValueError("providers must name at least one")
    return names
