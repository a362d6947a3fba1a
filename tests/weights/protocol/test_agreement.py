"""How the ranks of an instance change together: no order of messages, readers and losses mixes versions."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotransfer.weights.protocol.agreement import Chair, Seat
from aiotransfer.weights.protocol.version import Claims, Version, check_epoch, check_number, next_epoch


class World:
    """Ranks with readers, and messages that arrive in order between each pair, whenever chance says so."""

    def __init__(self, seed: int, ranks: int) -> None:
        self.rng = random.Random(seed)
        self.ranks = ranks
        self.chair = Chair(ranks)
        self.seats = [Seat() for _ in range(ranks)]
        self.begun = [0] * ranks
        self.active: list[list[str]] = [[] for _ in range(ranks)]
        self.waiting = [0] * ranks
        self.boxes: dict[tuple[int, int], list[tuple[str, tuple[int, ...]]]] = {}
        self.dead = False  # rank 0

    def version(self, rank: int) -> str:
        return "new" if self.seats[rank].state == "open" else "old"

    def send(self, there: int, here: int, what: str, *numbers: int) -> None:
        self.boxes.setdefault((there, here), []).append((what, numbers))

    def say(self, said: list[tuple[int, str]]) -> None:
        for rank, what in said:
            self.send(rank, 0, what)

    def report(self, rank: int) -> None:
        if self.seats[rank].state == "held":
            self.send(0, rank, "held", self.begun[rank], len(self.active[rank]), self.waiting[rank], self.seats[rank].passed)

    def begin(self, rank: int) -> None:
        self.begun[rank] += 1
        self.active[rank].append(self.version(rank))
        readers = {version for k, some in enumerate(self.active) for version in some if not (self.dead and k == 0)}
        assert len(readers) == 1, "readers of two versions at one time"

    def deliver(self, there: int, here: int) -> None:
        what, numbers = self.boxes[there, here].pop(0)
        if here == 0 and there != 0 and self.dead:
            return  # the connection is gone, and what was on it
        if there == 0:
            if self.dead:
                return
            if what == "whole":
                self.say(self.chair.whole(here))
            elif what == "held":
                self.say(self.chair.held(here, *numbers))
            elif what == "sure":
                self.say(self.chair.sure(here))
            else:
                self.hear(0, what)
        else:
            self.hear(there, what)

    def hear(self, rank: int, what: str) -> None:
        seat = self.seats[rank]
        if not seat.hear(what):
            return
        if what == "ready":
            self.send(0, rank, "sure")
        elif what == "pass":
            for _ in range(self.waiting[rank]):
                self.begin(rank)
            self.waiting[rank] = 0
        elif what in ("open", "release"):
            waiting, self.waiting[rank] = self.waiting[rank], 0
            for _ in range(waiting):
                self.begin(rank)
        self.report(rank)

    def read(self, rank: int) -> None:
        if self.seats[rank].is_closed:
            self.waiting[rank] += 1
            self.report(rank)
        else:
            self.begin(rank)

    def end(self, rank: int) -> None:
        self.active[rank].pop()
        self.report(rank)

    def kill(self) -> None:
        """Rank 0 dies: each of the others learns of it in its time, and asks the others then."""
        self.dead = True
        for rank in range(1, self.ranks):
            kept = self.boxes.get((rank, 0), [])
            self.boxes[rank, 0] = kept[: self.rng.randint(0, len(kept))]
            # what was on the connection may come before the loss is known
            while self.boxes[rank, 0]:
                what, _ = self.boxes[rank, 0].pop(0)
                self.hear(rank, what)
        order = list(range(1, self.ranks))
        self.rng.shuffle(order)
        for rank in order:
            if self.seats[rank].lose_chair():
                answers = [self.seats[other].asked() for other in range(1, self.ranks) if other != rank]
                self.seats[rank].resolve(answers, self.ranks - 1)


@settings(max_examples=300)
@given(seed=st.integers(0, 1 << 40), ranks=st.integers(1, 4), dies=st.booleans(), gives_up=st.booleans())
def test_readers_of_two_versions_never_run_at_one_time_and_all_ranks_end_alike(
    seed: int, ranks: int, dies: bool, gives_up: bool
) -> None:
    world = World(seed, ranks)
    rng = world.rng
    allowed, wholes = False, set(range(ranks))
    for turn in range(400):
        acts = [key for key, box in world.boxes.items() if box]
        choice = rng.randrange(8)
        if choice == 0 and wholes and (rank := rng.choice(sorted(wholes))) is not None:
            wholes.discard(rank)
            world.seats[rank].whole()
            world.send(0, rank, "whole")
        elif choice == 1 and not allowed:
            allowed = True
            world.say(world.chair.allow())
        elif choice == 2 and turn < 200:
            rank = rng.randrange(ranks)
            if not (world.dead and rank == 0):
                world.read(rank)
        elif choice in (3, 4):
            rank = rng.randrange(ranks)
            if world.active[rank]:
                world.end(rank)
        elif choice == 5 and gives_up and rng.random() < 0.02:
            world.say(world.chair.release())
        elif choice == 6 and dies and ranks > 1 and not world.dead and rng.random() < 0.03:
            world.kill()
        elif acts:
            world.deliver(*rng.choice(acts))
        if turn > 200 and all(seat.state in ("open", "released") for seat in world.seats[world.dead :]):
            break
    for rank in range(ranks):
        if rank not in wholes:
            continue
        if not world.dead:
            world.say(world.chair.release())
    for _ in range(2000):
        for rank in range(ranks):
            if world.active[rank]:
                world.end(rank)
        acts = [key for key, box in world.boxes.items() if box]
        if not acts:
            break
        world.deliver(*rng.choice(acts))
    ends = {seat.state for seat in world.seats[world.dead :]} - {"coming", "whole"}
    assert "doubt" not in ends
    assert not ("open" in ends and "released" in ends), "some ranks changed, and some will not"


def test_a_rank_that_is_needed_by_a_step_of_another_may_begin_it_under_the_old_version() -> None:
    chair = Chair(2)
    assert chair.whole(0) == chair.whole(1) == []
    assert chair.allow() == [(0, "hold"), (1, "hold")]
    assert chair.held(0, 6, 1, 0, 0) == []
    assert chair.held(1, 5, 0, 1, 0) == [(1, "pass")]
    assert chair.held(1, 6, 1, 0, 1) == []
    assert chair.held(1, 6, 0, 0, 1) == []
    assert chair.held(0, 6, 0, 0, 0) == [(0, "ready"), (1, "ready")]
    assert chair.sure(1) == []
    assert chair.sure(0) == [(0, "open"), (1, "open")]
    assert chair.release() == []


def test_readers_that_follow_one_another_do_not_hold_a_version_up() -> None:
    chair = Chair(2)
    chair.whole(0), chair.whole(1), chair.allow()
    chair.held(0, 9, 1, 0, 0)
    assert chair.held(1, 3, 0, 1, 0) == [(1, "pass")]
    assert chair.held(1, 4, 1, 0, 1) == []
    assert chair.held(0, 9, 0, 1, 0) == []  # rank 1 runs a reading that rank 0 had long ago: it waits
    assert chair.held(1, 4, 0, 1, 1) == [(0, "ready"), (1, "ready")]
    assert chair.release() == [(0, "release"), (1, "release")]


@given(steps=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(1, 3)), max_size=40))
def test_versions_only_rise_and_an_epoch_has_one_owner(steps: list[tuple[int, int, int]]) -> None:
    claims = Claims()
    owners: dict[int, int] = {}
    before = claims.highest
    for epoch, number, life in steps:
        version = Version(epoch, number)
        if claims.refusal(version, life):
            continue
        claims.claim(version, life)
        assert owners.setdefault(epoch, life) == life
        claims.took(version, life)
        assert claims.highest == version > before
        before = version


def test_numbers_and_epochs_are_checked() -> None:
    assert (check_number(3), check_epoch(None), check_epoch(2), next_epoch([3, 1]), next_epoch([])) == (3, None, 2, 4, 1)
    for wrong in (-1, 1 << 62):
        with pytest.raises(ValueError, match="number"):
            check_number(wrong)
    for wrong in (0, 1 << 32):
        with pytest.raises(ValueError, match="epoch"):
            check_epoch(wrong)
    for bad in ("1", 1.5, True):
        with pytest.raises(TypeError):
            check_number(bad)
    with pytest.raises(TypeError):
        check_epoch("1")


def test_a_report_from_before_a_pass_says_nothing_about_those_that_it_let_in() -> None:
    chair = Chair(2)
    chair.whole(0), chair.whole(1), chair.allow()
    chair.held(0, 6, 1, 0, 0)
    assert chair.held(1, 5, 0, 1, 0) == [(1, "pass")]
    assert chair.held(0, 6, 0, 0, 0) == []  # rank 1 begins a reading just now, and its last report does not say so
    assert chair.held(1, 5, 0, 1, 0) == []
    assert chair.held(1, 6, 0, 0, 1) == [(0, "ready"), (1, "ready")]


def test_a_rank_that_was_asked_heeds_rank_0_no_more() -> None:
    for heard, answer in (((), "not"), (("hold",), "held"), (("hold", "ready"), "sure"), (("hold", "ready", "open"), "open")):
        seat = Seat()
        seat.whole()
        for say in heard:
            assert seat.hear(say)
        assert seat.asked() == answer
        assert not any(seat.hear(say) for say in ("hold", "pass", "ready", "open", "release"))


def test_a_rank_in_doubt_ends_as_the_others_did_and_alone_only_where_that_is_certain() -> None:
    def doubting(*heard: str) -> Seat:
        seat = Seat()
        seat.whole()
        for say in heard:
            seat.hear(say)
        assert seat.lose_chair()
        return seat

    held, sure = ("hold",), ("hold", "ready")
    for heard, answers, others, end in (
        (held, ["held", "open"], 2, "open"), (sure, ["sure", "not"], 2, "released"), (held, ["held"], 1, "released"),
        (held, ["sure"], 1, "open"), (sure, ["held"], 1, "open"), (held, [], 1, "released"), (held, [], 2, "cut off"),
        (sure, [], 1, "cut off"),
    ):  # fmt: skip
        seat = doubting(*heard)
        seat.resolve(answers, others)
        assert seat.state == end, (heard, answers, others)
