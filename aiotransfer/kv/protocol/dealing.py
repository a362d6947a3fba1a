"""Which tokens of a request a rank holds when they are dealt out to several (context parallelism).

So many tokens at a time go to one rank after another: token t belongs to rank t // each % ranks, and is there
behind its own tokens before it. With one rank all of this changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Deal(NamedTuple):
    """The tokens of `rank` among `ranks`, dealt `each` at a time."""

    ranks: int
    each: int
    rank: int

    @property
    def way(self) -> tuple[int, int]:
        """What two ranks have in common whose tokens are dealt alike."""
        return (self.ranks, self.each) if self.ranks > 1 else (1, 1)

    def count(self, tokens: int) -> int:
        """How many of the first `tokens` tokens this rank has."""
        if self.ranks == 1:
            return tokens
        rounds, rest = divmod(tokens, self.ranks * self.each)
        return rounds * self.each + min(max(rest - self.rank * self.each, 0), self.each)

    def holding(self, own: int) -> int:
        """The most tokens of a request of which this rank has no more than `own`."""
        if self.ranks == 1:
            return own
        rounds, rest = divmod(own, self.each)
        return rounds * self.ranks * self.each + self.rank * self.each + rest

    def has(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these tokens are its own."""
        mine: NDArray[np.bool_] = tokens // self.each % self.ranks == self.rank
        return mine

    def own(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of these tokens, all its own, among its own."""
        return tokens if self.ranks == 1 else tokens // (self.ranks * self.each) * self.each + tokens % self.each

    def meets(self, other: Deal) -> bool:
        """Whether there is a token that both have, in requests that are long enough."""
        if self.way == other.way:
            return self.rank == other.rank or self.ranks == 1
        common = int(np.gcd(self.ranks * self.each, other.ranks * other.each))
        apart = (other.rank * other.each - self.rank * self.each) % common
        return apart < self.each or (-apart) % common < other.each


def with_rank(deal: Deal, rank: int) -> Deal:
    """The same deal, of another rank."""
    return Deal(deal.ranks, deal.each, rank)


def unit_of(deal: Deal, tokens: int) -> int:
    """Where a request may be cut, so that what a rank has before the cut is a multiple of `tokens`."""
    return tokens if deal.ranks == 1 else deal.ranks * int(np.lcm(deal.each, tokens))
