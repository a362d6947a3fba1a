"""A share of the runs of `tests.reliability.rails`, and that it would notice."""

from __future__ import annotations

import os

import pytest

from aiotransfer.providers import native
from tests.reliability import rails

pytestmark = pytest.mark.skipif(native.lib is None or not hasattr(native.lib, "at_simrail_new"), reason="needs Linux")
RUNS = 50_000 if os.environ.get("LONG_TESTS") else 300


def test_whatever_breaks_when_everything_arrives_once_by_what_is_left() -> None:
    ops, faults = map(sum, zip(*(rails.once(seed) for seed in range(RUNS)), strict=True))
    assert ops > 10 * RUNS
    assert faults > 5 * RUNS
