"""Deadlines, credits and the ranking of paths against plain models."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.core.credits import ReceiveCredit, SendCredit
from aiotransfer.core.deadlines import Deadlines
from aiotransfer.core.ranking import rank
from aiotransfer.model.offer import ProviderOffer


@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "due"]), st.integers(0, 9), st.integers(0, 50)), max_size=200))
def test_each_key_is_due_once_and_never_early(history: list[tuple[str, int, int]]) -> None:
    deadlines, model = Deadlines(), dict[int, int]()
    for what, key, when in history:
        if what == "add":
            deadlines[key] = when
            model[key] = when
        elif what == "discard":
            deadlines.pop(key, None)
            model.pop(key, None)
        else:
            due = deadlines.due(when)
            assert sorted(due) == sorted(k for k, w in model.items() if w <= when)
            assert [model[k] for k in due] == sorted(model[k] for k in due)
            for k in due:
                del model[k]
        assert len(deadlines) == len(model)
        assert deadlines.next() == (min(model.values()) if model else None)


@given(st.lists(st.integers(0, 1 << 20), max_size=300), st.randoms(use_true_random=False))
def test_what_is_unread_never_exceeds_the_window_and_credit_always_comes_back(sizes: list[int], rng) -> None:  # type: ignore[no-untyped-def]
    window = 16, 4 << 20
    sender, receiver = SendCredit(*window), ReceiveCredit(*window)
    unread: list[int] = []
    todo = list(sizes)
    while todo or unread:
        if todo and sender.take(todo[0]) and (size := todo.pop(0)) >= 0:
            assert receiver.arrived(size)
            unread.append(size)
            assert len(unread) <= window[0]
            assert sum(unread) <= window[1]
            if rng.random() < 0.5:
                continue
        assert unread, "no credit although everything was read: a deadlock"
        if grant := receiver.consumed(unread.pop(0)):
            sender.grant(*grant)


def test_a_sender_without_credit_is_noticed() -> None:
    receiver = ReceiveCredit(1, 100)
    assert receiver.arrived(100)
    assert not receiver.arrived(1)


def offer(name: str, *, usable: bool = True, host: bytes = b"h") -> ProviderOffer:
    return ProviderOffer(name, usable, "" if usable else "broken", host, b"")


def test_the_best_common_path_comes_first_and_the_others_have_reasons() -> None:
    mine = [offer("tcp"), offer("shm"), offer("verbs", usable=False)]
    ranking = rank(mine, [offer("shm"), offer("tcp"), offer("verbs")])
    assert ranking.paths == ("shm", "tcp")
    assert dict(ranking.reasons)["verbs"] == "unusable on this side: broken"


def test_same_host_paths_need_the_same_host() -> None:
    ranking = rank([offer("shm", host=b"a")], [offer("shm", host=b"b")])
    assert ranking.paths == ()
    assert dict(ranking.reasons)["shm"] == "the two sides are on different hosts"


def test_preference_and_requirement_narrow_the_choice() -> None:
    both = [offer("shm"), offer("tcp")]
    assert rank(both, both, ["tcp", "shm"]).paths == ("tcp", "shm")
    assert rank(both, both, "auto", "tcp").paths == ("tcp",)
    assert rank(both, both, ["shm"], "tcp").paths == ()
