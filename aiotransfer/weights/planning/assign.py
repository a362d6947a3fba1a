"""Which rank sends what: work of which one of several ranks may do each part, spread so that the busiest has
as little as can be.

Parts with the same candidates form a class. How much of each class each rank does is a flow problem that is
solved exactly, in bytes; its smallest possible maximum is the bound that a plan is compared with. Parts are
then dealt out in order. Pure and deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[Any]
UNBOUNDED = 1 << 62


class Network:
    """A flow network; `add` edges, then `flow` (Dinic's algorithm, without recursion)."""

    def __init__(self, nodes: int) -> None:
        self.edges: list[list[int]] = [[] for _ in range(nodes)]  # of each node: numbers of edges; edge e ^ 1 is its reverse
        self.to: list[int] = []
        self.left: list[int] = []  # what may still flow

    def add(self, a: int, b: int, capacity: int) -> int:
        """An edge from a to b; its number."""
        number = len(self.to)
        self.edges[a].append(number)
        self.edges[b].append(number + 1)
        self.to += [b, a]
        self.left += [capacity, 0]
        return number

    def levels(self, source: int) -> list[int]:
        """How many edges with room lead from `source` to each node; -1: none do."""
        level = [-1] * len(self.edges)
        level[source] = 0
        queue = [source]
        for node in queue:
            for edge in self.edges[node]:
                if self.left[edge] and level[self.to[edge]] < 0:
                    level[self.to[edge]] = level[node] + 1
                    queue.append(self.to[edge])
        return level

    def flow(self, source: int, sink: int) -> int:
        """Send as much as can be (on top of what flows already); how much that was."""
        total = 0
        while (level := self.levels(source))[sink] >= 0:
            at = [0] * len(self.edges)
            path: list[int] = []
            while True:
                node = self.to[path[-1]] if path else source
                if node == sink:
                    amount = min(self.left[edge] for edge in path)
                    total += amount
                    for edge in path:
                        self.left[edge] -= amount
                        self.left[edge ^ 1] += amount
                    cut = next(k for k, edge in enumerate(path) if not self.left[edge])
                    del path[cut:]
                    continue
                edges = self.edges[node]
                while at[node] < len(edges):
                    edge = edges[at[node]]
                    if self.left[edge] and level[self.to[edge]] == level[node] + 1:
                        break
                    at[node] += 1
                if at[node] < len(edges):
                    path.append(edges[at[node]])
                elif path:
                    at[self.to[path.pop() ^ 1]] += 1
                else:
                    break
        return total


def spread(weights: Sequence[int], candidates: Sequence[Sequence[int]], count: int) -> tuple[list[list[int]], int]:
    """Bytes of each class for each of its candidates, and the smallest possible maximum over the `count`
    ranks."""
    total = sum(weights)
    limit = max([0, *(-(-w // len(c)) for w, c in zip(weights, candidates, strict=True) if w)])
    alone = [0] * count
    for w, c in zip(weights, candidates, strict=True):
        if len(c) == 1:
            alone[c[0]] += w
    limit = max([limit, *alone])
    everyone = {rank for c in candidates for rank in c}
    if everyone:
        limit = max(limit, -(-total // len(everyone)))
    while True:
        network, source, sink = Network(len(weights) + count + 2), len(weights) + count, len(weights) + count + 1
        share = []
        for k, (w, c) in enumerate(zip(weights, candidates, strict=True)):
            network.add(source, k, w)
            share.append([network.add(k, len(weights) + rank, UNBOUNDED) for rank in c])
        for rank in range(count):
            network.add(len(weights) + rank, sink, limit)
        if network.flow(source, sink) == total:
            return [[network.left[edge ^ 1] for edge in edges] for edges in share], limit
        level = network.levels(source)  # the cut: classes that want more, and the ranks that they may use, all of which are full
        wanting = sum(w for k, w in enumerate(weights) if level[k] >= 0)
        ranks = sum(level[len(weights) + rank] >= 0 for rank in range(count))
        limit = max(limit + 1, -(-wanting // ranks))


def spread_within(
    weights: Sequence[int], candidates: Sequence[Sequence[int]], most: Sequence[int], nic_of: Sequence[int], nic_most: int
) -> list[list[int]]:
    """As `spread`, with about `most[rank]` bytes for a rank and `nic_most` for a NIC; both limits rise as far
    as needed."""
    count, nics, total = len(nic_of), max(nic_of, default=-1) + 1, sum(weights)
    rise = max([1, nic_most, *most])
    slack = 0
    while True:
        source = len(weights) + count + nics
        network = Network(source + 2)
        share = []
        for k, (w, c) in enumerate(zip(weights, candidates, strict=True)):
            network.add(source, k, w)
            share.append([network.add(k, len(weights) + rank, UNBOUNDED) for rank in c])
        for rank, nic in enumerate(nic_of):
            network.add(len(weights) + rank, len(weights) + count + nic, most[rank] + rise * slack // 200)
        for nic in range(nics):
            network.add(len(weights) + count + nic, source + 1, nic_most + rise * slack // 200)
        if network.flow(source, source + 1) == total:
            return [[network.left[edge ^ 1] for edge in edges] for edges in share]
        slack = slack * 2 + 1


def deal(sizes: Ints, kind: Ints, candidates: Sequence[Sequence[int]], shares: Sequence[Sequence[int]]) -> Ints:
    """The rank (int32) for each part of `sizes` bytes, whose candidates are `candidates[kind[part]]`, of
    which each takes the bytes that `shares` says. Parts of a class go to its ranks in order, so that each
    rank has its share up to one part."""
    chosen = np.zeros(len(sizes), np.int32)
    order = np.argsort(kind, kind="stable")
    ends = np.cumsum(np.bincount(kind, minlength=len(candidates)))
    for k, (ranks, share) in enumerate(zip(candidates, shares, strict=True)):
        mine = order[ends[k - 1] if k else 0 : ends[k]]
        if len(ranks) == 1 or not len(mine):
            chosen[mine] = ranks[0] if ranks else 0
            continue
        middle = np.cumsum(sizes[mine]) - sizes[mine] / 2
        place = np.searchsorted(np.cumsum(share), middle, side="right")
        chosen[mine] = np.asarray(ranks, np.int32)[np.minimum(place, len(ranks) - 1)]
    return chosen


def even_out(
    sizes: Ints, kind: Ints, candidates: Sequence[Sequence[int]], chosen: Ints, groups: Sequence[int], most: int
) -> Ints:
    """Move parts, largest first, to candidates that have less to do than their rank has, and are of the same
    group (`groups`: of each rank; the NIC that it shares). Looks at `most` parts, one by one, twice."""
    load = np.zeros(len(groups), np.int64)
    np.add.at(load, chosen, sizes)
    loads = load.tolist()
    result = chosen.copy()
    several = np.array([len(ranks) > 1 for ranks in candidates], bool)[kind]
    order = np.flatnonzero(several)
    order = order[np.argsort(-sizes[order], kind="stable")][:most].tolist()
    for part in order * 2:
        here, size = int(result[part]), int(sizes[part])
        near = [rank for rank in candidates[int(kind[part])] if groups[rank] == groups[here]]
        best = min(near, key=lambda rank: (loads[rank], rank))
        if loads[best] + size < loads[here]:
            loads[here] -= size
            loads[best] += size
            result[part] = best
    return result
