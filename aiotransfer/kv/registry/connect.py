"""Makes the entry of a rank, and a peer of an entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from aiotransfer.errors import PeerLostError
from aiotransfer.kv.decode.decoder import Decoder
from aiotransfer.kv.prefill.prefiller import Prefiller
from aiotransfer.kv.registry.member import Member

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer


def member_of(
    rank: Decoder | Prefiller, *, name: str | None = None, address: str | None = None, labels: Mapping[str, str] | None = None
) -> Member:
    """The entry of `rank`, which is open here. `name`: the engine's, unless given; `address`: one that others
    can dial, where the engine's is not; `labels`: words of the caller's own that travel with the entry (None:
    none).

    Raises `TypeError` or `ValueError`.
    """
    if not isinstance(rank, Decoder | Prefiller):
        raise TypeError(f"rank must be a Decoder or a Prefiller, not {type(rank).__name__}")
    engine = rank.engine
    return Member(
        role="decode" if isinstance(rank, Decoder) else "prefill", address=address or str(engine.address),
        name=engine.name if name is None else name, incarnation=engine.incarnation, layout=rank.layout, labels=labels or {},
    )  # fmt: skip


async def connect(engine: Engine, member: Member, *, timeout: float | None = None) -> Peer:
    """The peer of `engine` that `member` is. `timeout`: seconds, the engine's by default.

    Raises `PeerLostError` when another incarnation answers at its address, and what `Engine.connect` raises.
    """
    peer = await engine.connect(member.address, timeout=timeout)
    if peer.incarnation != member.incarnation:
        raise PeerLostError(
            f"{member} is gone: incarnation {peer.incarnation:016x} answers there, not {member.incarnation:016x}",
            peer=member.address, hint="the registry will drop it when its lease ends",
        )  # fmt: skip
    return peer
