"""What is not as it should be yet, counted in each folder: it may become less, and never more."""

from __future__ import annotations

import pytest

from tests.architecture.figures import RULES, committed, findings, present, risen

MOST_SHOWN = 40


@pytest.mark.parametrize("rule", RULES)
def test_no_figure_is_greater_than_it_was(rule: str) -> None:
    more = risen(present()[rule], committed()[rule])
    places = [f"{one.where}: {one.what}" for one in findings()[rule] if one.room in more]
    assert not more, "\n".join(
        [
            *(f"{rule} in {room}: {now}, and {was} is the most" for room, (was, now) in more.items()),
            f"all of them, by python -m tests.architecture --list {rule!r} FOLDER:",
            *places[:MOST_SHOWN],
            *([f"and {len(places) - MOST_SHOWN} more"] if len(places) > MOST_SHOWN else []),
        ]
    )


def test_the_bounds_are_those_of_the_rules() -> None:
    assert set(committed()) == set(RULES)
    assert all(n > 0 for rooms in committed().values() for n in rooms.values()), "a folder without findings is not named"
