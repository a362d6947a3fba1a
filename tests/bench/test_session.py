"""The benchmark, as a user runs it."""

from __future__ import annotations

import json

from tests.cli.test_commands import run


def test_the_benchmark_measures_ours_beside_its_limit() -> None:
    done = run("bench", "--json", "--rounds", "5", "--cases", "scatter")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 3
    assert [row["ratio"] > 0 for row in rows if "limit" in row] == [True, True]  # the third row has no limit to stand beside
    assert run("bench", "--cases", "nonsense").returncode == 2
