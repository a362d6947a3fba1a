"""Starting the providers that were asked for and that this machine has, with reasons for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from aiotransfer.errors import BusyError, ConfigurationError, ProviderUnavailableError, TransferError, shortage
from aiotransfer.model.descriptor import Grant
from aiotransfer.providers.fabric import nics
from aiotransfer.providers.fabric.provider import FabricProvider
from aiotransfer.providers.lane import Lane, Segment
from aiotransfer.providers.port import Provider, Ways
from aiotransfer.providers.selection.availability import KNOWN, availability


class Rights(NamedTuple):
    """What providers ask of the memory that is lent. `segment_of`: the shared memory of a registration;
    `lent`: the grant, the region's number and the offset that it begins at, of what a peer presents;
    `covers`: whether a grant is live."""

    segment_of: Callable[[int, int, int, int], Segment | None]
    lent: Callable[[int, int, int], tuple[Grant, int, int] | None]
    covers: Callable[[Grant], bool]


def open_providers(
    providers: str | tuple[str, ...], lane: Lane, incarnation: int, rights: Rights, platform: Any, ways: Ways, *, same_user: bool
) -> tuple[dict[str, Provider], list[tuple[str, str]]]:
    """Start what was asked for; the others with reasons. Raises `ProviderUnavailableError` when nothing is
    left, and `BusyError` rather than do without a provider that this machine has no descriptors or memory for
    just now. A rail that no provider has is a `ConfigurationError`.

    `ways`: by which NICs, and how others reach tcp's endpoints. `platform`: its `simulator` is the network of
    `loopback`, if not that of this process; its `limits` what fabrics do without. `same_user`: only processes
    of this user are let in.
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

                    opened[name] = ShmProvider(lane, incarnation, rights.segment_of, same_user=same_user)
                elif name in ("tcp", "efa", "verbs"):
                    opened[name] = FabricProvider(name, lane, incarnation, rights.lent, platform.restrictions, ways)
                else:
                    from aiotransfer.providers.loopback import LoopbackProvider

                    opened[name] = LoopbackProvider(
                        lane, incarnation, rights.covers, rights.segment_of, rights.lent, platform.simulator
                    )
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
        nics.check(ways.rails, [provider.chosen for provider in opened.values()])
    except ConfigurationError:
        for other in opened.values():
            other.close()
        raise
    return opened, attempts
