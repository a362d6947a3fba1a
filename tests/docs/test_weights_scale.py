"""The page on large plans is of the constants, placements and predictions that the command has."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiotransfer.weights.scale import constants as c
from aiotransfer.weights.scale import predict
from aiotransfer.weights.scale.models import MODELS
from aiotransfer.weights.scale.report import bytes_rows, constant_rows, title

PAGE = (Path(__file__).parents[2] / "docs" / "design" / "weights-scale.md").read_text()


def row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_page_has_each_model_with_its_own_placement(name: str) -> None:
    assert f"### {title(MODELS[name], predict.DEFAULTS[name])}\n" in PAGE
    assert f"{predict.counted(MODELS[name]) / 1e9:.1f} billion" in PAGE


def test_the_page_has_the_constants_and_published_figures_of_today() -> None:
    for cells in (*constant_rows(), *bytes_rows()):
        assert row(cells) in PAGE
    for figure in c.PUBLISHED:
        assert row((figure.what, figure.source, figure.assumed or "-")) in PAGE


def test_the_page_has_the_papers_way_as_it_is_predicted_today() -> None:
    for compared in predict.compared(c.NIC_GBIT.value, {}):
        if compared.paper is not None:
            figure = compared.figure
            error = 100 * (compared.paper / figure.seconds - 1)
            assert f"| {figure.what} | {figure.seconds:g} | {compared.paper:.2f} ({error:+.0f} %) |" in PAGE
