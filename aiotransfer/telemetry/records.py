"""Handing records of what is over to the host: what its code raises is logged, and changes nothing."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

from aiotransfer.aio.ratelimit import RateLimit, more

_logger = logging.getLogger("aiotransfer")
MOST_RECORDS = 1000  # that a role keeps


class Host:
    """Calls code of the host, or code that stands on it (an exporter), for one role: what it raises is
    logged, and goes no further. Each role has its own limit of lines, so that one does not silence
    another."""

    __slots__ = ("_limit",)

    def __init__(self) -> None:
        self._limit = RateLimit()

    def call(self, what: str, code: Callable[[], object]) -> bool:
        """False when it raised. `what`: a few words of the log, for what failed."""
        try:
            code()
        except Exception as error:
            left_out = self._limit.admit(what)
            if left_out is not None:
                text = "".join(traceback.format_exception(error))  # the error itself would keep the memory in its frames
                _logger.error("%s failed%s: %s", what, more(left_out), text)
            return False
        return True
