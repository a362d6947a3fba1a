"""Which ranks of two instances have something to say to each other, and whether all of a cache is spoken for.

What goes from one rank to another is layers x heads x tokens. Of prefill ranks that hold the same heads
decode ranks take one, by their own number and the *turn* of the request: so requests share the load, and the
ranks that one request needs follow from any of them. The rank that is asked serves: which turn that is
follows from who asks it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from aiotransfer.kv.protocol.dealing import Deal, with_rank
from aiotransfer.kv.protocol.layout import KVLayout, Place, check_match


class Moving(Protocol):
    """What goes from one prefill rank to one decode rank, as it counts here: a `TransferPlan`."""

    prefill: KVLayout
    layers: range

    @property
    def heads(self) -> range:
        """The heads of the model that move."""
        ...


def common(a: range, b: range) -> range:
    """What two ranges of layers or heads have in common; empty, but not backwards, where that is nothing."""
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    return range(start, max(start, stop))


def turn_of(request: str) -> int:
    """The turn of a request, from its id: the same on every rank. Without an id the first one."""
    return int.from_bytes(hashlib.blake2b(request.encode(), digest_size=4).digest(), "little") if request else 0


def serves(prefill: KVLayout, here: int, there: int, turn: int) -> bool:
    """Whether prefill tensor rank `here`, of those that hold the same heads, is the one for decode tensor
    rank `there`."""
    return (here - there - turn) % prefill.replicas == 0


def turn_between(prefill: KVLayout, here: int, there: int) -> int:
    """The turn in which tensor rank `here` of the prefill side serves tensor rank `there` of the decode
    side."""
    return (here - there) % prefill.replicas


def pairs(prefill: KVLayout, decode: KVLayout, *, request: str = "") -> list[tuple[Place, Place]]:
    """Every (prefill rank, decode rank) of which the first sends the second something, in order of the decode
    rank.

    `prefill`, `decode`: the layout of any rank of either instance; which ranks these are does not matter.
    `request`: the id of the request: of prefill ranks that hold the same, requests take one in turn, and
    decode ranks of one request as well.

    Each head, layer and token of a decode rank comes from exactly one prefill rank. Raises `LayoutMismatch`,
    or `ValueError` where a layout says by a range what its rank has: then that of others is not known.
    """
    check_match(prefill, decode)
    if not (prefill.is_regular and decode.is_regular):
        raise ValueError("with layer_range or head_range it is not known what other ranks hold: ask plan_transfer for each pair")
    turn = turn_of(request)
    layers = [
        [here for here in range(prefill.pp) if len(common(prefill.layers_at(here), decode.layers_at(there)))]
        for there in range(decode.pp)
    ]
    heads = [
        [
            here for here in range(prefill.tp)
            if serves(prefill, here, there, turn) and len(common(prefill.heads_at(here), decode.heads_at(there)))
        ]
        for there in range(decode.tp)
    ]  # fmt: skip
    tokens = [_dealers(prefill, with_rank(decode.deal, there)) for there in range(decode.cp)]
    return [
        (Place(source_pp, source_tp, source_cp), Place(pp, tp, cp))
        for pp, tp, cp in np.ndindex(decode.pp, decode.tp, decode.cp)
        for source_pp in layers[pp] for source_tp in heads[tp] for source_cp in tokens[cp]
    ]  # fmt: skip


def sources(prefill: KVLayout, decode: KVLayout, *, request: str = "") -> list[Place]:
    """The prefill ranks that the rank of `decode` gets something of. `prefill`: the layout of any rank of
    their instance. `request`: as in `pairs`."""
    return [here for here, there in pairs(prefill, decode, request=request) if there == decode.place]


@dataclass(frozen=True, slots=True)
class Receivers:
    """The decode ranks that one prefill rank sends a request to.

    `layers`, `heads`: what it has to give. `pp`, `tp`: the pipeline and tensor ranks that hold some of it;
    None where these say by a range what they have, so that it is known only when they ask. `cp`: the context
    ranks. A rank takes a box of these three; the boxes of all ranks are together what there is.
    """

    layers: range
    heads: range
    pp: frozenset[int] | None
    tp: frozenset[int] | None
    cp: frozenset[int]

    def __len__(self) -> int:
        """How many boxes of one rank, or of one layer or head where ranks are not known, there are."""
        return len(self.layers if self.pp is None else self.pp) * len(self.heads if self.tp is None else self.tp) * len(self.cp)

    @property
    def are_known(self) -> bool:
        """Whether it is known which ranks these are, before they have asked."""
        return self.pp is not None and self.tp is not None

    def places(self) -> list[Place]:
        """The ranks, where they are known."""
        return [Place(*place) for place in itertools.product(sorted(self.pp or ()), sorted(self.tp or ()), sorted(self.cp))]

    def share(self, layout: KVLayout) -> int:
        """How many of the boxes that `len` counts the rank of `layout` takes; 0: it is none of these
        ranks."""
        layers = len(common(self.layers, layout.own_layers)) if self.pp is None else layout.pp_rank in self.pp
        heads = len(common(self.heads, layout.own_heads)) if self.tp is None else layout.tp_rank in self.tp
        return layers * heads * (layout.cp_rank in self.cp)

    def clash(self, one: KVLayout, other: KVLayout) -> bool:
        """Whether two of these ranks take the same."""
        if one.cp_rank != other.cp_rank or (self.pp is not None and one.pp_rank != other.pp_rank):
            return False
        if self.tp is not None and one.tp_rank != other.tp_rank:
            return False
        layers = self.pp is not None or len(common(one.own_layers, other.own_layers)) > 0
        return layers and (self.tp is not None or len(common(one.own_heads, other.own_heads)) > 0)


def receivers(prefill: KVLayout, decode: KVLayout) -> Receivers:
    """Those of the rank of `prefill`, in the instance that the rank of `decode`, which asks it, belongs
    to."""
    turn = turn_between(prefill, prefill.tp_rank, decode.tp_rank)
    pp = tp = None
    if decode.pp == 1:
        pp = frozenset({0})
    elif decode.layer_range is None:
        pp = frozenset(pp for pp in range(decode.pp) if len(common(prefill.own_layers, decode.layers_at(pp))))
    if decode.tp == 1:
        tp = frozenset({0})
    elif decode.head_range is None:
        tp = frozenset(
            tp for tp in range(decode.tp)
            if serves(prefill, prefill.tp_rank, tp, turn) and len(common(prefill.own_heads, decode.heads_at(tp)))
        )  # fmt: skip
    cp = frozenset(there for there in range(decode.cp) if prefill.deal.meets(with_rank(decode.deal, there)))
    return Receivers(prefill.own_layers, prefill.own_heads, pp, tp, cp)


def coverage(plans: Sequence[Moving], decode: KVLayout) -> str:
    """What these plans together do not bring of this decode rank's cache, or bring more than once, in words;
    empty: nothing."""
    if len({plan.prefill.deal.way for plan in plans}) > 1:
        return "some deal tokens out in another way than others"
    for dealer in _dealers(plans[0].prefill, decode.deal):
        lacks = _lacks([plan for plan in plans if plan.prefill.cp_rank == dealer], decode)
        if lacks:
            return lacks if plans[0].prefill.cp == 1 else f"of the tokens of context rank {dealer}, {lacks}"
    return ""


def _dealers(prefill: KVLayout, deal: Deal) -> list[int]:
    """The context ranks of a prefill instance that have some of the tokens that are dealt so."""
    return [here for here in range(prefill.cp) if with_rank(prefill.deal, here).meets(deal)]


def _lacks(plans: Sequence[Moving], decode: KVLayout) -> str:
    own_layers, own_heads = decode.own_layers, decode.own_heads
    cuts = {own_layers.start, own_layers.stop}
    for plan in plans:
        cuts |= {plan.layers.start, plan.layers.stop}
    edges = sorted(cut for cut in cuts if own_layers.start <= cut <= own_layers.stop)
    for first, past in itertools.pairwise(edges):  # between two edges every plan has all layers or none
        where, at = f"layers {first} to {past - 1}", own_heads.start
        for heads in sorted((plan.heads for plan in plans if first in plan.layers), key=lambda heads: heads.start):
            if heads.start > at:
                break
            if heads.start < at:
                return f"{where}, heads {heads.start} to {min(at, heads.stop) - 1} come from more than one of them"
            at = heads.stop
        if at < own_heads.stop:
            return f"{where}, heads from {at} on (this rank has {own_heads.start} to {own_heads.stop - 1}) come from none of them"
    return ""
