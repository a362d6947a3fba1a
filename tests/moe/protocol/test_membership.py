"""Who takes part in which step: agreed on whatever is lost, comes back or is given up, and nobody waits for ever."""

from __future__ import annotations

import random
from collections.abc import Mapping

import msgspec
import pytest

from aiotransfer.moe.protocol.membership import UNDECIDED, Membership, Undecided, View
from tests.moe.protocol.network import Faults, Make, Network

RUNS = 50  # of each block


def run(seed: int, alarms: int = 0, make: Make = Membership) -> Network:
    r = random.Random(seed)
    ranks = r.randint(2, 7)
    faults = Faults(r.randint(0, 4), r.randint(0, alarms), r.randint(0, 4))
    absent = r.randint(0, 1) if ranks > 2 else 0
    net = Network(seed, ranks, faults, slots=r.choice([1, 2, 2, 3]), absent=absent, deaf=r.random() < 0.5, make=make)
    net.run(r.choice([200, 500]))
    return net


@pytest.mark.parametrize("alarms", [0, 2])
@pytest.mark.parametrize("block", range(6))
def test_those_that_remain_agree_and_finish(block: int, alarms: int) -> None:
    for seed in range(block * RUNS, (block + 1) * RUNS):
        try:
            run(seed, alarms)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


class NoLimit(Membership):
    def limit(self) -> int | None:
        return None if self.start is not None else -1


class Silent(Membership):
    def tell(self, next_step: int, headers: Mapping[tuple[int, int], bytes]) -> View:
        return msgspec.structs.replace(super().tell(next_step, headers), headers=())


class Hasty(Membership):
    def header(self, step: int, rank: int) -> bytes | Undecided | None:
        found = super().header(step, rank)
        return None if found is UNDECIDED else found


class Forgetful(Membership):
    def tell(self, next_step: int, headers: Mapping[tuple[int, int], bytes]) -> View:
        view = super().tell(next_step, headers)
        joined = tuple((rank, number) for rank, number, step in view.starts if step)
        return msgspec.structs.replace(view, starts=tuple(s for s in view.starts if not s[2]), joining=view.joining + joined)


@pytest.mark.parametrize("make", [NoLimit, Silent, Hasty, Forgetful])
def test_the_network_notices_a_rule_that_is_left_out(make: Make) -> None:
    with pytest.raises(AssertionError):
        for seed in range(1000):
            run(seed, make=make)


# One rule at a time.


def group(ranks: int, slots: int = 2) -> list[Membership]:
    return [Membership(rank, range(1, ranks + 1), slots=slots) for rank in range(ranks)]


def exchange(*members: Membership, next_steps: Mapping[int, int] | None = None, headers: object = None) -> None:
    """Whoever owes a view tells it to those given, until nobody owes one."""
    held = headers if isinstance(headers, dict) else {}
    while owing := [one for one in members if one.owes()]:
        told = [(one, one.tell((next_steps or {}).get(one.rank, 0), held.get(one.rank, {}))) for one in owing]
        for one, view in told:
            for other in members:
                if other.rank in one.audience:
                    other.hear(one.rank, view)


def joiner(rank: int, incarnation: int, others: list[Membership]) -> Membership:
    numbers = [0] * 8
    for one in others:
        numbers[one.rank] = one.incarnation(one.rank)
        one.join(rank, incarnation)
    numbers[rank] = incarnation
    return Membership(rank, numbers[: len(others) + 1], slots=2, start=None)


def test_a_header_that_one_holds_counts_for_all() -> None:
    a, b, _, _ = group(4)
    assert a.settled
    assert a.takes_part(7, 3) is True
    assert a.lose(3)
    assert not a.lose(3)
    assert a.header(5, 3) is UNDECIDED
    assert a.takes_part(5, 3) is UNDECIDED
    a.lose(2)
    exchange(a, b, headers={0: {}, 1: {(5, 3): b"five", (5, 2): b"two", (5, 0): b"of nobody gone"}}, next_steps={0: 5, 1: 6})
    for one in (a, b):
        assert one.settled
        assert one.gone == {2, 3}
        assert one.header(5, 3) == b"five"
        assert one.takes_part(5, 3) is True
        assert one.header(5, 2) == b"two"
        assert one.header(6, 3) is None
        assert one.takes_part(6, 3) is False
        assert one.limit() is None


def test_a_decision_outlives_whoever_held_the_header() -> None:
    a, b, c, _ = group(4)
    a.lose(3)
    exchange(a, b, c, headers={2: {(0, 3): b"x"}})
    a.lose(2)
    assert a.header(0, 3) == b"x", "it stands while another loss is open"
    exchange(a, b)
    assert b.header(0, 3) == b"x"
    a.lose(1)
    exchange(a)
    assert a.settled
    assert a.audience == ()
    assert a.header(0, 3) == b"x"


def test_a_decision_reaches_those_that_had_not_all_views() -> None:
    a, b, c, _ = group(4)
    for one in (a, b, c):
        one.lose(3)
    views = [one.tell(0, {(0, 3): b"x"} if one is c else {}) for one in (a, b, c)]
    a.hear(1, views[1])
    a.hear(2, views[2])
    b.hear(0, views[0])  # and that of c is lost with it
    assert a.header(0, 3) == b"x"
    b.lose(2)
    exchange(b, a)
    assert b.settled
    assert b.header(0, 3) == b"x"


def test_a_start_outlives_whoever_decided_it_and_the_joiner_is_waited_for() -> None:
    a, b, _ = group(3)
    for one in (a, b):
        one.lose(2)
    exchange(a, b)
    c = joiner(2, 9, [a, b])
    views = [a.tell(4, {}), b.tell(3, {})]
    a.hear(1, views[1])
    assert not a.settled, "the joiner must be one of those that know what was decided"
    c.hear(0, views[0])
    c.hear(1, views[1])
    a.hear(2, c.tell(0, {}))
    assert a.takes_part(6, 2) is True
    assert c.start == 6
    b.lose(0)  # before it had heard the joiner
    exchange(b, c, next_steps={1: 4, 2: 6})
    assert b.settled
    assert b.takes_part(5, 2) is False
    assert b.takes_part(6, 2) is True


def test_a_header_that_comes_after_the_view_does_not_count() -> None:
    a, b, _ = group(3)
    a.lose(2)
    exchange(a, b)
    a.lose(1)
    exchange(a, headers={0: {(0, 2): b"late", (0, 1): b"in time"}})
    assert a.header(0, 2) is None
    assert a.header(0, 1) == b"in time"


def test_a_view_of_a_gone_rank_or_of_an_unknown_one_is_ignored() -> None:
    a, b, c = group(3)
    c.lose(1)
    view = c.tell(0, {})
    a.hear(2, msgspec.structs.replace(view, incarnation=77))
    assert a.settled
    a.lose(2)
    a.hear(2, view)
    assert a.gone == {2}
    b.hear(2, view)
    assert b.evicted


def test_a_rank_that_others_call_gone_decides_nothing_any_more() -> None:
    a, b, c = group(3)
    a.lose(2)
    view = a.tell(0, {})
    c.hear(0, view)
    assert c.evicted
    assert not c.owes()
    assert not c.settled
    assert c.limit() == -1
    assert c.takes_part(0, 0) is UNDECIDED
    assert c.header(0, 1) is UNDECIDED
    assert not c.lose(0)
    assert not c.join(0, 9)
    c.hear(1, b.tell(0, {}) if b.lose(2) else view)
    assert not c.settled


def test_a_rank_begins_where_all_know_of_it() -> None:
    a, b, _ = group(3)
    a.lose(2)
    b.lose(2)
    c = joiner(2, 9, [a, b])
    assert c.start is None
    assert c.limit() == -1
    assert c.takes_part(0, 0) is UNDECIDED
    assert a.takes_part(3, 2) is UNDECIDED
    view = a.tell(4, {})
    assert a.limit() == 5
    assert a.takes_part(6, 2) is UNDECIDED
    for one in (b, c):
        one.hear(0, view)
    exchange(b, next_steps={1: 5})  # tells nobody here
    assert not a.settled
    a.lose(2)  # and it is gone again before anything was decided
    exchange(a, b, next_steps={0: 6, 1: 5})
    assert a.settled
    assert a.limit() is None
    assert not a.join(2, 9)
    c = joiner(2, 10, [a, b])
    exchange(a, b, c, next_steps={0: 6, 1: 5})
    for one in (a, b, c):
        assert one.settled
        assert one.limit() is None
        assert one.takes_part(7, 2) is False
        assert one.takes_part(8, 2) is True
        assert one.present(8, 2)
        assert not one.present(7, 2)
    assert c.start == 8
    assert c.takes_part(0, 0) is True


def test_the_limit_stays_where_the_first_view_has_put_it() -> None:
    a, b, c, _ = group(4)
    a.lose(3)
    exchange(a, b, c)
    a.join(3, 9)
    assert a.takes_part(9, 3) is UNDECIDED
    a.tell(4, {})
    assert a.limit() == 5
    assert a.takes_part(5, 3) is False
    assert a.takes_part(6, 3) is UNDECIDED
    a.lose(2)
    a.tell(6, {})
    assert a.limit() == 5


def test_two_that_join_at_once_begin_together_and_the_loss_of_one_is_as_any() -> None:
    a, b, _, _ = group(4)
    for one in (a, b):
        one.lose(2)
        one.lose(3)
    c = Membership(2, [1, 2, 30, 0], slots=2, start=None)
    d = Membership(3, [1, 2, 30, 40], slots=2, start=None)
    for one in (a, b):
        one.join(2, 30)
        one.join(3, 40)
    c.join(3, 40)
    exchange(a, b, c, d, next_steps={0: 3, 1: 3})
    assert [one.start for one in (a, b, c, d)] == [0, 0, 5, 5]
    d.lose(1)
    exchange(a, c, d, next_steps={0: 5, 2: 6, 3: 6}, headers={2: {(5, 1): b"b"}})
    assert [one.header(5, 1) for one in (a, c, d)] == [b"b"] * 3
    a.join(3, 41)  # d has started anew: the old one is gone thereby
    assert a.gone == {1}
    c.join(3, 41)
    d = Membership(3, [1, 0, 30, 41], slots=2, start=None)
    exchange(a, c, d, next_steps={0: 6, 2: 6}, headers={2: {(6, 3): b"d"}})
    assert [one.header(6, 3) for one in (a, c, d)] == [b"d"] * 3
    assert a.takes_part(6, 3) is True
    assert not a.present(6, 3), "it is not waited for in this step"
    assert d.start == 8


def test_a_rank_begins_after_what_its_earlier_self_has_sent() -> None:
    a, _ = group(2)
    a.lose(1)
    b = joiner(1, 9, [a])
    exchange(a, b)
    assert b.start == 2
    a.join(1, 10)  # the earlier one was two steps ahead
    b = Membership(1, [1, 10], slots=2, start=None)
    exchange(a, b, headers={0: {(2, 1): b"", (3, 1): b""}})
    assert b.start == 4


def test_joiners_that_are_left_alone_begin_after_what_they_heard_of() -> None:
    b = Membership(1, [5, 6, 7], slots=2, start=None)
    c = Membership(2, [5, 6, 7], slots=2, start=None)
    b.lose(0)
    c.lose(0)
    exchange(b, c, headers={1: {(30, 0): b""}}, next_steps={1: 99})
    assert b.start == c.start == 31


def test_what_is_undecided_is_neither_true_nor_false() -> None:
    with pytest.raises(TypeError, match="is UNDECIDED"):
        bool(UNDECIDED)


def test_a_view_is_told_once_and_travels() -> None:
    a, b, _ = group(3)
    a.lose(2)
    view = a.tell(1, {(0, 2): b"x"})
    with pytest.raises(RuntimeError, match="once"):
        a.tell(1, {})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(view), type=View) == view
    assert view.present() == {(0, 1), (1, 2)}
    b.hear(0, view)
    assert b.gone == {2}


def test_a_rank_is_not_its_own_neighbour() -> None:
    a, _ = group(2)
    for wrong in (lambda: a.lose(0), lambda: a.lose(2), lambda: a.join(0, 7), lambda: Membership(0, [0, 1], slots=2)):
        with pytest.raises(ValueError):
            wrong()
