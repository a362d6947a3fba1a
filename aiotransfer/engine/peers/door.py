"""What an engine needs to dial other engines and to accept their connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aiotransfer.control.key import Key
    from aiotransfer.control.link import Identity
    from aiotransfer.control.network import Network


class Door(NamedTuple):
    """The shared secret, what the engine says of itself, and the network of its control connections."""

    key: Key
    identity: Identity
    network: Network
