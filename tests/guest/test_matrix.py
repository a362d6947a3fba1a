"""The fault matrix over verbs: a few cells, drawn by lot; with LONG_TESTS=1 one of every fault. All of it:

    python -m tests.guest.run --seconds 3000 -- .venv/bin/python -m tests.reliability.matrix --providers verbs
"""

from __future__ import annotations

import os
import random

import pytest

from tests.needs import needs_verbs
from tests.reliability import matrix

pytestmark = needs_verbs()
FEW = 4  # a cell takes some five seconds: another process has to start
FAULTS = matrix.FAULTS["verbs"] if os.environ.get("LONG_TESTS") == "1" else sorted(random.sample(matrix.FAULTS["verbs"], FEW))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_between_two_nics(fault: str) -> None:
    matrix.cell("verbs", fault, random.choice(matrix.OPERATIONS), random.choice(matrix.SIDES), random.randrange(1 << 31))
