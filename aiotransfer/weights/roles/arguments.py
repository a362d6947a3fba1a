"""What users give to roles: each wrong type or value is refused with the value in the text, before anything
is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from aiotransfer.engine.engine import Engine
from aiotransfer.engine.sync.group import PeerGroup
from aiotransfer.quote import quote
from aiotransfer.weights.layouts.templates import Template


def engine(value: Any) -> Engine:
    """The engine of a role. Raises `TypeError`."""
    if not isinstance(value, Engine):
        raise TypeError(f"engine must be an open Engine, not {quote(value)}")
    return value


def group(value: Any) -> PeerGroup | None:
    """The group of a publisher. Raises `TypeError`."""
    if value is not None and not isinstance(value, PeerGroup):
        raise TypeError(f"group must be what Engine.group returns, or None, not {quote(value)}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False. Raises `TypeError`."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {quote(value)}")
    return value


def rate(value: Any) -> float:
    """Bytes a second; None: no limit. Raises `TypeError`, `ValueError`."""
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"rate_limit must be a number, not {quote(value)}")
    if not value > 0:
        raise ValueError(f"rate_limit is a number of bytes a second above 0, or None: {quote(value)}")
    return float(value)


def count(name: str, value: Any) -> int:
    """A number of bytes, at least one. Raises `TypeError`, `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {quote(value)}")
    if value < 1:
        raise ValueError(f"{name} must be positive, not {quote(value)}")
    return value


def names(value: Any) -> tuple[str, ...] | None:
    """Templates of names: one, or several; None: all. Raises `TypeError`, `ValueError`."""
    if value is None:
        return None
    if not isinstance(value, Iterable):
        raise TypeError(f"names are templates of names of tensors, not {quote(value)}")
    found = (value,) if isinstance(value, str) else tuple(value)
    for text in found:
        Template(text)
    return found


def instance(value: Any, most: int) -> str:
    """The name of an instance. Raises `TypeError`, `ValueError`."""
    if not isinstance(value, str):
        raise TypeError(f"instance must be a str, not {quote(value)}")
    if len(value) > most:
        raise ValueError(f"instance has at most {most} characters, not {len(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"instance cannot be written as UTF-8: {quote(value)}")
    return value
