"""Handing records of what is over to the host: what its code raises is logged, and changes nothing."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

from aiotransfer.control.ratelimit import RateLimit, more

_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()
MOST_RECORDS = 1000  # that a role keeps


def guarded(what: str, call: Callable[[], object]) -> bool:
    """Call code of the host, or code that stands on it (an exporter). False when it raised, which is logged then."""
    try:
        call()
    except Exception as error:
        left_out = _limit.admit(what)
        if left_out is not None:
            text = "".join(traceback.format_exception(error))  # not the error: a log that is kept would keep memory in its frames
            _logger.error("%s failed%s: %s", what, more(left_out), text)
        return False
    return True
