"""What is said when shared memory is not set up."""

from __future__ import annotations

import errno
import os

import pytest

from aiotransfer.errors import BrokenError
from aiotransfer.providers.shm.provider import SETUP_SECONDS, _failure


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (TimeoutError(), f"nothing came for {SETUP_SECONDS:g} s"),
        (ConnectionError("the descriptor channel is closed"), "the descriptor channel is closed"),
        (OSError(errno.EPERM, os.strerror(errno.EPERM)), "Operation not permitted"),
    ],
)
def test_the_reason_is_named_also_when_time_ran_out(error: Exception, why: str) -> None:
    failure = _failure("no segment from the peer", error)
    assert isinstance(failure, BrokenError)
    assert failure.message.startswith("no segment from the peer: ")
    assert why in failure.message
