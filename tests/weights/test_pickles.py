"""What a role of weights is made of stays in its process; layouts, versions and records may be sent."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from aiotransfer import weights
from aiotransfer.weights.checkpoint import open_checkpoint
from tests.test_pickles import refused
from tests.weights.party import Party


@pytest.mark.asyncio
async def test_roles_of_weights_and_what_they_give_are_refused_and_layouts_are_not(party: Party) -> None:
    (trainer,) = await party.train(1, timeout=20)
    (server,) = await party.serve("a", 1)
    publisher, subscriber = trainer.publisher, server.subscriber
    assert "layout.encode()" in refused(publisher)
    assert "layout.encode()" in refused(subscriber)
    assert "layout.encode()" in refused(publisher.layout.bind(0, trainer.memory))
    trainer.load(1)
    async with publisher.publish(1) as update:
        assert "update.version" in refused(update)
    async with subscriber.reading() as version:
        assert pickle.loads(pickle.dumps(version)) == (1, 1)
        copied = pickle.loads(pickle.dumps(dict(subscriber.tensors)))
        np.testing.assert_array_equal(copied["norm"], subscriber.tensors["norm"])
    layout = pickle.loads(pickle.dumps(publisher.layout))
    assert layout.digest == publisher.layout.digest
    assert pickle.loads(pickle.dumps(publisher.records[0])).outcome == publisher.records[0].outcome


def test_files_are_opened_where_they_are_read(tmp_path: Path) -> None:
    """A number of a descriptor means another file elsewhere, and a copy would read what has that number after it was closed."""
    samples = pytest.importorskip("tests.weights.checkpoint.samples")
    samples.write(tmp_path / "x.safetensors", {"w": ("float32", np.zeros(4, np.float32))})
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert isinstance(checkpoint, weights.Bound)
    assert "send their path" in refused(checkpoint)
    assert "send its path" in refused(next(iter(checkpoint.memory.values())))
