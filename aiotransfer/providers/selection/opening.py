"""Starting the providers that were asked for and that this machine has, with reasons for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aiotransfer.errors import BusyError, ConfigurationError, ProviderUnavailableError, TransferError, shortage
from aiotransfer.model.descriptor import Grant
from aiotransfer.providers.fabric import nics
from aiotransfer.providers.fabric.provider import FabricProvider
from aiotransfer.providers.lane import Lane, Segment
from aiotransfer.providers.port import Outside, Pairing, Provider
from aiotransfer.providers.selection.availability import KNOWN, availability


def open_providers(
    providers: str | tuple[str, ...], lane: Lane, incarnation: int, segment_of: Callable[[int, int, int, int], Segment | None],
    lent: Callable[[int, int, int], tuple[Grant, int, int] | None], covers: Callable[[Grant], bool], platform: Any,
    rails: Sequence[str], pairing: Pairing, outside: Outside, same_user: bool,
) -> tuple[dict[str, Provider], list[tuple[str, str]]]:
    """Start what was asked for; the others with reasons. Raises `ProviderUnavailableError` when nothing is left, and `BusyError`
    rather than do without a provider that this machine has no descriptors or memory for just now. A rail
    that no provider has is a `ConfigurationError`.

    `outside`: how others reach tcp's endpoints. `platform`: its `simulator` is the network of `loopback`, if not that of this
    process; its `limits` what fabrics do without.
    `same_user`: only processes of this user are let in.
    """
    wanted = KNOWN if providers == "auto" else providers
    try:
        known = availability()
    except OSError as error:  # looking for files takes descriptors too
        raise shortage(error.errno, "no engine can be opened") or error from None
    opened: dict[str, Provider] = {}
    attempts: list[tuple[str, str]] = []
    for name in wanted:
        reason = known[name]
        if reason is None:
            try:
                if name == "shm":
                    from aiotransfer.providers.shm.provider import ShmProvider  # in here: reading it takes a descriptor too

                    opened[name] = ShmProvider(lane, incarnation, segment_of, same_user=same_user)
                elif name in ("tcp", "efa", "verbs"):
                    opened[name] = FabricProvider(name, lane, incarnation, lent, platform.restrictions, rails, pairing, outside)
                else:
                    from aiotransfer.providers.loopback import LoopbackProvider

                    opened[name] = LoopbackProvider(lane, incarnation, covers, segment_of, lent, platform.simulator)
                continue
            except (OSError, TransferError) as error:
                reason = str(error)
                short = error if isinstance(error, BusyError) else shortage(getattr(error, "errno", None), f"no {name}")
                if short is not None:
                    for other in opened.values():
                        other.close()
                    raise short from None
        attempts.append((name, reason))
    if not opened:
        raise ProviderUnavailableError(
            "none of the providers asked for can be used here",
            attempts=attempts,
            hint="; ".join(f"{name}: {why}" for name, why in attempts),
        )
    try:
        nics.check(rails, [provider.chosen for provider in opened.values()])
    except ConfigurationError:
        for other in opened.values():
            other.close()
        raise
    return opened, attempts
