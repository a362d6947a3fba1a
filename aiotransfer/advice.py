"""Warnings that inform and never stop the call that gives them."""

from __future__ import annotations

import sys
import warnings


def advise(text: str, category: type[Warning] = UserWarning, *, stacklevel: int = 2) -> None:
    """Warn. Where the application makes warnings of this kind errors, the text is shown all the same and
    nothing is raised: an engine that opens, or a connection that comes up, is not given up half way for the
    sake of advice.

    `stacklevel` counts as in `warnings.warn`: 1 is the caller of this function.
    """
    try:
        warnings.warn(text, category, stacklevel=stacklevel + 1)
    except Warning as error:
        frame = sys._getframe(stacklevel)
        warnings.showwarning(error, category, frame.f_code.co_filename, frame.f_lineno)
