"""Control addresses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine listens. `str()` gives `host:port`."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str | Address) -> Address:
        """`host:port`, with IPv6 in brackets. Raises `TypeError` or `ValueError` with the value."""
        if isinstance(text, Address):
            return text
        if not isinstance(text, str):
            raise TypeError(f"an address is a str 'host:port', not {text!r}")
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"an IPv6 host needs brackets: {text!r}")
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"an address is 'host:port' with a port of 0 to 65535, not {text!r}")
        try:
            host.encode("idna")
        except UnicodeError:
            raise ValueError(f"no host can be called {host!r}: {text!r}") from None
        if "\0" in host:
            raise ValueError(f"no host can be called {host!r}: {text!r}")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
