"""Friends get in past strangers: a small share of what `make strangers` measures."""

from __future__ import annotations

import pytest

from tests.reliability.strangers import try_out


@pytest.mark.parametrize("kind", ["silent", "all"])
def test_friends_come_in_past_strangers_that_fill_every_place(kind: str) -> None:
    outcome = try_out(kind, 250, 5)
    assert outcome.came_in == 5, outcome.failures
