"""The ledger's invariants, held by random histories against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotransfer.core.ledger import Ledger
from aiotransfer.errors import ClosedError

calls = st.sampled_from(["admit", "post", "retire", "withdraw", "shut"])
steps = st.lists(st.tuples(calls, st.integers(0, 4), st.integers(-1, 3)), max_size=60)


@given(steps)
def test_every_token_is_waiting_posted_or_retired_and_an_operation_ends_once(history: list[tuple[str, int, int]]) -> None:
    ledger: Ledger[str] = Ledger()
    model: dict[int, list[int]] = {}  # key: waiting, posted, retired, status
    strays, shut = 0, False
    for what, key, n in history:
        entry = model.get(key)
        if what == "admit":
            if shut or n < 1 or entry:
                with pytest.raises((ClosedError, ValueError)):
                    ledger.admit(key, f"item {key}", tokens=n)
            else:
                ledger.admit(key, f"item {key}", tokens=n)
                model[key] = [n, 0, 0, 0]
        elif what == "shut":
            shut = True
            assert sorted(ledger.shut()) == sorted(model)
        elif entry is None:
            strays += 1
            assert (ledger.post(key, n), ledger.retire(key, 0, n), ledger.withdraw(key, -1)) == (None, None, None)
            strays += 2
        elif what == "post":
            if 0 < n <= entry[0]:
                ledger.post(key, n)
                entry[0], entry[1] = entry[0] - n, entry[1] + n
            else:
                with pytest.raises(ValueError, match="waiting"):
                    ledger.post(key, n)
        else:
            if what == "retire" and not 0 < n <= entry[1]:
                with pytest.raises(ValueError, match="posted"):
                    ledger.retire(key, -7, n)
                continue
            if what == "retire":
                ended = ledger.retire(key, -7, n)
                entry[1], entry[2] = entry[1] - n, entry[2] + n
                entry[3] = entry[3] or -7
            else:
                ended = ledger.withdraw(key, -15)
                entry[0], entry[2] = 0, entry[2] + entry[0]
                entry[3] = entry[3] or -15
            if entry[0] == entry[1] == 0:
                assert (ended.item, ended.status, ended.tokens) == (f"item {key}", entry[3], entry[2])
                del model[key]
            else:
                assert ended is None
        assert len(ledger) == len(model)
        assert sorted(ledger) == sorted(model)
        assert ledger.strays == strays
        assert sorted(ledger) == sorted(model)
