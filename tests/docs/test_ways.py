"""The page that follows six operations through the code: every arrow is one of the sources', and one that is not is seen."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.docs import arrows
from tests.docs.arrows import Step

PAGE = Path(__file__).parent.parent.parent / "docs" / "development" / "six-ways.md"
WAYS = {way.partition("\n")[0]: way for way in PAGE.read_text().split("\n## ")[1:]}
ASKED_FOR = (
    "A write",
    "A page table",
    "The revoke of a lease",
    "An inbound lookup",
    "A request for a KV cache",
    "A dispatch of an all-to-all",
)


@functools.cache
def sources() -> dict[str, str]:
    return arrows.tree()


def faults(way: str, tree: Mapping[str, str]) -> list[str]:
    return [fault for part in way.split("\n### ") for fault in arrows.faults(part, tree)]


def steps_of(way: str) -> list[Step]:
    return [step for part in way.split("\n### ") for step in arrows.steps(part)[0]]


def renamed_in(files: Mapping[str, str], path: str, name: str) -> dict[str, str]:
    return {**files, path: re.sub(rf"\b{name}\b", f"{name}_of_old", files[path])}


def test_the_page_has_the_six_ways() -> None:
    assert tuple(WAYS) == ASKED_FOR
    for way in WAYS.values():
        files = {place.path for step in steps_of(way) for place in (step.source, step.target)}
        assert len(files) >= 6, "a way leads through several files"


@pytest.mark.parametrize("way", WAYS)
def test_every_arrow_is_one_of_the_sources(way: str) -> None:
    found = faults(WAYS[way], sources())
    assert not found, "\n".join([f"{PAGE.name}, {way!r}:", *found])


@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_was_renamed_is_seen(way: str) -> None:
    """For every arrow: its target renamed in its file, then the name at which the source reaches it."""
    for step in steps_of(WAYS[way]):
        folder = step.target.path.rpartition("/")[0]  # a table of C may stand in another file of it
        files = {path: text for path, text in sources().items() if path == step.source.path or path.rpartition("/")[0] == folder}
        assert arrows.broken(step, files) == []
        name = step.target.name.rpartition(".")[2]
        renamed = renamed_in(files, step.target.path, name)
        assert any(f"{step.target} is not there" in fault for fault in arrows.broken(step, renamed)), step
        assert arrows.broken(step, renamed_in(files, step.source.path, step.by or name)), step


CODE = {
    "aiotransfer/engine/a.py": "from aiotransfer.core.b import B\n\ndef go(b): b.work()\n\ndef back(): return EVENT\n",
    "aiotransfer/core/b.py": "class B:\n    def work(self): return work.EVENT\n\n    def on(self, a): a.call(go)\n",
    "ffi/lane/l.c": "/* x */\nint at_l(int n) {\n    return peer->port->move(n) + AT_EV;\n}\n",
    "ffi/shm/s.c": "/* x */\nstatic int s(int n) { return n; }\n\nconst t at_t = {\n    .move = s,\n};\n",
}
GO = "- `aiotransfer/engine/a.py` `go` calls `aiotransfer/core/b.py` `B.work`: down."
BY_TABLE = "- `ffi/lane/l.c` `at_l` leads by `move` to `ffi/shm/s.c` `s`: a function of the port."


def test_a_call_goes_down_and_only_a_name_leads_up() -> None:
    assert arrows.faults(GO, CODE) == []
    up = "- `aiotransfer/core/b.py` `B.on` calls `aiotransfer/engine/a.py` `go`: up."
    beneath = "aiotransfer/core/b.py B.on lies beneath aiotransfer/engine/a.py go: a call cannot go there"
    assert arrows.faults(up, CODE) == [beneath]
    by_name = "- `aiotransfer/core/b.py` `B.work` leads by `EVENT` to `aiotransfer/engine/a.py` `back`: an event."
    assert arrows.faults(by_name, CODE) == []
    assert arrows.faults(BY_TABLE, CODE) == []
    assert arrows.faults(BY_TABLE.replace("leads by `move` to", "calls"), CODE) == [
        "ffi/lane/l.c at_l does not name s",
        "ffi/lane/l.c at_l lies beneath ffi/shm/s.c s: a call cannot go there",
    ]


def test_a_step_that_follows_from_none_or_has_another_form_is_said() -> None:
    assert arrows.faults(f"{GO}\n{BY_TABLE}", CODE) == ["no step before leads to ffi/lane/l.c at_l"]
    assert arrows.faults(GO.replace("calls", "knows"), CODE) == [f"not a step: {GO.replace('calls', 'knows')}"]


def test_where_a_function_went_is_said() -> None:
    moved = {**CODE, "aiotransfer/core/c.py": CODE["aiotransfer/core/b.py"], "aiotransfer/core/b.py": ""}
    assert arrows.faults(GO, moved) == ["aiotransfer/core/b.py B.work is not there; aiotransfer/core/c.py has B.work"]
    wrong = "aiotransfer/engine/z.py go is not there; aiotransfer/engine/a.py has go"
    assert arrows.faults(GO.replace("a.py", "z.py"), CODE) == [wrong]
    assert arrows.moved(GO, moved) == GO.replace("core/b.py", "core/c.py")
    assert arrows.moved(GO, CODE) == GO
    twice = {**moved, "aiotransfer/core/d.py": CODE["aiotransfer/core/b.py"]}
    assert arrows.moved(GO, twice) == GO, "which of them is not known"


def test_a_comment_is_no_arrow() -> None:
    comment = {**CODE, "ffi/lane/l.c": "/* x */\nint at_l(int n) {\n    /* s(n) and ->move */\n    return n;\n}\n"}
    assert arrows.faults(BY_TABLE, comment) == ["ffi/lane/l.c at_l does not use move"]
