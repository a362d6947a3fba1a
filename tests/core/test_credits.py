"""Message credits with any window: never more unread than granted, never a deadlock, and misuse is noticed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.core.credits import ReceiveCredit, SendCredit

MIB = 1 << 20
windows = st.tuples(st.integers(1, 300), st.integers(MIB, 8 * MIB))
sizes = st.lists(st.one_of(st.integers(0, 64), st.integers(0, MIB), st.just(MIB)), max_size=200)


@given(windows, sizes, st.integers(0, 8))
def test_every_message_gets_through_with_any_window_and_any_delay_of_the_grants(
    window: tuple[int, int], todo: list[int], delay: int
) -> None:
    sender, receiver = SendCredit(*window), ReceiveCredit(*window)
    unread: list[int] = []
    grants: list[tuple[int, tuple[int, int]]] = []  # when it arrives, what
    sent = now = 0
    while sent < len(todo) or unread:
        now += 1
        for _, grant in [g for g in grants if g[0] <= now]:
            sender.grant(*grant)
        grants = [g for g in grants if g[0] > now]
        while sent < len(todo) and sender.take(todo[sent]):
            assert receiver.arrived(todo[sent]), "the sender had credit, so the receiver has room"
            unread.append(todo[sent])
            sent += 1
        assert len(unread) <= window[0]
        assert sum(unread) <= window[1]
        assert unread or grants or sent == len(todo), "everything was read and still there is no credit: a deadlock"
        if unread and (back := receiver.consumed(unread.pop(0))):
            grants.append((now + delay, back))


@given(windows, sizes)
def test_grants_add_up_to_what_was_read_or_is_owed(window: tuple[int, int], read: list[int]) -> None:
    receiver = ReceiveCredit(*window)
    granted = [0, 0]
    for size in read:
        assert receiver.arrived(size)
        if back := receiver.consumed(size):
            granted[0] += back[0]
            granted[1] += back[1]
        assert granted[0] <= len(read)
    assert granted[1] <= sum(read)
    assert len(read) - granted[0] <= max(1, window[0] // 4 + 1), "credit is not hoarded"


@given(windows, st.integers(0, MIB))
def test_a_refused_take_changes_nothing(window: tuple[int, int], size: int) -> None:
    sender = SendCredit(window[0], size - 1)
    assert not sender.take(size)
    assert (sender.messages, sender.nbytes) == (window[0], size - 1)
    sender = SendCredit(0, MIB)
    assert not sender.take(0)
    assert sender.nbytes == MIB
