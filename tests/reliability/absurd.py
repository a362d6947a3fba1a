"""Valid messages with absurd values: what does one of them cost its reader?

    python -m tests.reliability.absurd --runs 20000                   all targets (`make fuzz` runs it too)
    python -m tests.reliability.absurd --only control --seed 7        one target

The fuzzer of `fuzz.py` makes any bytes; here each message parses, or nearly, and says something that no honest peer says: a count
of 2^63, a name of 200,000 letters, ten thousand paths, a time that is no number. A target (`targets/`) is a reader of such
messages: a decoder alone, or a living engine. For each message the processor time of the whole process, the Python memory at its
peak, and the address space that stays mapped are watched, and that the reader goes on: an exception that nobody documented, one
that reaches the event loop, and a log line with a traceback are failures.

Every value of every valid message is replaced alone by each absurd value of its kind; then random pairs of values, from a seed.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import itertools
import logging
import math
import os
import random
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

Tree = Any  # of None, bool, int, float, str, bytes, lists and dictionaries
Take = Callable[[bytes], Awaitable[bool]]
Place = tuple[Any, ...]

MOST_SECONDS = 0.5  # of processor time, for one message
MOST_PEAK = 8 << 20  # of Python memory beside what the message itself takes
PEAK_PER_BYTE = 64  # a message of N bytes may cost so many times N: a list of small numbers, parsed
MOST_MAPPED = 128 << 20  # of address space that one message leaves behind
TIMEOUT = 20.0  # seconds: a reader that has not answered by then does not go on
PAGE = 4096
THREAD = 136 << 20  # what the C library maps for one: its stack, and an arena, for a moment twice as large


@dataclass(frozen=True)
class Target:
    """A reader of messages that somebody else wrote.

    `messages`: valid ones, as plain values; bytes that hold msgpack are looked into. `encode`: from such values to what travels;
    it may raise `ValueError` for what cannot be sent at all. `open`: sets the reader up and gives a coroutine function that hands
    it one message and returns whether it was taken (False: refused with the documented error). Anything else that it raises is
    a failure, and so is a reader that does not go on; a living reader is asked something ordinary after each message.
    """

    name: str
    what: str
    messages: Callable[[], Sequence[Tree]]
    encode: Callable[[Tree], bytes]
    open: Callable[[], AbstractAsyncContextManager[Take]]
    most_seconds: float = MOST_SECONDS
    most_peak: int = MOST_PEAK
    most_mapped: int = MOST_MAPPED


@dataclass
class Cost:
    """Of the messages of one target."""

    inputs: int = 0
    taken: int = 0
    seconds: float = 0.0  # the most for one message
    peak: int = 0
    mapped: int = 0


def alone(check: Callable[[bytes], bool]) -> Callable[[], AbstractAsyncContextManager[Take]]:
    """`open` of a decoder that needs nothing around it: `check` returns False for what it refuses."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Take]:
        async def take(data: bytes) -> bool:
            return check(data)

        yield take

    return opened


# ---- absurd values ----

INTEGERS = (-(1 << 63), -(1 << 31), -1, 0, 1, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, 1 << 62,
            (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
FLOATS = (0.0, -1.0, 1e-300, 1e9, 1e300, math.inf, -math.inf, math.nan)
TEXTS = ("", "x", "\0", "\u202e\n" * 50, "x" * 5000, "x" * 200_000, "0.0.0.0:0", "9" * 4000)
MANY = (100, 5000, 100_000)
DEEP = 200


def absurd(value: Tree) -> list[Callable[[], Tree]]:
    """What may stand in the place of one value; made when it is needed, as some is large."""
    found: list[Callable[[], Tree]] = [lambda: None, _nested]

    def many(make: Callable[[int], Tree], counts: Sequence[int]) -> None:
        found.extend(functools.partial(make, count) for count in counts)

    if isinstance(value, bool):
        found.append(lambda: not value)
    elif isinstance(value, int):
        many(lambda other: other, [other for other in INTEGERS if other != value])
    elif isinstance(value, float):
        many(lambda i: FLOATS[i], range(len(FLOATS)))
    elif isinstance(value, str):
        many(lambda i: TEXTS[i], range(len(TEXTS)))
        found.append(lambda: value * 3)
    elif isinstance(value, bytes):
        many(bytes, (0, 1, 1 << 16, 1 << 20))
        found += [lambda: value[: len(value) // 2], lambda: value * 2, lambda: b"\xff" * len(value)]
    elif isinstance(value, list):
        found += [list, lambda: value[: len(value) // 2], lambda: value * 2]
        many(lambda count: value[:1] * count, MANY if value else ())
        many(lambda other: [other] * 100, INTEGERS if value and isinstance(value[0], int) else ())
    elif isinstance(value, dict):
        keys = list(value)
        found.append(dict)
        many(lambda i: {key: value[key] for key in keys if key != keys[i]}, range(len(keys)))
        many(lambda count: value | {f"another {i}": 1 for i in range(count)}, MANY)
    return found


def _nested() -> Tree:
    nested: Tree = []
    for _ in range(DEEP):
        nested = [nested]
    return nested


def within(data: bytes) -> Tree:
    """What these bytes hold, when that is a list or a dictionary in msgpack; else None."""
    try:
        held = msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return held if isinstance(held, (list, dict)) and held else None


def places(tree: Tree) -> Iterator[Place]:
    """Where values stand; a step b"" leads into bytes."""
    yield ()
    if isinstance(tree, bytes) and (held := within(tree)) is not None:
        yield from ((b"", *place) for place in places(held))
    elif isinstance(tree, list):
        yield from ((i, *place) for i, value in enumerate(tree) for place in places(value))
    elif isinstance(tree, dict):
        yield from ((key, *place) for key, value in tree.items() for place in places(value))


def at(tree: Tree, place: Place) -> Tree:
    """What stands there."""
    for step in place:
        tree = within(tree) if step == b"" else tree[step]
    return tree


def put(tree: Tree, place: Place, value: Tree) -> Tree:
    """A copy with `value` there. Raises `LookupError` or `TypeError` when there is no such place."""
    if not place:
        return value
    step, rest = place[0], place[1:]
    if step == b"":
        return msgspec.msgpack.encode(put(within(tree), rest, value))
    copy = tree.copy()
    copy[step] = put(tree[step], rest, value)
    return copy


def variants(messages: Sequence[Tree], randomness: random.Random) -> Iterator[tuple[str, Tree]]:
    """Each valid message, then with one absurd value, then with two or three at a time, without end."""
    yield from (("as it is", message) for message in messages)
    every = [(message, [place for place in places(message) if place]) for message in messages]
    single = [(message, place, make) for message, there in every for place in there for make in absurd(at(message, place))]
    randomness.shuffle(single)  # a share of them is a fair one
    for message, place, make in single:
        value = make()
        yield f"{place} = {_short(value)}", put(message, place, value)
    while True:
        message, there = randomness.choice(every)
        said = []
        for place in randomness.sample(there, min(len(there), randomness.choice((2, 2, 3)))):
            try:
                value = randomness.choice(absurd(at(message, place)))()
                if isinstance(value, (list, dict)) and len(value) >= MANY[-1]:
                    continue  # alone it was enough: several make messages that nobody could send
                message = put(message, place, value)
            except (LookupError, TypeError, AttributeError):
                continue  # the one before has taken its place away
            said.append(f"{place} = {_short(value)}")
        yield " and ".join(said), message


def _short(value: Tree) -> str:
    if isinstance(value, (str, bytes, list, dict)) and len(value) > 20:
        return f"{type(value).__name__} of {len(value):,}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}..."


# ---- watching ----


class _Complaints(logging.Handler):
    """Log records that tell of an exception which nobody expected."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.found.append(logging.Formatter().format(record))


def _mapped() -> int:
    """Address space in use, without the stacks and arenas of threads."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * PAGE - len(os.listdir("/proc/self/task")) * THREAD


async def judge(target: Target, runs: int, seed: int) -> Cost:
    """Hand it so many messages. Raises `AssertionError` that names the message and what it cost."""
    cost, complaints = Cost(), _Complaints()
    loop, root = asyncio.get_running_loop(), logging.getLogger()
    loop.set_exception_handler(lambda _, context: complaints.found.append(f"{context['message']}: {context.get('exception')!r}"))
    root.addHandler(complaints)
    tracing = tracemalloc.is_tracing()
    try:
        async with target.open() as take:
            # As they are: what is made once only (threads, caches) is not the first message's, and they must be valid.
            valid = [await take(target.encode(message)) for message in target.messages()]
            assert any(valid), f"{target.name}: none of its own messages is valid"
            tracemalloc.start()
            for said, tree in itertools.islice(variants(target.messages(), random.Random(seed)), runs):
                try:
                    data = target.encode(tree)
                except (ValueError, TypeError, OverflowError, RecursionError):
                    continue  # cannot be sent
                where = f"{target.name}, seed {seed}: {said}"
                await _one(target, take, data, where, cost)
                assert not complaints.found, f"{where}: {complaints.found[0]}"
    finally:
        if not tracing:
            tracemalloc.stop()
        root.removeHandler(complaints)
        loop.set_exception_handler(None)
    assert not complaints.found, f"{target.name}, seed {seed}, at the end: {complaints.found[0]}"
    return cost


async def _taken(take: Take, data: bytes, where: str) -> tuple[bool, int]:
    """Whether it was taken, and the address space that it left behind."""
    mapped = _mapped()
    try:
        async with asyncio.timeout(TIMEOUT):
            taken = await take(data)
    except Exception as error:
        raise AssertionError(f"{where}: {error!r}") from error
    return taken, _mapped() - mapped


async def _one(target: Target, take: Take, data: bytes, where: str, cost: Cost) -> None:
    tracemalloc.reset_peak()
    held, begun = tracemalloc.get_traced_memory()[0], time.process_time()
    taken, growth = await _taken(take, data, where)
    seconds = time.process_time() - begun
    peak = tracemalloc.get_traced_memory()[1] - held
    if growth > target.most_mapped:  # what a message costs it costs again; an arena of a thread that has ended stays once
        gc.collect()
        _, growth = await _taken(take, data, where)
    assert seconds <= target.most_seconds, f"{where}: {len(data):,} bytes took {seconds:.2f} s"
    assert peak <= target.most_peak + PEAK_PER_BYTE * len(data), f"{where}: {len(data):,} bytes took {peak >> 20} MiB at the peak"
    assert growth <= target.most_mapped, f"{where}: {len(data):,} bytes left {growth >> 20} MiB mapped"
    cost.inputs += 1
    cost.taken += taken
    cost.seconds, cost.peak, cost.mapped = max(cost.seconds, seconds), max(cost.peak, peak), max(cost.mapped, growth)


def row(target: Target, cost: Cost) -> str:
    """One line of the report."""
    return (
        f"| {target.name} | {target.what} | {cost.inputs:,} | {cost.taken:,} | {cost.seconds * 1e3:.1f} ms "
        f"| {cost.peak / (1 << 20):.1f} MiB | {cost.mapped / (1 << 20):.1f} MiB |"
    )


def report(runs: int, seed: int, chosen: Sequence[Target]) -> str:
    """The part of the page that tells of these. Raises `AssertionError` for the first failure."""
    lines = []
    for target in chosen:
        lines.append(row(target, asyncio.run(judge(target, -(-runs // len(chosen)), seed))))
        print(lines[-1], flush=True)
    text = "\n".join(lines)
    return f"""## Valid messages with absurd values

Written by the same command (`python -m tests.reliability.absurd --runs {runs} --seed {seed}`).

Every value of every valid message is replaced by absurd ones of its kind, alone and then several at a time: counts up to 2^64,
names of 200,000 letters, lists of 100,000, times that are no number. A reader may use {MOST_SECONDS} s of processor
time for one message, {MOST_PEAK >> 20} MiB of Python memory beside {PEAK_PER_BYTE} times the
message, and leave {MOST_MAPPED >> 20} MiB mapped;
it must go on, and raise nothing but the documented error.

| reader | messages of | inputs | taken | slowest | memory at the peak | left mapped |
|---|---|--:|--:|--:|--:|--:|
{text}
"""


def main() -> int:
    """The command."""
    from tests.reliability.targets import TARGETS

    parser = argparse.ArgumentParser(prog="tests.reliability.absurd")
    parser.add_argument("--runs", type=int, default=20_000, help="messages, over all targets")
    parser.add_argument("--seed", type=int, help="default: random, printed")
    parser.add_argument("--only", help="one target")
    arguments = parser.parse_args()
    seed = random.randrange(1, 1 << 31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    print(report(arguments.runs, seed, [target for target in TARGETS if arguments.only in (None, target.name)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
