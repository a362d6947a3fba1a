"""What a trainer tells workers through vLLM: plain values, so that they pass through JSON. Pure."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping
from typing import Any

from aiotransfer.weights import Layout, Tensor, Version, replicated

MOST_SECONDS = 86400.0  # of a timeout


def invitation(trainer: str, layout: Layout, *, timeout: float, listen: str = "") -> dict[str, Any]:
    """What `init_weight_transfer_engine` takes: `trainer`: the address of trainer rank 0; `layout`: the
    checkpoint as one rank holds it; `timeout`: seconds of everything that a worker waits for; `listen`: where
    workers listen (default "": at the address by which they reach the trainer)."""
    return {"trainer": trainer, "layout": base64.b64encode(layout.encode()).decode(), "timeout": timeout, "listen": listen}


def read_layout(text: str) -> Layout:
    """The layout of an invitation. Raises `ValueError` for what is no layout."""
    try:
        return Layout.decode(base64.b64decode(text, validate=True))
    except (TypeError, binascii.Error) as error:
        raise ValueError(f"the layout of an invitation is base64, not {text!r:.80}") from error


def read_seconds(value: Any) -> float:
    """A timeout that a trainer names. Raises `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST_SECONDS or math.isnan(value):
        raise ValueError(f"timeout is a number of seconds up to {MOST_SECONDS:g}, not {value!r}")
    return float(value)


def read_version(epoch: Any, number: Any) -> Version:
    """The version that `update_weights` names. Raises `ValueError`."""
    for name, value in (("epoch", epoch), ("number", number)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} of a version is a whole number, not {value!r}")
    return Version(epoch, number)


def checkpoint(tensors: Iterable[Tensor]) -> Layout:
    """These tensors as one rank holds them, each in a buffer of its name."""
    tensors = list(tensors)
    return Layout(tensors, [piece for tensor in tensors for piece in replicated(tensor, [0])], ranks=1)


def tensors_of(layout: Layout) -> list[Tensor]:
    """The tensors of a layout, without where they lie."""
    aliases: dict[int, list[str]] = {}
    for alias, number in layout.aliases.items():
        aliases.setdefault(number, []).append(alias)
    return [
        Tensor(name, layout.shapes[k], layout.dtypes[k], layout.groups[k], tuple(sorted(aliases.get(k, ()))))
        for k, name in enumerate(layout.names)
    ]


def for_workers(layout: Layout, ranks: int) -> Layout:
    """The tensors of `layout` as `ranks` workers of one engine hold them: each has all of every tensor,
    because a model's `load_weights` takes whole tensors and cuts out its part."""
    tensors = tensors_of(layout)
    return Layout(tensors, [piece for tensor in tensors for piece in replicated(tensor, range(ranks))], ranks=ranks)


def differences(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What `given` tensors (name: shape) lack of those `wanted`, what is too much, and what has another
    shape, as texts."""
    found = [f"{name} is missing" for name in wanted if name not in given]
    found += [f"{name} was not announced" for name in given if name not in wanted]
    for name in wanted:
        if name in given and given[name] != wanted[name]:
            found.append(f"{name} has the shape {given[name]}, announced was {wanted[name]}")
    return found
