"""The fault matrix over verbs: each fault with an operation and a side drawn by lot. All of it:

    python -m tests.guest.run --seconds 3000 -- .venv/bin/python -m tests.reliability.matrix --providers verbs
"""

from __future__ import annotations

import random

import pytest

from tests.needs import needs_verbs
from tests.reliability import matrix

pytestmark = needs_verbs()


@pytest.mark.parametrize("fault", matrix.FAULTS["verbs"])
def test_a_fault_between_two_nics(fault: str) -> None:
    matrix.cell("verbs", fault, random.choice(matrix.OPERATIONS), random.choice(matrix.SIDES), random.randrange(1 << 31))
