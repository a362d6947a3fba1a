"""One rank as the registry knows it. Pure: values to bytes and back.

JSON, so that an operator can read it in the registry; it begins with a version and has a bound. What cannot
be read raises `DescriptorError` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from aiotransfer.errors import DescriptorError
from aiotransfer.kv.protocol.layout import KVLayout
from aiotransfer.model.address import Address
from aiotransfer.quote import quote

VERSION = 1
ROLES = ("prefill", "decode")
MOST_BYTES = 64 << 10
MOST_NAME = 256
MOST_LABELS = 64
MOST_LABEL = 1024


@dataclass(frozen=True)
class Member:
    """A prefill or decode rank: where its engine listens, and what its cache looks like.

    `address`: one that others can dial. `incarnation`: of its engine, so that a later one at the same address
    is not taken for it. `labels`: the application's, text to text (a model's name, a zone); not to be changed
    afterwards.

    Raises `TypeError` or `ValueError`, each naming the field.
    """

    role: str
    address: str
    name: str
    incarnation: int
    layout: KVLayout
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {ROLES}, not {quote(self.role)}")
        address = Address.parse(self.address)
        try:
            address.dialable()
        except ValueError as error:
            raise ValueError(f"address must be one that others can dial, not {quote(self.address)}: {error}") from None
        object.__setattr__(self, "address", str(address))
        _text("address", self.address, 1, MOST_NAME)
        _text("name", self.name, 1, MOST_NAME)
        if isinstance(self.incarnation, bool) or not isinstance(self.incarnation, int):
            raise TypeError(f"incarnation must be an int, not {quote(self.incarnation)}")
        if not 0 <= self.incarnation < 1 << 64:
            raise ValueError(f"incarnation must lie in [0, 2**64), not {self.incarnation}")
        if not isinstance(self.layout, KVLayout):
            raise TypeError(f"layout must be a KVLayout, not {type(self.layout).__name__}")
        if not isinstance(self.labels, Mapping):
            raise TypeError(f"labels must be a mapping, not {type(self.labels).__name__}")
        if len(self.labels) > MOST_LABELS:
            raise ValueError(f"labels holds {len(self.labels)} entries, at most {MOST_LABELS} may be")
        for name, value in self.labels.items():
            _text("labels", name, 1, MOST_LABEL)
            _text("labels", value, 0, MOST_LABEL)
        object.__setattr__(self, "labels", dict(self.labels))

    @property
    def key(self) -> str:
        """What its entry is called: lower-case letters, digits and a hyphen."""
        return f"{self.role}-{self.incarnation:016x}"

    def encode(self) -> bytes:
        """For a backend. Raises `ValueError` when it is too long."""
        wire = _Wire(
            VERSION, self.role, self.address, self.name, f"{self.incarnation:016x}", self.layout.to_dict(), dict(self.labels)
        )
        data = msgspec.json.encode(wire)
        if len(data) > MOST_BYTES:
            raise ValueError(f"a member takes at most {MOST_BYTES} bytes, not {len(data)}")
        return data

    @classmethod
    def decode(cls, data: bytes) -> Member:
        """The entry out of `data`, as `encode` gives it; fields of a later minor version are ignored. Raises
        `DescriptorError`."""
        if len(data) > MOST_BYTES:
            raise DescriptorError(f"no member: {len(data)} bytes, at most {MOST_BYTES} may be")
        try:
            version = msgspec.json.decode(data, type=_Version).v
            if version != VERSION:
                raise DescriptorError(
                    f"a member of version {version}, not {VERSION}", hint="use one version of aiotransfer on all ranks"
                )
            wire = msgspec.json.decode(data, type=_Wire)
            if len(wire.incarnation) != 16:
                raise ValueError(f"incarnation must have 16 digits: {wire.incarnation[:32]!r}")
            layout = KVLayout.from_dict(wire.layout)
            return cls(wire.role, wire.address, wire.name, int(wire.incarnation, 16), layout, wire.labels)
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
            raise DescriptorError(f"no member: {str(error)[:200]}") from None

    def __str__(self) -> str:
        return f"{self.role} rank {self.name!r} at {self.address}"


class _Version(msgspec.Struct):
    v: int


class _Wire(msgspec.Struct):
    v: int
    role: str
    address: str
    name: str
    incarnation: str
    layout: dict[str, Any]
    labels: dict[str, str]


def _text(field_name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{field_name} must be a str, not {quote(value)}")
    if not least <= len(value) <= most or not value.isprintable():
        raise ValueError(f"{field_name} must be {least} to {most} printable characters, not {quote(value)}")
