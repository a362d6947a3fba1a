"""The fault matrix: all of the simulator's cells for a share of the seeds, and a share of those between processes.

`make test-matrix` runs all of them and writes the report; `make test-long` runs all between processes.
"""

from __future__ import annotations

import random

import pytest

from tests.needs import needs_hosts
from tests.reliability import matrix


@pytest.mark.parametrize("fault", matrix.FAULTS["loopback"])
def test_a_fault_on_the_simulator(fault: str) -> None:
    seed = random.randrange(1 << 31)
    for operation in random.sample(matrix.OPERATIONS, 4):
        for side in matrix.SIDES:
            matrix.cell("loopback", fault, operation, side, seed)


@pytest.mark.parametrize("fault", matrix.FAULTS["shm"])
def test_a_fault_between_two_processes(fault: str) -> None:
    matrix.cell("shm", fault, random.choice(matrix.OPERATIONS), random.choice(matrix.SIDES), random.randrange(1 << 31))


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=needs_hosts()) for fault in matrix.FAULTS["tcp"]])
def test_a_fault_between_two_hosts(fault: str) -> None:
    matrix.cell("tcp", fault, random.choice(matrix.OPERATIONS), random.choice(matrix.SIDES), random.randrange(1 << 31))


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("operation", matrix.OPERATIONS)
@pytest.mark.parametrize("fault", [pytest.param(fault, marks=needs_hosts()) for fault in matrix.FAULTS["tcp"]])
def test_every_fault_between_two_hosts(fault: str, operation: str) -> None:
    for side in matrix.SIDES:
        matrix.cell("tcp", fault, operation, side, random.randrange(1 << 31))


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("operation", matrix.OPERATIONS)
@pytest.mark.parametrize("fault", matrix.FAULTS["shm"])
def test_every_fault_between_two_processes(fault: str, operation: str) -> None:
    for side in matrix.SIDES:
        matrix.cell("shm", fault, operation, side, random.randrange(1 << 31))


def test_the_matrix_is_as_wide_as_it_says() -> None:
    for provider in matrix.FAULTS:
        assert len(matrix.FAULTS[provider]) >= 12
        assert len(list(matrix.cells(provider))) == len(matrix.FAULTS[provider]) * 8 * 2
