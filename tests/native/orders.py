"""The steps of ffi/lane/orders.h with the memory orders of the C, and every order in which two threads may carry them out.

Two steps of one thread stay in order where the first acquires, the second releases, both are sequentially consistent, one is a
full fence, or both are of one variable. Others may change places: that is what the C standard allows, and what ARMv8 does. A
read-modify-write is a load and a store that no other thread's store comes between; what follows it may come between. Memory
itself is one, as on x86 and ARMv8: a store is seen by all others at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

FFI = Path(__file__).parent.parent.parent / "ffi"
HEADER = FFI / "lane" / "orders.h"
CALL = re.compile(
    r"(?P<atomic>atomic_(?P<what>load|store|exchange|fetch_\w+?|thread_fence)(?P<explicit>_explicit)?\()"
    r"|pthread_mutex_(?P<mutex>trylock|unlock)\("
)
KINDS = {"load": "load", "store": "store", "exchange": "swap", "thread_fence": "fence", "trylock": "lock", "unlock": "unlock"}
ORDERS = ("relaxed", "acquire", "release", "acq_rel", "seq_cst")
Memory = dict[str, int]


@dataclass(frozen=True)
class Access:
    """One step: what it does (`load`, `store`, `swap`, `or`, `fence`, `lock`, `unlock`), to what, how strongly, where."""

    kind: str
    word: str
    order: str
    line: str = ""

    @property
    def reads(self) -> bool:
        return self.kind in ("load", "swap", "or", "lock", "hold")

    @property
    def writes(self) -> bool:
        return self.kind in ("store", "swap", "or", "lock", "unlock")

    @property
    def acquires(self) -> bool:
        return self.reads and self.order in ("acquire", "acq_rel", "seq_cst")

    @property
    def releases(self) -> bool:
        return self.writes and self.order in ("release", "acq_rel", "seq_cst")


def accesses_of(line: str) -> list[tuple[str, str, str]]:
    """The accesses of a line of C, in order: kind, the text of its arguments, memory order."""
    code = line.split("/*", 1)[0]
    found = []
    for match in CALL.finditer(code):
        depth, end = 1, match.end()
        while depth and end < len(code):
            depth += {"(": 1, ")": -1}.get(code[end], 0)
            end += 1
        arguments = code[match.end() : end - 1]
        if match["mutex"]:
            found.append((KINDS[match["mutex"]], arguments, "acquire" if match["mutex"] == "trylock" else "release"))
            continue
        named = re.search(r"memory_order_(\w+)", arguments)
        kind = KINDS.get(match["what"]) or match["what"].removeprefix("fetch_")
        found.append((kind, arguments, named[1] if named else "seq_cst"))
    return found


def sources() -> Iterator[tuple[str, str]]:
    """Every line of our C, with where it stands."""
    for file in sorted(FFI.glob("*/*.[ch]")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            yield f"{file.relative_to(FFI)}:{number}", line


def promised() -> dict[str, list[tuple[str, str]]]:
    """What orders.h says: the steps of each sequence, as kind and word."""
    return {
        name: [(step.split()[0], step.split()[-1]) for step in steps.split(", ")]
        for name, steps in re.findall(r"^ \*   sequence ([a-z ]+): (.+)$", HEADER.read_text(), re.M)
    }


def sequences() -> dict[str, list[Access]]:
    """The sequences with the memory orders that the code gives them. Raises `AssertionError` where code and header differ."""
    wanted = promised()
    found: dict[tuple[str, int], Access] = {}
    for where, line in sources():
        comment = re.search(r"/\* order: (.+?) \*/", line)
        if comment is None or comment[1].startswith(("alone: ", "SEQUENCE")):
            continue
        names = re.findall(r"([a-z ]+?) (\d+)(?:, |$)", comment[1])
        here = accesses_of(line)
        assert len(names) == len(here), f"{where}: {len(here)} accesses, and {comment[1]!r}"
        for (name, step), (kind, arguments, order) in zip(names, here, strict=True):
            key = name.strip(), int(step)
            assert key[0] in wanted, f"{where}: orders.h has no sequence {key[0]!r}"
            assert key not in found, f"{where}: step {step} of {key[0]!r} stands elsewhere too"
            assert 1 <= key[1] <= len(wanted[key[0]]), f"{where}: {key[0]!r} has no step {step}"
            says, word = wanted[key[0]][key[1] - 1]
            assert kind == says, f"{where}: orders.h says {says} {word}"
            assert kind == "fence" or re.search(rf"\b{word}\b", arguments), f"{where}: orders.h says {word}"
            found[key] = Access(kind, "" if kind == "fence" else word, order, where)
    missing = [(name, step + 1) for name, steps in wanted.items() for step in range(len(steps)) if (name, step + 1) not in found]
    assert not missing, f"no line says that it is {missing}"
    return {name: [found[name, step + 1] for step in range(len(steps))] for name, steps in wanted.items()}


# ---- trying all orders ----


class Impossible(Exception):
    """Raised by a step that finds what its thread was said not to find: it would have gone another way."""


@dataclass(frozen=True)
class Step:
    """An access, and what it does to memory and to what its thread has loaded (names of its own in the same dictionary)."""

    access: Access
    do: Callable[[Memory], None]


def may_pass(first: Access, second: Access) -> bool:
    """Whether the second of two steps of one thread may take effect before the first."""
    if any(one.kind == "fence" and one.order == "seq_cst" for one in (first, second)):
        return False
    if first.word == second.word != "":
        return False
    if first.order == second.order == "seq_cst":
        return False
    return not first.acquires and not second.releases


def halves(step: Step, thread: int) -> list[Step]:
    """A read-modify-write as a load that keeps others' stores away, and the store."""
    access = step.access
    if not (access.reads and access.writes):
        return [step]
    held = f"held {access.word}"

    def end(memory: Memory) -> None:
        step.do(memory)
        del memory[held]

    loads = "relaxed" if access.order == "release" else access.order
    stores = "relaxed" if access.order == "acquire" else access.order
    return [
        Step(replace(access, kind="hold", order=loads), lambda memory: memory.update({held: thread})),
        Step(replace(access, kind="store", order=stores), end),
    ]


def waits(step: Step, memory: Memory, thread: int) -> bool:
    """Whether another thread is between the halves of a read-modify-write of the word that this one would change."""
    changes = step.access.writes or step.access.kind == "hold"
    return changes and memory.get(f"held {step.access.word}", thread) != thread


def outcomes(start: Memory, threads: Sequence[Sequence[Step]]) -> list[Memory]:
    """How memory may look when all have ended."""
    parts = [[half for step in steps for half in halves(step, t)] for t, steps in enumerate(threads)]
    before = [[sum(1 << i for i in range(j) if not may_pass(steps[i].access, steps[j].access)) for j in range(len(steps))]
              for steps in parts]  # fmt: skip
    seen: set[tuple[tuple[int, ...], tuple[tuple[str, int], ...]]] = set()
    ends: dict[tuple[tuple[str, int], ...], Memory] = {}
    stack: list[tuple[tuple[int, ...], Memory]] = [(tuple(0 for _ in threads), dict(start))]
    while stack:
        done, memory = stack.pop()
        frozen = tuple(sorted(memory.items()))
        if (done, frozen) in seen:
            continue
        seen.add((done, frozen))
        more = False
        for t, steps in enumerate(parts):
            for j, step in enumerate(steps):
                if done[t] >> j & 1 or before[t][j] & ~done[t] or waits(step, memory, t):
                    continue
                after = dict(memory)
                try:
                    step.do(after)
                except Impossible:
                    more = True
                    continue
                except KeyError:  # it depends on what another step of its thread has to load first
                    continue
                more = True
                stack.append((tuple(d | (1 << j) if k == t else d for k, d in enumerate(done)), after))
        if not more:
            ends[frozen] = memory
    return list(ends.values())


def weakened(access: Access) -> Access:
    """The same, as weak as it can be said."""
    return replace(access, order="relaxed")
