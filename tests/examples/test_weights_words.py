"""The model that the launched examples of weights share: it notices what is no whole version. Needs neither torch nor Ray."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
import weights_words as model

from aiotransfer.weights import make_plan


def received(learners: list[Any], rank: int) -> dict[str, Any]:
    """What an inference rank gets from all trainers: their rows, cut to its columns."""
    found = {}
    for tensor in model.TENSORS:
        whole = np.concatenate([learner.memory[tensor.name] for learner in learners])
        found[tensor.name] = np.array_split(whole, model.SERVERS, 1)[rank].copy()
    return found


@pytest.fixture(scope="module")
def learners() -> list[Any]:
    return [model.Learner(rank) for rank in range(model.TRAINERS)]


@pytest.mark.parametrize("rank", range(model.SERVERS))
def test_what_comes_whole_is_equal_and_what_is_wrong_is_named(learners: list[Any], rank: int) -> None:
    tensors = received(learners, rank)
    assert model.unequal(tensors, rank) == []
    tensors["last"][-1, 0] += 1
    assert model.unequal(tensors, rank) == [f"trainer {model.TRAINERS - 1}"]
    tensors["digest"][0, 0, 0] ^= 1
    assert model.unequal(tensors, rank) == [f"trainer {trainer}" for trainer in range(model.TRAINERS)]


def test_a_mixture_of_two_versions_is_not_equal(learners: list[Any]) -> None:
    losses = [learner.train(1) for learner in learners]
    before = received(learners, 0)
    assert all(learner.train(3) < loss for learner, loss in zip(learners, losses, strict=True))
    after = received(learners, 0)
    assert model.unequal(after, 0) == []
    assert model.unequal(after | {"before": before["before"]}, 0) == ["trainer 0", "trainer 1"]


def test_the_layouts_fit_and_every_byte_has_a_source() -> None:
    plan = make_plan(model.trainer_layout(), {"chat": model.server_layout()})
    assert plan.balance().bytes == 2 * 4 * model.WORDS**2 + model.TRAINERS * model.SERVERS * 32


def test_ranks_answer_together_as_one_would(learners: list[Any]) -> None:
    parts = [received(learners, rank) for rank in range(model.SERVERS)]
    scores = np.concatenate([part["last"][7] + part["before"][5] for part in parts])
    scores[0] = -np.inf  # the word that stands for rare ones is never said
    found = max((model.best(part, rank, 5, 7) for rank, part in enumerate(parts)), key=lambda one: one[0])
    assert found == (float(scores.max()), int(scores.argmax()))
