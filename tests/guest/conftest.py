"""Where there is no RDMA device these tests are left out rather than skipped one by one, unless they were asked for by name.

A failure is told at once: a run that its time cuts off has no summary.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from aiotransfer.providers.fabric import libibverbs
from tests.needs import REQUIRED

HERE = Path(__file__).parent


class Told:
    """Writes failures."""

    def __init__(self, config: pytest.Config) -> None:
        self.terminal = config.get_terminal_writer()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and HERE.name in report.nodeid.split("/"):
            self.terminal.line(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext[-3000:]}")
            self.terminal.flush()


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.pluginmanager.register(Told(session.config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = any(HERE.name in argument.replace("\\", "/").split("::")[0].split("/") for argument in config.args)
    if named or "verbs" in REQUIRED or libibverbs.missing() is None:
        return
    elsewhere = [item for item in items if HERE not in item.path.parents]
    config.hook.pytest_deselected(items=[item for item in items if HERE in item.path.parents])
    items[:] = elsewhere
