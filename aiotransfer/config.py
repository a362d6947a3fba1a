"""Settings of an engine, from code and from the environment.

`AIOTRANSFER_<FIELD>` overrides a field of `Config`. A variable that names no field is warned about once, with
the field that may have been meant, because a misspelt setting that silently does nothing costs days.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from aiotransfer.advice import advise
from aiotransfer.errors import ConfigurationError
from aiotransfer.quote import quote

PREFIX = "AIOTRANSFER_"
OTHER_NAMES = frozenset(
    {"KEY", "ADVERTISE", "CACHE", "LIBFABRIC", "LIBCUDA", "VERBS_DEVICE", "SKIP_NATIVE", "PROVIDERS", "SANITIZE"}
)
# Kubernetes sets these in every pod for a Service called aiotransfer or aiotransfer-SOMETHING: they are no
# settings of ours.
_OF_KUBERNETES = re.compile(r"AIOTRANSFER_(.+_)?(SERVICE_(HOST|PORT(_.+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
_MOST_SECONDS = 1e9
_MOST_INT = (1 << 63) - 1
_MAY_BE_ZERO = frozenset({"spin_seconds"})
_MOST: dict[str, float] = {"spin_seconds": 1e-3, "early_values": (1 << 32) - 1}  # what the lane holds them in
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_warned: set[str] = set()


def port_range(text: str) -> tuple[int, int]:
    """First and last port of "7100-7163" or "7100"; (0, 0) of "". Raises `ValueError` with the value."""
    if not text:
        return 0, 0
    first, dash, last = text.partition("-")
    ports = [int(part) if part.isascii() and part.isdigit() else 0 for part in (first, last if dash else first)]
    if not 0 < ports[0] <= ports[1] < 1 << 16:
        raise ValueError(f"data_ports must be a port or a range of ports such as '7100-7163', not {quote(text)}")
    return ports[0], ports[1]


@dataclass(frozen=True)
class Config:
    """Limits and times of an engine. Times are in seconds, sizes in bytes."""

    peer_timeout: float = 3.0
    """Silence after which a peer that something waits on is lost."""
    drain_timeout: float = 1.0
    """How long posted work of a cancelled or expired transfer is waited for before its connection is
    broken."""
    max_queued_operations: int = 65536
    """Operations queued per peer before BusyError."""
    max_queued_bytes: int = 4 << 30
    """Bytes queued per peer before BusyError; one operation alone may have more."""
    message_window_count: int = 256
    """Messages a peer may have unread here."""
    message_window_bytes: int = 4 << 20
    """Message bytes a peer may have unread here (at least one whole message of 1 MiB)."""
    early_values: int = 65536
    """Distinct immediates kept per sender before a counter is opened for them; also for all together who have
    gone."""
    inline_bytes: int = 1 << 20
    """Largest copy made inside the submitting call; larger ones go to the native thread."""
    turn_seconds: float = 0.001
    """Finished awaits and inline copies after which the event loop gets a turn."""
    spin_seconds: float = 50e-6
    """How long a wait for arrivals looks for them before it sleeps, where peers on this host have answered so
    soon. 0: never."""
    pin_threads: bool = True
    """Whether the native threads run on the CPUs of the NUMA node of the NIC in use, as far as this process
    may use them."""
    data_ports: str = ""
    """First and last port of tcp's data connections, such as "7100-7163", for firewalls, NAT and Services:
    one for each peer and rail. "": any free one."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind: type[object] = type(field.default)
            if kind is bool:
                if not isinstance(value, bool):
                    raise TypeError(f"{field.name} must be True or False, not {quote(value)}")
                continue
            if kind is str:
                if not isinstance(value, str):
                    raise TypeError(f"{field.name} must be a str, not {quote(value)}")
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
                raise TypeError(f"{field.name} must be {'a number' if kind is float else 'an int'}, not {quote(value)}")
            if not (value > 0 or (value == 0 and field.name in _MAY_BE_ZERO)) or not math.isfinite(value):
                raise ValueError(f"{field.name} must be positive and finite, not {quote(value)}")
            if value > (most := _MOST.get(field.name, _MOST_SECONDS if kind is float else _MOST_INT)):
                raise ValueError(f"{field.name} may be at most {most!r}, not {quote(value)}")
        if self.message_window_bytes < 1 << 20:
            raise ValueError(f"message_window_bytes must hold one message of 1 MiB, not {self.message_window_bytes}")
        port_range(self.data_ports)

    @property
    def data_port_range(self) -> tuple[int, int]:
        """First and last of `data_ports`; (0, 0): any."""
        return port_range(self.data_ports)

    def with_environment(self, environ: Mapping[str, str]) -> Config:
        """This configuration with the overrides of `environ`. Raises `ConfigurationError` for values that do
        not parse."""
        kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(self)}
        changes: dict[str, Any] = {}
        for name, text in environ.items():
            if not name.startswith(PREFIX):
                continue
            key = name[len(PREFIX) :].lower()
            if key in kinds:
                try:
                    changes[key] = _SWITCH[text.strip().lower()] if kinds[key] is bool else kinds[key](text)
                except (ValueError, KeyError):
                    raise ConfigurationError(f"{name}={quote(text)} is no {kinds[key].__name__}") from None
            elif name[len(PREFIX) :] not in OTHER_NAMES and name not in _warned and not _OF_KUBERNETES.fullmatch(name):
                _warned.add(name)
                known = [PREFIX + n for n in (*OTHER_NAMES, *(k.upper() for k in kinds))]
                import difflib  # here: only a mistyped name needs it

                close = difflib.get_close_matches(name, known, 1)
                meant = f"; did you mean {close[0]}?" if close else ""
                advise(f"the environment variable {name} means nothing to aiotransfer{meant}")
        try:
            return replace(self, **changes) if changes else self
        except ValueError as error:
            raise ConfigurationError(f"from the environment: {error}") from None
