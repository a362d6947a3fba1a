"""Control addresses. Two that name the same place are equal, however they were written."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from aiotransfer.quote import quote

_NUMBERS = re.compile(r"(0x[0-9a-f]+|[0-9]+)(\.(0x[0-9a-f]+|[0-9]+)){0,3}")
LOCALHOST = "localhost"


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine listens. `str()` gives `host:port`.

    The host is kept in its one canonical form: names in lower case without a final dot, numbers as
    `ipaddress` writes them, an IPv4 address that is mapped into IPv6 as the IPv4 address. So equality
    compares addresses, not their spelling.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        if not isinstance(self.host, str):
            raise TypeError(f"a host is a str, not {quote(self.host)}")
        object.__setattr__(self, "host", _canonical(self.host))

    @classmethod
    def parse(cls, text: str | Address) -> Address:
        """The address that `text` is: `host:port`, with IPv6 in brackets. Raises `TypeError` or `ValueError`
        with the value."""
        if isinstance(text, Address):
            return text
        if not isinstance(text, str):
            raise TypeError(f"an address is a str 'host:port', not {quote(text)}")
        host, colon, port = text.rpartition(":")
        if "/" in text or not text.isprintable() or any(letter.isspace() for letter in text):
            raise ValueError(f"an address is 'host:port', without a scheme, a path or blanks, not {quote(text)}")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"an IPv6 host needs brackets: {quote(text)}")
        if not colon or not host or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
            raise ValueError(f"an address is 'host:port' with a port of 0 to 65535, not {quote(text)}")
        try:
            host.encode("idna")
        except UnicodeError:
            raise ValueError(f"no host can be called {quote(host)}: {quote(text)}") from None
        return cls(host, int(port))

    @classmethod
    def parse_advertised(cls, text: str | Address) -> Address:
        """`text` as `host[:port]`: where others reach an engine. Port 0, or none: the one that it listens on.

        Raises `TypeError` or `ValueError` with the value, also for an address that cannot be dialled.
        """
        if isinstance(text, str) and not text:
            raise ValueError("an advertised address is 'host' or 'host:port', not ''")
        if isinstance(text, str) and (":" not in text or text.endswith("]") or _number(text) is not None):
            text = f"[{text}]:0" if ":" in text and not text.endswith("]") else f"{text}:0"
        address = cls.parse(text)
        if address.is_wildcard:
            raise ValueError(f"advertise must be an address that others can dial, not the wildcard {quote(text)}")
        return address

    @property
    def is_wildcard(self) -> bool:
        """All addresses of a host (`0.0.0.0`, `*`, `[::]`): an engine may listen there, but nothing can be
        dialled."""
        number = _number(self.host)
        return number is not None and number.is_unspecified

    @property
    def is_loopback(self) -> bool:
        """Whether it names the host that it is used on."""
        number = _number(self.host)
        return number.is_loopback if number is not None else self.host in (LOCALHOST, "localhost.localdomain")

    def dialable(self) -> Address:
        """This address, when it can be dialled. Raises `ValueError` that says what to do instead."""
        if self.is_wildcard:
            raise ValueError(
                f"{self} is where an engine listens, and cannot be dialled: it would lead each process to itself. Use an address "
                "of that host; open_engine(listen=..., advertise='HOST') makes the engine there say it"
            )
        if self.port == 0:
            raise ValueError(f"{self} has no port: use the address that the engine says it has (str(engine.address))")
        return self

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _number(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _canonical(host: str) -> str:
    if host == "*":  # the resolver takes it for all addresses of IPv4
        return "0.0.0.0"
    number = _number(host)
    if number is None:
        name = host.lower().rstrip(".") or host
        return str(_classful(name) or name)
    return str(getattr(number, "ipv4_mapped", None) or number)


def _classful(name: str) -> ipaddress.IPv4Address | None:
    """`127.1`, `0x7f000001` and `0` are IPv4 addresses for the system's resolver (inet_aton), so they are for
    us."""
    if not _NUMBERS.fullmatch(name):
        return None
    try:
        *firsts, last = (int(part, 16 if part.startswith("0x") else 8 if len(part) > 1 and part[0] == "0" else 10)
                         for part in name.split("."))  # fmt: skip
    except ValueError:  # 08 is no octal number
        return None
    if any(part > 255 for part in firsts) or last >= 1 << 8 * (4 - len(firsts)):
        return None
    return ipaddress.IPv4Address(sum(part << 8 * (3 - i) for i, part in enumerate(firsts)) + last)


def engine_at(name: str, address: Address) -> str:
    """How errors name an engine: what it calls itself (`name`, may be empty), and its `address`."""
    return f"{name!r} at {address}" if name else str(address)
