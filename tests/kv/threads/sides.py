"""A prefill and a decode side whose engines step in this thread, while their loops run in others; for tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiotransfer as at
from aiotransfer import kv
from tests.kv.party import Rank, rank, small
from tests.kv.protocol.reference import Bytes

SECONDS = 30.0  # of every wait


def until(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Return when `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.001)


def collect(face: kv.DecoderThread | kv.PrefillerThread, ids: set[str]) -> dict[str, kv.Finished]:
    """Take what has finished until all of these are named. Each is named once."""
    found: dict[str, kv.Finished] = {}

    def look() -> bool:
        for one in face.take_finished():
            assert one.id not in found
            found[one.id] = one
        return set(found) >= ids

    until(look)
    assert set(found) == ids
    assert not face.take_finished()
    return found


@dataclass
class Sides:
    """One rank of each side; `here` prefills, `there` decodes."""

    left: at.EngineThread
    right: at.EngineThread
    here: Rank
    there: Rank
    prefiller: kv.PrefillerThread
    decoder: kv.DecoderThread
    address: str
    served: dict[str, Bytes] = field(default_factory=dict)

    def ask(self, id: str, pages: list[int], tokens: int, **options: Any) -> None:
        self.decoder.start(self.address, id, pages, tokens=tokens, **({"timeout": SECONDS} | options))

    def send(self, id: str, pages: list[int], cache: Bytes, tokens: int) -> None:
        """What an engine does whose model has run."""
        self.here.fill(pages, cache, tokens)
        self.prefiller.start(id, pages, timeout=SECONDS)
        self.prefiller.finish(id, b"first token")

    def free(self) -> bool:
        """Whether nothing is left of any request."""
        return not self.prefiller.prefiller.requests and not self.decoder.decoder.held


@contextmanager
def sides(
    layout: kv.KVLayout | None = None, *, providers: str = "loopback", prefill_options: dict[str, Any] | None = None,
    decode_options: dict[str, Any] | None = None, **options: Any,
) -> Iterator[Sides]:  # fmt: skip
    """`options` are those of `PrefillerThread`."""
    layout = layout or small()
    with (
        at.run_in_thread(providers=providers, name="prefill") as left,
        at.run_in_thread(providers=providers, name="decode") as right,
    ):

        async def prefill() -> tuple[Rank, kv.Prefiller]:
            here = rank(left.engine, layout)
            return here, kv.Prefiller(left.engine, layout, here.region, **(prefill_options or {}))

        async def decode() -> tuple[Rank, kv.Decoder]:
            there = rank(right.engine, layout)
            return there, kv.Decoder(right.engine, layout, there.region, **(decode_options or {}))

        (here, prefiller), (there, decoder) = left.run(prefill()), right.run(decode())
        with kv.PrefillerThread(left, prefiller, **options) as sending, kv.DecoderThread(right, decoder) as loading:
            yield Sides(left, right, here, there, sending, loading, str(left.engine.address))
