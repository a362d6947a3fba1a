"""`aiotransfer weights plan`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aiotransfer.cli import main
from aiotransfer.weights.scale.models import MODELS

SMALL = (
    "--layers", "2", "--experts", "16", "--trainers", "16", "--inference", "8", "--pp", "1", "--ep", "4", "--inference-ep", "4",
)  # fmt: skip


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_share_of_each_model_is_planned(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    assert main(["weights", "plan", "--model", model, *SMALL, "--on-gpu", "--json", "--picture", str(picture)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["model"]["name"] == model
    assert (values["placement"]["fsdp"], values["placement"]["quantise"], values["placement"]["offloaded"]) == (4, True, False)
    assert values["predicted_ms"]["plan"][0] == {"stage": "H2D memcpy", "ms": 0.0}
    assert values["balance"]["senders"]["over_bound"] <= 1.05
    assert values["bytes"]["received"] == values["bytes"]["sent"] > 0
    assert picture.read_text().startswith("<svg")


def test_the_text_says_who_is_most_loaded_and_what_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "plan", *SMALL, "--bf16", "--nic-gbit", "200"]) == 0
    text = capsys.readouterr().out
    assert "2 x EP 4" in text.splitlines()[0]
    assert "bf16" in text.splitlines()[0]
    for part in ("senders", "NICs of receivers", "bytes in by the most loaded NIC", "waiting and remaining", "Mooncake"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--ep", "7"], "384 experts of kimi-k2 do not divide by 7 (ep)"),
        (["--layers", "99"], "kimi-k2 has 61 layers"),
        (["--pp", "0"], "pp must be at least 1"),
        (["--nic-gbit", "0"], "a NIC of 0.0 Gbit/s cannot be"),
        ([*SMALL, "--staging-mib", "0"], "staging_bytes must be positive"),
        (["--report", "/nowhere/page.md"], "No such file"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "plan", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_an_unknown_model_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["weights", "plan", "--model", "gpt-7"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in MODELS)


def test_a_page_without_its_section_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n")
    assert main(["weights", "plan", "--report", str(page)]) == 2
    assert "no section" in capsys.readouterr().err
    assert page.read_text() == "# A page\n"
