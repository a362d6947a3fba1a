"""The accesses of threads without a common lock: in no order that a processor may choose is a count lost or a write let through.

The sequences and their memory orders come from our C (orders.py). What they shall ensure is said here, once for each.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable

import pytest

from tests.native.orders import Access, Impossible, Memory, Step, accesses_of, outcomes, sequences, sources, weakened

OLD, NEW = 1, 2  # values of an immediate
MARKS = ("bitmap", "summary", "dirty")
Path = frozenset[str]  # the way that a writer takes: by the marks that are there already
PATHS = [frozenset(there) for n in range(4) for there in itertools.combinations(MARKS, n)]
PLAIN = "relaxed"  # memory that is no atomic: as weak as can be


class Code:
    """The sequences, some of them perhaps weakened, as steps that do something."""

    def __init__(self, weak: Iterable[tuple[str, int]] = ()) -> None:
        self.sequences = {
            name: [weakened(access) if (name, i) in weak else access for i, access in enumerate(steps)]
            for name, steps in sequences().items()
        }

    def steps(self, name: str, *does: Callable[[Memory], None]) -> list[Step]:
        accesses = self.sequences[name]
        assert len(accesses) == len(does)
        return [Step(access, do) for access, do in zip(accesses, does, strict=True)]

    # ---- what the sequences do ----

    def name(self) -> list[Step]:
        return self.steps("name", put("imm", NEW))

    def count(self, there: Path, total: int = 1, rings: bool = True) -> list[Step]:
        """`there`: the marks that the writer finds, and does not make."""

        def find(word: str) -> Callable[[Memory], None]:
            def load(m: Memory) -> None:
                if bool(m[word]) != (word in there):
                    raise Impossible

            return load

        def swap(m: Memory) -> None:
            m.update(was=m["dirty"], dirty=1)

        def look(m: Memory) -> None:
            m["looks"] = m["armed"]

        steps = self.steps(
            "count", put("count", total), find("bitmap"), put("bitmap", 1), find("summary"), put("summary", 1), find("dirty"),
            swap, look,
        )  # fmt: skip
        made = [step for step in steps if step.access.kind not in ("or", "swap") or step.access.word not in there]
        return made if rings and "dirty" not in there else made[:-1]

    def drain(self) -> list[Step]:
        def clear(m: Memory) -> None:
            if m["o.dirty"]:
                m["dirty"] = 0

        def words(m: Memory) -> None:
            if m["o.dirty"] and m["o.summary"]:
                m["summary"] = 0

        def bits(m: Memory) -> None:
            marked = m["o.dirty"] and m["o.summary"]
            m["o.bits"] = marked and m["bitmap"]
            if marked:
                m["bitmap"] = 0

        return self.steps("drain", get("dirty"), clear, get("summary"), words, bits)

    def take(self) -> list[Step]:
        def drained(m: Memory) -> None:
            m["drained"] = m["o.count"]

        return self.steps("take", get("count"), get("imm"), drained)

    def enter(self) -> list[Step]:
        return self.steps("enter", put("grant", 1), get("barred", "w"), get("word", "w"))

    def leave(self) -> list[Step]:
        return self.steps("leave", put("grant", 0))


def put(word: str, value: int) -> Callable[[Memory], None]:
    return lambda m: m.update({word: value})


def get(word: str, who: str = "o") -> Callable[[Memory], None]:
    return lambda m: m.update({f"{who}.{word}": m[word]})


def nothing(memory: Memory) -> None:
    """What a fence does to memory."""


def plain(kind: str, word: str, do: Callable[[Memory], None]) -> Step:
    return Step(Access(kind, word, PLAIN), do)


def allowed(m: Memory) -> bool:
    return m["w.word"] == 0 and m["w.barred"] == 0


def rung(m: Memory) -> bool:
    return m.get("was") == 0 and m["looks"] != 0


def is_marked(m: Memory) -> bool:
    return bool(m["dirty"] and m["summary"] and m["bitmap"])


def is_seen(m: Memory) -> bool:
    return bool(m["o.bits"] and m["o.count"])


def not_lost(m: Memory) -> bool:
    """What was counted is seen now, whole and under its own name; or it is marked and somebody has rung."""
    if is_seen(m):
        return m["o.imm"] == NEW and m["o.data"] == 1
    return is_marked(m) and rung(m)


WORDS = dict.fromkeys(
    ("count", "data", "bitmap", "summary", "dirty", "armed", "drained", "grant", "word", "barred", "missed", "turn", "work"), 0
) | {"imm": OLD}


def ways(start: Memory, writer: Callable[[Path], list[Step]], owner: list[Step]) -> list[Memory]:
    """The outcomes of all ways that a writer may take."""
    return [end for there in PATHS for end in outcomes(start, [writer(there), owner])]


# ---- the promises: each takes the code and returns the outcomes that break it ----


def counted_while_drained(code: Code) -> list[Memory]:
    """The owner is looking, for an earlier count, while the next one comes."""
    first = [plain("store", "data", put("data", 1)), *code.name()]
    owner = [*code.drain(), *code.take(), plain("load", "data", get("data"))]
    ends = ways(WORDS | {"dirty": 1, "summary": 0, "armed": 1}, lambda there: [*first, *code.count(there)], owner)
    return [m for m in ends if not not_lost(m)]


def counted_before_sleep(code: Code) -> list[Memory]:
    """The owner arms, looks once more, and sleeps."""
    first = [plain("store", "data", put("data", 1)), *code.name()]
    owner = [*code.steps("arm", put("armed", 1)), *code.drain(), *code.take(), plain("load", "data", get("data"))]
    return [m for m in ways(WORDS, lambda there: [*first, *code.count(there)], owner) if not not_lost(m)]


def counted_twice(code: Code) -> list[Memory]:
    """The second of two counts of one writer, while the owner looks for the first."""
    def writer(there: Path) -> list[Step]:
        return [*code.count(frozenset(), 1, rings=False), plain("store", "data", put("data", 2)), *code.count(there, 2)]

    owner = [*code.steps("arm", put("armed", 1)), *code.drain(), *code.take(), plain("load", "data", get("data"))]

    def is_right(m: Memory) -> bool:
        return m["o.data"] == 2 if m["o.bits"] and m["o.count"] == 2 else is_marked(m)

    return [m for m in ways(WORDS, writer, owner) if not is_right(m)]


def counted_while_marked(code: Code) -> list[Memory]:
    """An earlier count is marked, and the owner has been rung for it, while the next one comes."""
    first = [plain("store", "data", put("data", 1))]
    owner = [*code.drain(), *code.take(), plain("load", "data", get("data"))]
    start = WORDS | dict.fromkeys(("count", "armed", *MARKS), 1)

    def is_right(m: Memory) -> bool:
        return m["o.data"] == 1 if m["o.bits"] and m["o.count"] == 2 else is_marked(m) and rung(m)

    return [m for m in ways(start, lambda there: [*first, *code.count(there, 2)], owner) if not is_right(m)]


def name_of_what_was_taken(code: Code) -> list[Memory]:
    """A slot gets another name while the owner takes what came by the old one."""

    def drained(m: Memory) -> None:
        m["w.free"] = m["drained"] == 1

    def name(m: Memory) -> None:
        if m["w.free"]:
            m["imm"] = NEW

    def count(m: Memory) -> None:
        if m["w.free"]:
            m["count"] = 2

    writer = [*code.steps("recycle", drained), *code.steps("name", name), Step(code.sequences["count"][0], count)]
    ends = outcomes(WORDS | {"count": 1}, [writer, code.take()])
    return [m for m in ends if (m["o.imm"] == OLD) != (m["o.count"] == 1)]


def _written(code: Code, forbid: list[Step], look: list[Step]) -> list[Memory]:
    def store(m: Memory) -> None:
        if allowed(m):
            m["data"] = 1

    def reuse(m: Memory) -> None:
        if not m["o.grant"]:
            m["data"] = 7

    writer = [*code.enter(), plain("store", "data", store), *code.leave()]
    owner = [*forbid, *look, plain("store", "data", reuse)]
    return [m for m in outcomes(WORDS, [writer, owner]) if not m["o.grant"] and m["data"] != 7]


def written_under_a_revoked_grant(code: Code) -> list[Memory]:
    return _written(code, code.steps("revoke", put("word", 1)), code.steps("look", get("grant")))


def written_by_whom_was_barred(code: Code) -> list[Memory]:
    return _written(code, code.steps("bar", put("barred", 1)), code.steps("inside", get("grant")))


def counted_under_a_revoked_grant(code: Code) -> list[Memory]:
    """Once the owner has found nobody inside, what it drains is final."""

    def guarded(step: Step) -> Step:
        return Step(step.access, lambda m: step.do(m) if allowed(m) else None)

    def writer(there: Path) -> list[Step]:
        return [*code.enter(), *map(guarded, code.count(there, rings=False)), *code.leave()]

    owner = [*code.steps("revoke", put("word", 1)), *code.steps("look", get("grant")), *code.drain(), *code.take()]
    ends = ways(WORDS, writer, owner)
    return [m for m in ends if not m["o.grant"] and m["count"] == 1 and not is_seen(m)]


def turned_away(code: Code) -> list[Memory]:
    """Who leaves something to do and does not get the turn: it is done, or who had the turn looks again."""

    def lock(m: Memory) -> None:
        m["w.got"] = m["turn"] == 0
        m["turn"] = 1

    def swap(m: Memory) -> None:
        m.update({"o.missed": m["missed"], "missed": 0})

    asks = [plain("store", "work", put("work", 1)), *code.steps("turn wanted", put("missed", 1), nothing, lock)]
    over = [plain("load", "work", get("work")), *code.steps("turn over", put("turn", 0), swap)]
    return [m for m in outcomes(WORDS | {"turn": 1}, [asks, over]) if not (m["w.got"] or m["o.work"] or m["o.missed"])]


PROMISES = (
    counted_while_drained, counted_before_sleep, counted_twice, counted_while_marked, name_of_what_was_taken,
    written_under_a_revoked_grant, written_by_whom_was_barred, counted_under_a_revoked_grant, turned_away,
)  # fmt: skip


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_no_order_breaks_the_promise(promise: Callable[[Code], list[Memory]]) -> None:
    broken = promise(Code())
    assert not broken, broken[0]


@pytest.mark.parametrize(
    ("promise", "weak"),
    [
        (counted_while_drained, ["drain 3"]), (counted_while_drained, ["drain 2"]), (counted_before_sleep, ["drain 1"]),
        (counted_before_sleep, ["arm 1"]), (counted_before_sleep, ["count 8"]), (counted_twice, ["count 1"]),
        (counted_twice, ["take 1"]), (counted_while_marked, ["count 1"]), (counted_while_marked, ["count 2"]),
        (counted_while_marked, ["take 1"]),
        (counted_before_sleep, ["name 1", "count 1", "count 3", "count 5", "count 7"]),
        (name_of_what_was_taken, ["take 3"]), (written_under_a_revoked_grant, ["enter 1"]),
        (written_under_a_revoked_grant, ["enter 2", "enter 3"]), (written_under_a_revoked_grant, ["revoke 1"]),
        (written_under_a_revoked_grant, ["look 1"]), (written_under_a_revoked_grant, ["leave 1"]),
        (written_by_whom_was_barred, ["enter 2"]), (written_by_whom_was_barred, ["bar 1"]),
        (written_by_whom_was_barred, ["inside 1"]), (counted_under_a_revoked_grant, ["leave 1"]),
        (counted_under_a_revoked_grant, ["look 1"]), (turned_away, ["turn wanted 2"]),
    ],
)  # fmt: skip
def test_each_order_is_needed(promise: Callable[[Code], list[Memory]], weak: tuple[str, ...]) -> None:
    steps = [(step[:-2], int(step[-1]) - 1) for step in weak]
    assert promise(Code(steps)), f"{promise.__name__} does not notice that {weak} order nothing"


def test_every_access_that_is_weaker_takes_part_or_says_why_it_stands_alone() -> None:
    silent = []
    for where, line in sources():
        weak = [order for kind, _, order in accesses_of(line) if order != "seq_cst" and kind not in ("lock", "unlock")]
        if (weak or "memory_order_" in line.split("/*", 1)[0]) and not re.search(r"/\* order: (alone: \w|.+ \d)", line):
            silent.append(where)
    assert not silent, silent


def test_the_model_knows_what_arm64_does() -> None:
    """Store, then look at the other's: with a relaxed load both may see nothing; with sequentially consistent ones never."""
    for order, both in (("relaxed", True), ("acquire", True), ("seq_cst", False)):
        threads = [
            [Step(Access("store", mine, "seq_cst"), put(mine, 1)), Step(Access("load", yours, order), get(yours, mine))]
            for mine, yours in (("a", "b"), ("b", "a"))
        ]
        ends = outcomes({"a": 0, "b": 0}, threads)
        assert any(m["a.b"] == m["b.a"] == 0 for m in ends) == both, order
