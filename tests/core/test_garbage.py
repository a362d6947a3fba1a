"""What the pure bookkeepers keep: bounded by what lives, and nothing of what was refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.core.deadlines import Deadlines
from aiotransfer.core.ledger import Ledger
from aiotransfer.errors import ClosedError


def test_a_deadline_moved_back_and_forth_is_due_once() -> None:
    deadlines = Deadlines()
    for when in (5, 9, 5, 1, 5):
        deadlines[1] = when
    assert deadlines.due(4) == []
    assert deadlines.due(5) == [1]
    assert deadlines.due(100) == []
    deadlines[1] = 5
    del deadlines[1]
    deadlines[1] = 5
    assert deadlines.due(5) == [1]
    assert deadlines.next() is None


def test_a_refused_operation_leaves_no_trace() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.admit(1, "first", posted=True)
    for key, tokens in ((1, 1), (2, 0), (3, -1)):
        with pytest.raises(ValueError, match="admitted"):
            ledger.admit(key, "second", tokens=tokens)
    ledger.shut()
    with pytest.raises(ClosedError):
        ledger.admit(4, "late")
    assert (list(ledger), ledger.item(1), ledger.strays) == ([1], "first", 0)
    assert [key in ledger for key in (1, 2, 3, 4)] == [True, False, False, False]
    with pytest.raises(ValueError, match="waiting"):
        ledger.post(1)  # it was posted when it was admitted
    ended = ledger.retire(1, -4)
    assert ended is not None
    assert (ended.item, ended.status, ended.tokens) == ("first", -4, 1)
    assert ledger.retire(1) is None
    assert (len(ledger), ledger.item(1), ledger.strays) == (0, None, 1)


@given(st.lists(st.sampled_from([0, -3, -9]), min_size=1, max_size=8))
def test_the_first_failure_is_the_one_that_is_told(statuses: list[int]) -> None:
    ledger: Ledger[None] = Ledger()
    ledger.admit(1, None, tokens=len(statuses), posted=True)
    ended = [ledger.retire(1, status) for status in statuses]
    assert ended[:-1] == [None] * (len(statuses) - 1)
    assert ended[-1] is not None
    assert ended[-1].status == next((s for s in statuses if s), 0)
