"""The page on expert parallelism shows what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiotransfer import moe
from aiotransfer.moe.communicator.buffers import Buffers
from aiotransfer.moe.protocol.shape import HEAD, TEXT_BYTES, Shape
from tests.docs.complaints import complaints

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "guide" / "moe.md").read_text()
PRINTED = {
    "moe_step": PAGE.partition("```text\n")[2].partition("```")[0],
    "moe_halves": "the dispatch of step 2 did not end within 0.1 s\n",
    "moe_bridge": "[64.0, 64.0]\n",
}


@pytest.mark.parametrize("name", list(PRINTED))
def test_its_programs_run(name: str) -> None:
    snippet = ROOT / "docs" / "snippets" / f"{name}.py"
    assert snippet.read_text() in PAGE
    done = subprocess.run([sys.executable, "-X", "dev", str(snippet)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, complaints(done.stderr)) == (0, "")
    assert sorted(done.stdout.splitlines()) == sorted(PRINTED[name].splitlines())  # ranks end in any order


class Allocated:
    """An engine that counts what is allocated."""

    total = 0

    def allocate(self, nbytes: int) -> Any:
        self.total += nbytes
        return self

    def numpy(self) -> Any:
        return np.empty(0, np.uint8)


@pytest.mark.parametrize(("ranks", "most", "network", "figure"), [
    (8, 0, False, "153"), (8, 0, True, "507"), (64, 0, False, "1,012"), (64, 0, True, "3,742"), (64, 16384, False, "319"),
    (64, 16384, True, "1,012"),
])  # fmt: skip
def test_its_memory_is_what_is_allocated(ranks: int, most: int, network: bool, figure: str) -> None:
    shape = Shape(
        ranks=ranks, num_experts=256, hidden=7168, dtype="float8_e4m3fn", combine_dtype="bfloat16", max_tokens=128, topk=8,
        scales=56, max_recv=most,
    )  # fmt: skip
    engine: Any = Allocated()
    buffers = Buffers(engine, shape, staged=network)
    if network:
        buffers.pack()
    row, result, tokens, r = 7168 + 4 * 56, 2 * 7168, 128, most or ranks * 128 * 8
    first = ranks * (HEAD.size + TEXT_BYTES + 4 * 256 + 32 * row)
    expected = 2 * first + r * row + tokens * row + tokens * 8 * result
    expected += (r * row + tokens * 8 * row + r * result) if network else 0
    assert 2 * expected <= engine.total <= 2 * expected + (1 << 20)
    assert HEAD.size + TEXT_BYTES == 288
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {ranks} | {f'{most:,}' if most else 'default'}"))
    assert line.split(" | ")[3 if network else 2].strip("| ") == f"{figure} MiB"
    assert f"{round(engine.total / (1 << 20)):,}" == figure


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    for name in moe.__all__:
        assert f"`{name}`" in text, name


def test_results_in_place_take_what_it_says() -> None:
    shape = Shape(ranks=8, num_experts=256, hidden=7168, dtype="float8_e4m3fn", combine_dtype="bfloat16", max_tokens=128, topk=8)
    totals = []
    for in_place in (False, True):
        engine: Any = Allocated()
        Buffers(engine, shape, staged=True, in_place=in_place)
        totals.append(engine.total)
    assert "| and with `results_in_place` | R · result |" in PAGE
    assert 0 <= totals[1] - totals[0] - 2 * (8 * 128 * 8 * 2 * 7168) < 4096
