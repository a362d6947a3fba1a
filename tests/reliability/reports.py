"""Where the reports go: pages of the documentation, as the commands wrote them."""

from __future__ import annotations

from pathlib import Path


def publish(page: Path, text: str, *, write: bool) -> None:
    """Print a report, and with `write` put it into the documentation."""
    print(text)
    if write:
        page.parent.mkdir(exist_ok=True)
        page.write_text(text)
