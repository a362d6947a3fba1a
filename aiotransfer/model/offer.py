"""What one engine tells another of a provider, at the handshake and for as long as they know each other."""

from __future__ import annotations

import msgspec


class ProviderOffer(msgspec.Struct, array_like=True, frozen=True):
    """Whether `provider` is usable on that side, else the `reason`.

    `host` is equal on both sides when a provider for one host may work; empty: not known. It proves nothing
    by itself, and only spares attempts that cannot succeed. `data` is the provider's own.
    """

    provider: str
    usable: bool
    reason: str
    host: bytes
    data: bytes
