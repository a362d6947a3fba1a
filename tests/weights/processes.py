"""Trainers and inference ranks as processes of their own, led line by line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from types import TracebackType
from typing import Any, Protocol

CONFIG = {"peer_timeout": 3.0, "drain_timeout": 0.5}


class Place(Protocol):
    """Where a process is started."""

    def popen(self, command: Any, **options: Any) -> subprocess.Popen[Any]:
        """As `subprocess.Popen`."""
        ...


class Here:
    """This machine."""

    def popen(self, command: Any, **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(command, **options)


class Rank:
    """One process; `address`: of its engine."""

    def __init__(self, place: Place, options: dict[str, Any], *arguments: str) -> None:
        environ = f"WEIGHTS_RANK={json.dumps({'config': CONFIG, **options})}"
        command = ["env", environ, sys.executable, "-m", "tests.weights.rank", *arguments]
        self.process = place.popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=os.getcwd()
        )
        self._address = ""

    @property
    def address(self) -> str:
        self._address = self._address or self.hear()["address"]
        return self._address

    def tell(self, line: str) -> None:
        """One line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process has ended"
        found: dict[str, Any] = json.loads(line)
        return found

    def look(self) -> dict[str, Any]:
        """What a reader of an inference rank sees, once it is ready."""
        self.tell("look")
        return self.hear()

    def close(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # a line that it did not read
                pass


class World:
    """All processes of a test; they end with the block."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.ranks: list[Rank] = []
        self.trainers: list[Rank] = []

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for rank in self.ranks:
            rank.close()

    def _start(self, place: Place | None, *arguments: str, **options: Any) -> Rank:
        rank = Rank(place or Here(), {**self.options, **options}, *arguments)
        self.ranks.append(rank)
        return rank

    def train(self, *places: Place | None, **options: Any) -> list[Rank]:
        """A trainer rank at each place (None: this machine)."""
        self.trainers = [
            self._start(place, "trainer", str(rank), str(len(places)), **self._listen(place), **options)
            for rank, place in enumerate(places)
        ]
        members = json.dumps([trainer.address for trainer in self.trainers])
        for trainer in self.trainers:
            trainer.tell(members)
        return self.trainers

    def serve(self, instance: str, *places: Place | None, rank: int | None = None) -> list[Rank]:
        """An inference rank at each place; `rank`: of two, this one alone."""
        numbers = range(len(places)) if rank is None else [rank]
        of = len(places) if rank is None else 2
        made = [
            self._start(place, "server", instance, str(number), str(of), self.trainers[0].address, **self._listen(place))
            for number, place in zip(numbers, places, strict=True)
        ]
        for one in made:
            assert one.address
        return made

    @staticmethod
    def _listen(place: Place | None) -> dict[str, Any]:
        return {} if place is None else {"listen": place.listen}  # type: ignore[attr-defined]

    def enter(self, number: int, *, rate: float = math.inf) -> None:
        """All trainers are inside `publish`, writing at most `rate` bytes a second."""
        for trainer in self.trainers:
            trainer.tell(f"{number} {rate}")
        for trainer in self.trainers:
            assert trainer.hear() == {"entered": number}

    def leave(self, *without: Rank) -> list[dict[str, Any]]:
        """All trainers leave it; what each says of it."""
        staying = [trainer for trainer in self.trainers if trainer not in without]
        for trainer in staying:
            trainer.tell("leave")
        return [trainer.hear() for trainer in staying]

    def publish(self, number: int) -> list[dict[str, Any]]:
        """Both."""
        self.enter(number)
        return self.leave()
