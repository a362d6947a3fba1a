"""Log lines of one kind are limited in time, and none is forgotten without a count."""

from __future__ import annotations

from aiotransfer.aio.ratelimit import MOST_KINDS, RateLimit, more


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_few_pass_and_the_next_one_in_time_counts_the_rest() -> None:
    clock = Clock()
    limit = RateLimit(most=3, seconds=2.0, clock=clock)
    assert [limit.admit("a") for _ in range(10)] == [0, 0, 0] + [None] * 7
    clock.now += 1.9
    assert limit.admit("a") is None
    clock.now += 0.2
    assert [limit.admit("a") for _ in range(4)] == [8, 0, 0, None]


def test_kinds_do_not_hide_each_other() -> None:
    limit = RateLimit(most=1, seconds=2.0, clock=Clock())
    assert [limit.admit(kind) for kind in ("a", "b", "a", "b")] == [0, 0, None, None]


def test_what_no_later_line_told_of_can_be_asked_for_once() -> None:
    limit = RateLimit(most=1, seconds=2.0, clock=Clock())
    for kind in "aaabbc":
        limit.admit(kind)
    assert limit.left_out() == {"a": 2, "b": 1}
    assert limit.left_out() == {}


def test_strangers_cannot_make_it_remember_without_bound() -> None:
    limit = RateLimit(most=1, seconds=2.0, clock=Clock())
    for kind in range(10 * MOST_KINDS):
        limit.admit(kind)
    assert len(limit._kinds) == MOST_KINDS


def test_a_line_says_how_many_were_left_out() -> None:
    assert more(0) == ""
    assert more(1234) == " (1,234 more like it were not logged)"
