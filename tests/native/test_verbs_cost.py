"""verbs on a device that does nothing: what is posted, in how many calls, and that it ends. How fast is `make bench-verbs`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from aiotransfer.providers import native

ROOT = Path(__file__).resolve().parents[2]
CHAIN, TABLE, BURST, PEERS = 16, 4096, 64, 56

pytestmark = [
    pytest.mark.skipif(not native.has_verbs, reason="built without libibverbs's headers"),
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="the build is instrumented"),
]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_verbs", ROOT / "tests" / "benchmarks" / "verbs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cost") / "verbs_cost"
    bench.build(target, "-O0")
    return target


@pytest.mark.parametrize(
    ("case", "requests", "calls"),
    [("pages", TABLE, TABLE // CHAIN), ("plain", TABLE, TABLE // CHAIN), ("writes", BURST, BURST), ("peers", PEERS, PEERS)],
)
def test_work_requests_go_in_chains(bench: ModuleType, program: Path, case: str, requests: int, calls: int) -> None:
    found = bench.run(case, 2, program=program)
    assert found["requests"] == 2 * requests
    assert 2 * requests - 8 <= found["posted"] <= 2 * requests  # neighbours that happen to be some go as one
    assert found["calls"] <= 2 * calls + 2


def test_arrivals_are_counted_and_their_receives_given_back(bench: ModuleType, program: Path) -> None:
    found = bench.run("arrivals", 2, program=program)
    assert found["requests"] == 2 * TABLE
    assert 2 * TABLE // 128 <= found["posted"] <= 2 * TABLE // 16, "credit is given back now and then, not for each"
