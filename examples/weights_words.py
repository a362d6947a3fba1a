"""The small model of `weights_ray.py` and `weights_torchrun.py`: which word comes next, by the last word and by the one before.

Two square tables, of NumPy alone. A row belongs to a word that was read, a column to a word that may come next. Trainer ranks
hold rows, so each learns its rows without the others; inference ranks hold columns, as in a head that is cut by the vocabulary.
A third tensor carries digests of the other two, one for each trainer rank and inference rank. So an inference rank can tell by a
version itself whether all of it has come, and whether all is of the same version.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from aiotransfer.weights import Layout, Tensor, sharded

WORDS = 509  # a prime number: no number of ranks divides it
TRAINERS, SERVERS = 2, 2  # ranks of all trainers, and of one inference instance
DISTANCES = {"last": 1, "before": 2}
TENSORS = [Tensor(name, (WORDS, WORDS), "float32") for name in DISTANCES]
TENSORS.append(Tensor("digest", (TRAINERS, SERVERS, 32), "uint8"))
BEGINNING = "the", "value"


def trainer_layout() -> Layout:
    """Rows."""
    return Layout(TENSORS, [piece for tensor in TENSORS for piece in sharded(tensor, range(TRAINERS))], ranks=TRAINERS)


def server_layout() -> Layout:
    """Columns."""
    return Layout(TENSORS, [piece for tensor in TENSORS for piece in sharded(tensor, range(SERVERS), 1)], ranks=SERVERS)


def chunk(size: int, parts: int, part: int) -> tuple[int, int]:
    """(start, stop) of one part of `size` rows, cut as `sharded` and `torch.chunk` cut them: the last part has what is left."""
    step = -(-size // parts)
    return min(part * step, size), min((part + 1) * step, size)


def text() -> tuple[list[str], Any]:
    """Words, and Python's own help as their numbers; 0 stands for words that are too rare."""
    found = re.findall(r"[a-z]+", " ".join(topics[name] for name in sorted(topics)).lower())
    common = sorted(Counter(found).items(), key=lambda item: (-item[1], item[0]))[: WORDS - 1]
    words = ["?", *(word for word, _ in common)]
    number = {word: k for k, word in enumerate(words)}
    return words, np.array([number.get(word, 0) for word in found])


class Learner:
    """What a trainer rank holds: its rows of both tables, in `memory`, which is changed in place."""

    def __init__(self, rank: int) -> None:
        rows = slice(*chunk(WORDS, TRAINERS, rank))
        numbers = text()[1]
        random = np.random.default_rng(rank)
        self.memory: dict[str, Any] = {}
        self._seen = {}
        for name, distance in DISTANCES.items():
            pairs = np.zeros((WORDS, WORDS), np.float32)
            first, then = numbers[:-distance], numbers[distance:]
            np.add.at(pairs, (first[then > 0], then[then > 0]), 1)
            self._seen[name] = pairs[rows]
            self.memory[name] = random.normal(0, 2, pairs[rows].shape).astype(np.float32)
        self.memory["digest"] = np.zeros((1, SERVERS, 32), np.uint8)
        self._sign()

    def train(self, steps: int) -> float:
        """The loss after `steps` of gradient descent, a word."""
        for _ in range(steps):
            for name, seen in self._seen.items():
                share = seen / np.maximum(seen.sum(1, keepdims=True), 1)
                self.memory[name] += 20 * (share - self._chances(name)) * (share.sum(1, keepdims=True) > 0)
        self._sign()
        return float(np.mean([self._loss(name) for name in DISTANCES]))

    def _chances(self, name: str) -> Any:
        table = self.memory[name]
        chances = np.exp(table - table.max(1, keepdims=True))
        return chances / chances.sum(1, keepdims=True)

    def _loss(self, name: str) -> float:
        seen = self._seen[name]
        return float(-(seen * np.log(self._chances(name) + 1e-9)).sum() / seen.sum())

    def _sign(self) -> None:
        for rank in range(SERVERS):
            columns = slice(*chunk(WORDS, SERVERS, rank))
            self.memory["digest"][0, rank] = digest([self.memory[name][:, columns] for name in DISTANCES])


def digest(parts: list[Any]) -> Any:
    """Of the bytes of some arrays."""
    return np.frombuffer(hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest(), np.uint8)


def unequal(tensors: Mapping[str, Any], rank: int) -> list[str]:
    """Which trainer ranks' rows of a version at inference rank `rank` are not what those ranks signed; empty when all are."""
    found = []
    for trainer in range(TRAINERS):
        rows = slice(*chunk(WORDS, TRAINERS, trainer))
        if not np.array_equal(digest([tensors[name][rows] for name in DISTANCES]), tensors["digest"][trainer, 0]):
            found.append(f"trainer {trainer}")
    return found


def best(tensors: Mapping[str, Any], rank: int, before: int, last: int) -> tuple[float, int]:
    """The likeliest next word among the columns of an inference rank: its score and its number."""
    scores = tensors["last"][last] + tensors["before"][before]
    first = chunk(WORDS, SERVERS, rank)[0]
    scores = scores if first else scores[1:]  # never the word that stands for rare ones
    at = int(scores.argmax())
    return float(scores[at]), at + max(first, 1)
