"""What a field of a layout may be: layouts come from peers, so each number has a bound. All raise by the name
of the field."""

from __future__ import annotations

from typing import Any

from aiotransfer.quote import quote

MOST = {
    "layers": 1024, "kv_heads": 1 << 12, "head_dim": 1 << 16, "page_tokens": 1 << 20, "num_pages": 1 << 31, "tp": 512, "pp": 512,
    "cp": 512, "tp_rank": 511, "pp_rank": 511, "cp_rank": 511, "cp_tokens": 1 << 20, "offset": 1 << 48, "strides": 1 << 56,
}  # fmt: skip


def whole(name: str, value: object, least: int) -> int:
    """An int from `least` to what `MOST` says for `name`. Raises `TypeError` or `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {quote(value)}")
    most = MOST.get(name, 1 << 48)
    if not least <= value <= most:
        raise ValueError(f"{name} must lie in [{least}, {most}], not {quote(value)}")
    return value


def row(name: str, value: Any, length: int, least: int) -> tuple[int, ...]:
    """So many ints, each as `whole` wants it. Raises `TypeError` or `ValueError`."""
    if not isinstance(value, tuple | list) or len(value) != length:
        raise TypeError(f"{name} must be {length} ints, not {quote(value)}")
    return tuple(whole(name, each, least) for each in value)


def part(name: str, value: Any, most: int) -> tuple[int, int]:
    """Two ints: the first, and past the last, of something within `most`. Raises `TypeError` or
    `ValueError`."""
    low, high = row(name, value, 2, 0)
    if not low < high <= most:
        raise ValueError(f"{name} must lie in [0, {most}] and not be empty, not {quote(value)}")
    return low, high


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the value is one of those that are known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, not {quote(value)}")


def windows(value: Any, layers: int) -> tuple[int | None, ...]:
    """A window or None for each layer, or nothing at all. Raises `TypeError` or `ValueError`."""
    if not isinstance(value, tuple | list) or len(value) not in (0, layers):
        raise ValueError(f"windows must be empty or have one entry for each of {layers} layers, not {quote(value)}")
    return tuple(None if each is None else whole("windows", each, 1) for each in value)
