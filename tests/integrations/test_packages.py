"""Adapters are found by entry points, and import what they adapt only when it is used."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import aiotransfer.integrations.vllm as ours
from tests.integrations.vllm import stub

ROOT = Path(__file__).parent.parent.parent


def test_importing_them_imports_nothing_of_others() -> None:
    program = "import sys, aiotransfer.integrations.vllm.fields as f; print([m for m in ('vllm', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_vllm_finds_a_function_by_the_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["aiotransfer"].partition(":")
    assert getattr(import_module(module), name) is ours.register


@pytest.mark.parametrize("version", stub.SOURCES)
def test_it_registers_both_sides_once(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = stub.install(monkeypatch, version)
    ours.register()
    ours.register()
    worker, trainer = (factory._registry["aiotransfer"]() for factory in (vllm.workers, vllm.trainers))
    assert issubclass(worker, stub.WeightTransferEngine)
    assert issubclass(trainer, stub.TrainerWeightTransferEngine)


def test_a_vllm_without_the_interface_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stub.install(monkeypatch, "0.32")
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", None)
    monkeypatch.delitem(sys.modules, "vllm.distributed.weight_transfer.factory")
    ours.register()
