"""What `make bench-weights ARGS=--report` writes, from figures by hand; and that the page has been written by it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.benchmarks.weights_report import BEGIN, END, PAGE, Figures, Taken, read, row, text, told, write

ROOT = Path(__file__).parents[2]
MB = 1 << 20
COPY = [Taken(0.1, 0.2, 0), Taken(0.4, 0.2, 0), Taken(0.2, 0.2, 0)]
OURS = [Taken(0.2, 0.4, 0), Taken(0.4, 0.4, -5), Taken(0.25, 0.1, 3 * MB)]
FIGURES = Figures(
    2_000_000_000,
    64 * MB,
    "a machine, 2 cores",
    (0.25, 1.5),
    {"copy": COPY, "aiotransfer": OURS},
    {"copy": COPY, "aiotransfer": OURS},
    [],
)


def test_ratios_are_those_of_the_same_round() -> None:
    cells = row("ours", FIGURES.nbytes, OURS, FIGURES.large)
    shares = [0.1 / 0.2, 1.0, 0.2 / 0.25]
    assert cells == ("ours", "250 (200-400)", "8.00", f"{statistics.median(shares):.2f}", "1.00", "400", "0.50", "3")


def test_the_section_says_where_and_how_it_was_measured(tmp_path: Path) -> None:
    """In a process of its own: matplotlib keeps its fonts open."""
    pytest.importorskip("matplotlib", reason="the test extra brings it")
    page = tmp_path / "weights.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    code = (
        "import json, pathlib, sys\nfrom tests.benchmarks.weights_report import read, write\n"
        "write(read(json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]))"
    )
    command = sys.executable, "-c", code, json.dumps(told(FIGURES)), str(page)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = page.read_text()
    assert found.startswith(f"before\n{BEGIN}\n\n2.00 GB of bfloat16, 3 rounds, a watermark of 64 MiB; ")
    assert "\na machine, 2 cores.\n\n| way | " in found
    assert found.endswith(f"(weights-bench.svg)\n\n{END}\nbehind\n")
    assert "old" not in found
    assert text(FIGURES).splitlines()[1:] == found.splitlines()[4:12]
    assert "svg" in ElementTree.parse(tmp_path / "weights-bench.svg").getroot().tag


def test_a_page_without_the_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "weights.md"
    page.write_text(f"{BEGIN} only")
    with pytest.raises(ValueError, match="no section between"):
        write(FIGURES, page)
    assert (page.read_text(), list(tmp_path.iterdir())) == (f"{BEGIN} only", [page])


def test_figures_come_back_from_json() -> None:
    assert read(json.loads(json.dumps(told(FIGURES)))) == FIGURES


def test_the_page_has_a_row_for_each_way_and_its_plot() -> None:
    section = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")][2:]
    assert rows == [
        "copy", "aiotransfer", "broadcast over gloo", "safetensors in tmpfs", "copy, beside float8",
        "aiotransfer, to float8 with scales",
    ]  # fmt: skip
    assert "(weights-bench.svg)" in section
    assert PAGE.with_name("weights-bench.svg").read_text().rstrip().endswith("</svg>")
