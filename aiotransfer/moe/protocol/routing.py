"""Which row goes where: routing to writes, and back. Pure, and vectorised: no loop over tokens, rows or
experts.

A *row* is one (token, choice). The source sorts its rows by expert, choices of one expert by token (a stable
sort): row j of that order has the number j from here on. Rows for one rank are a range of numbers, and
results come back to row j of the source's results. `Route` is what a source knows by itself; `Ranges` is what
follows from the counts of all sources, the same on every rank (section 1.7 of the protocol in arXiv
2510.27656: route exchange, private buffers, contiguous ranges).

In a group of `dp_size` ranks all have the same tokens, hence the same counts; the member with index r mod
dp_size sends the rows for rank r, and results go to all members.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from aiotransfer.moe.protocol.shape import Shape

Ints = np.ndarray[Any, np.dtype[np.int64]]


def exclusive(counts: Ints, axis: int = -1) -> Ints:
    """For each of `counts` along `axis`: the sum of those before it."""
    return np.cumsum(counts, axis=axis) - counts


class Route:
    """One source's rows in order.

    `counts[e]`: rows for expert e; `begins[e]`: number of the first of them; `tokens[j]`: the token of row j;
    `places[t, k]`: the row of a choice, -1 where there is none; `first[r]`, `n[r]`: the range of rows for
    rank r; `digest`: 32 bits of all choices in their order.
    """

    __slots__ = ("begins", "counts", "digest", "first", "n", "places", "sent", "tokens")

    def __init__(self, shape: Shape, rank: int, topk_idx: Any) -> None:
        """`topk_idx`: integers of shape [tokens, choices] in [-1, num_experts), -1 meaning no expert; checked
        by the caller."""
        experts, choices = shape.num_experts, topk_idx.shape[1]
        flat = topk_idx.reshape(-1).astype(np.uint16)  # sixteen bits are sorted by radix; as unsigned ones, -1 comes last
        self.digest = zlib.crc32(flat)
        order = flat.argsort(kind="stable")
        self.counts: Ints = np.bincount(flat, minlength=experts)[:experts]
        edges = np.zeros(experts + 1, np.int64)
        np.add.accumulate(self.counts, out=edges[1:])
        self.begins: Ints = edges[:-1]
        by_rank, total = edges[:: shape.local_experts], int(edges[-1])
        self.first: Ints = by_rank[:-1]
        self.n: Ints = by_rank[1:] - self.first
        self.tokens: Ints = order[:total] // choices
        places = np.empty(flat.size, np.int64)
        places[order] = np.arange(flat.size)
        places[order[total:]] = -1
        self.places: Ints = places.reshape(topk_idx.shape)
        dp = shape.dp_size
        self.sent: Ints = self.n if dp == 1 else np.where(np.arange(shape.ranks) % dp == rank % dp, self.n, 0)

    def rows_of(self, rank: int) -> slice:
        """Which rows go to `rank`, of all that this rank sends."""
        first = int(self.first[rank])
        return slice(first, first + int(self.n[rank]))


class Ranges:
    """What `rank` derives from `counts[source, expert]`, the same for all (zero rows for ranks that take no
    part).

    `base[e]`: where at its rank expert e begins; `below[e]`: how many rows of earlier sources lie there
    before this rank's; `totals[r]`: rows at r, padding included; `sums[s]`: all rows of source s.
    """

    __slots__ = ("_wide", "base", "below", "counts", "rank", "shape", "sums", "totals", "used")

    def __init__(self, shape: Shape, rank: int, counts: Any) -> None:
        self.shape, self.rank = shape, rank
        self.counts: Ints = np.asarray(counts)
        # Without a cast a sum takes a third of the time; no sum overflows where all counts together do not,
        # even wrong counts.
        self._wide = np.int64 if int(self.counts.max()) * self.counts.size >> 32 else self.counts.dtype
        self.sums = np.add.reduce(self.counts, axis=1, dtype=self._wide)
        self.below = self._sum(0, rank)
        self.used: Ints = self.below + self._sum(rank, shape.ranks)
        by_rank = self.used.reshape(shape.ranks, shape.local_experts)
        padded = by_rank if shape.padding == 1 else -(-by_rank // shape.padding) * shape.padding
        self.base: Ints = exclusive(padded).reshape(-1)
        self.totals: Ints = padded.sum(axis=1)

    def _sum(self, begin: int, end: int) -> Ints:
        """Rows of each expert from the ranks `begin` to `end`, as far as those send them (see the top)."""
        dp = self.shape.dp_size
        if dp == 1:
            whole: Ints = np.add.reduce(self.counts[begin:end], axis=0, dtype=self._wide).astype(np.int64)
            return whole
        total = np.empty((self.shape.ranks, self.shape.local_experts), np.int64)
        for index in range(dp):
            of = self.counts[begin + (index - begin) % dp : end : dp]
            total[index::dp] = of.sum(axis=0, dtype=np.int64).reshape(total.shape)[index::dp]
        return total.reshape(-1)

    def moved(self, rank: int) -> Ints:
        """For each local expert of `rank`, by source: the rows that are sent there; shape [ranks, local
        experts]."""
        local, dp = self.shape.local_experts, self.shape.dp_size
        mine = self.counts[:, rank * local : (rank + 1) * local].astype(np.int64)
        if dp > 1:
            mine[np.arange(self.shape.ranks) % dp != rank % dp] = 0
        return mine

    def staged(self) -> Ints:
        """For each rank: where in its staging area this rank's rows begin, those that are not in its first
        write."""
        shape, dp = self.shape, self.shape.dp_size
        sources = np.arange(self.rank % dp, self.rank, dp)
        rows = np.add.reduceat(self.counts[sources], np.arange(0, shape.num_experts, shape.local_experts), axis=1, dtype=np.int64)
        before: Ints = np.maximum(rows - shape.private_tokens, 0).sum(axis=0)
        return before

    def overfull(self) -> list[int]:
        """Ranks that would get more rows than they take."""
        return [int(r) for r in np.flatnonzero(self.totals > self.shape.recv_rows)]

    def destinations(self, route: Route) -> Ints:
        """For each row of this rank's `route`: its place at its destination."""
        shift = self.base + self.below - route.begins
        return np.repeat(shift, route.counts) + np.arange(len(route.tokens))


class Arrivals:
    """What arrives at one rank: `rows[i]`, the places of the rows of all sources, one source after the other,
    each in its order; `first[s]`, `n[s]`: the range of i of source s; `counts[e]`: rows of each local expert;
    `results[s]`: the row of s's results at which those of this rank begin."""

    __slots__ = ("counts", "first", "n", "results", "rows", "total")

    def __init__(self, ranges: Ranges) -> None:
        shape, rank = ranges.shape, ranges.rank
        here = slice(rank * shape.local_experts, (rank + 1) * shape.local_experts)
        mine = ranges.moved(rank)
        self.n: Ints = mine.sum(axis=1)
        self.first = exclusive(self.n)
        flat = mine.reshape(-1)
        starts = (ranges.base[here] + exclusive(mine, axis=0)).reshape(-1)
        self.rows: Ints = np.repeat(starts - exclusive(flat), flat) + np.arange(int(flat.sum()))
        self.counts = ranges.used[here]
        self.total = int(ranges.totals[rank])
        self.results: Ints = np.add.reduce(ranges.counts[:, : here.start], axis=1, dtype=ranges._wide).astype(np.int64)

    def back(self) -> Ints:
        """For each of `rows`: its row among the results of its source."""
        return np.repeat(self.results - self.first, self.n) + np.arange(len(self.rows))

    def rows_of(self, source: int) -> Ints:
        """Places of the rows of `source`, in its order."""
        first = int(self.first[source])
        return self.rows[first : first + int(self.n[source])]
