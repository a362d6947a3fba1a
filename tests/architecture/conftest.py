"""Says at the end of a run which figures may be lowered."""

from __future__ import annotations

import pytest

from tests.architecture.figures import RULES, committed, fallen, findings, present


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not findings.cache_info().currsize:
        return  # no test has asked for them
    lower = {rule: changed for rule in RULES if (changed := fallen(present()[rule], committed().get(rule, {})))}
    if lower:
        terminalreporter.section("figures that may be lowered: python -m tests.architecture --lower")
        for rule, changed in lower.items():
            terminalreporter.write_line(f"{rule}: " + ", ".join(f"{room} {was} -> {now}" for room, (was, now) in changed.items()))
