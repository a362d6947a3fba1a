"""The guards that `make mutants` takes out: each stands where it is said to stand, once, and names tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guards import EVERY
from tests.guards.mutant import Mutant

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutant", EVERY, ids=lambda mutant: mutant.name)
def test_a_guard_stands_once_where_it_is_said_to(mutant: Mutant) -> None:
    assert (ROOT / mutant.path).read_text().count(mutant.guard) == 1
    assert mutant.instead != mutant.guard
    assert mutant.tests.split()
    for test in mutant.tests.split():
        assert (ROOT / test.partition("::")[0]).exists()


def test_each_guard_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in EVERY}) == len(EVERY)
