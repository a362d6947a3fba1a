"""Each rule sees what it is for, and leaves alone what it is not for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.architecture import circles, docstrings, figures, native, private, sizes
from tests.architecture.exceptions import MORE_PARAMETERS
from tests.architecture.sources import ROOT, Module, arrows, exported, package
from tests.test_architecture import LEAVES, MAY_IMPORT, ROOMS


def modules(**texts: str) -> dict[str, Module]:
    """A package of files by their paths: `kv_a` stands for aiotransfer/kv/a.py, `kv` for the folder's `__init__`."""
    paths = {name: name.replace("_", "/") if "_" in name else f"{name}/__init__" for name in texts}
    return package({f"aiotransfer/{paths[name]}.py": text for name, text in texts.items()})


TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from aiotransfer.kv.a import A\n"
LAZY = "def f():\n    from aiotransfer.kv.a import A\n"
LATER = "import importlib\ndef f():\n    importlib.import_module('aiotransfer.kv.a')\n"


PLAIN = ["from aiotransfer.kv.a import A\n", "from aiotransfer.kv import a\n", "import aiotransfer.kv.a\n"]


@pytest.mark.parametrize("back", [TYPING, LAZY, LATER, *PLAIN])
def test_a_circle_is_seen_whatever_closes_it(back: str) -> None:
    forth = "from aiotransfer.kv.b import B\n"
    tree = modules(kv_a=f"{forth}class A: ...\n", kv_b=f"{back}class B: ...\n", kv_c=forth)
    assert [(one.room, one.where) for one in circles.arrows_on_circles(tree)] == [
        ("kv", "aiotransfer/kv/a.py:1"),
        ("kv", f"aiotransfer/kv/b.py:{[n for n, line in enumerate(back.splitlines(), 1) if 'kv' in line][-1]}"),
    ]


def test_a_circle_between_folders_belongs_to_both() -> None:
    tree = modules(kv_a="from aiotransfer.moe.b import B\n", moe_b="from aiotransfer.kv.a import A\n")
    found = circles.arrows_on_circles(tree)
    assert [(one.room, one.what) for one in found] == [
        ("kv", "imports aiotransfer.moe.b (top)"),
        ("moe", "imports aiotransfer.kv.a (top)"),
    ]


def test_no_circle_is_seen_where_there_is_none() -> None:
    to_c = "from aiotransfer.kv.c import C\n"
    tree = modules(kv_a=f"from aiotransfer.kv.b import B\n{to_c}", kv_b=to_c, kv_c="")
    assert circles.arrows_on_circles(tree) == []


def test_circles_that_touch_are_one_and_others_are_apart() -> None:
    found = circles.components([("a", "b"), ("b", "a"), ("b", "c"), ("c", "b"), ("d", "e"), ("e", "d"), ("c", "d"), ("f", "a")])
    assert sorted(map(sorted, found)) == [["a", "b", "c"], ["d", "e"]]


def test_an_arrow_to_a_room_that_is_not_beneath_is_upward() -> None:
    tree = modules(core_a=TYPING, kv_a="from aiotransfer.core.a import X\nfrom aiotransfer.errors import E\n")
    tree |= package({"aiotransfer/errors.py": ""})
    found = circles.upward_arrows(tree, {"core": set(), "kv": {"core"}}, {"errors"})
    assert [(one.room, one.where) for one in found] == [("core", "aiotransfer/core/a.py:3")]


@pytest.mark.parametrize("text", [
    "from aiotransfer.kv.high.x import X\n",
    "from aiotransfer.kv.a import A\n",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from aiotransfer.kv.high.x import X\n",
    "def f():\n    from aiotransfer.kv.high.x import X\n",
])  # fmt: skip
def test_a_room_that_imports_what_is_not_beneath_it_is_seen(text: str) -> None:
    tree = {
        "aiotransfer/kv/a.py": "from aiotransfer.kv.high.x import X\nfrom aiotransfer.kv.low.y import Y\n",
        "aiotransfer/kv/high/x.py": "from aiotransfer.kv.low.y import Y\nfrom aiotransfer.kv.high.z import Z\n",
        "aiotransfer/kv/high/z.py": "",
        "aiotransfer/kv/low/y.py": "",
    }
    rooms: dict[str, set[str]] = {"low": set(), "high": {"low"}}
    assert circles.out_of_rooms(package(tree), "kv", rooms) == []
    found = circles.out_of_rooms(package(tree | {"aiotransfer/kv/low/y.py": text}), "kv", rooms)
    assert [(one.room, one.where) for one in found] == [("kv/low", f"aiotransfer/kv/low/y.py:{text.count(chr(10))}")]


def test_a_folder_whose_own_files_are_the_ground_imports_no_room_above_it() -> None:
    rooms: dict[str, set[str]] = {"low": set(), "": {"low"}, "high": {"", "low"}}
    tree = {
        "aiotransfer/kv/a.py": "from aiotransfer.kv.low.y import Y\n",
        "aiotransfer/kv/high/x.py": "from aiotransfer.kv.a import A\nfrom aiotransfer.kv.low.y import Y\n",
        "aiotransfer/kv/low/y.py": "",
    }
    assert circles.out_of_rooms(package(tree), "kv", rooms) == []
    tree["aiotransfer/kv/a.py"] += "from aiotransfer.kv.high.x import X\n"
    tree["aiotransfer/kv/low/y.py"] = "from aiotransfer.kv.a import A\n"
    assert [one.room for one in circles.out_of_rooms(package(tree), "kv", rooms)] == ["kv", "kv/low"]


def test_of_rooms_within_a_room_the_rarer_direction_is_upward() -> None:
    tree = package(
        {
            "aiotransfer/kv/a.py": "from aiotransfer.kv.registry.x import X\nfrom aiotransfer.kv.registry.y import Y\n",
            "aiotransfer/kv/registry/x.py": "from aiotransfer.kv.a import A\n",
            "aiotransfer/kv/registry/y.py": "",
        }
    )
    assert [one.where for one in circles.upward_arrows(tree, {"kv": set()}, set())] == ["aiotransfer/kv/registry/x.py:1"]


ABOVE = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import aiotransfer.{}\n"


def texts() -> dict[str, str]:
    """The files of the package, by path."""
    return {str(file.relative_to(ROOT)): file.read_text() for file in sorted((ROOT / "aiotransfer").rglob("*.py"))}


def with_an_import(path: str, of: str) -> dict[str, Module]:
    """The modules of this tree, one of which imports a module more, for annotations alone."""
    files = texts()
    assert path in files
    return package(files | {path: files[path] + ABOVE.format(of)})


def test_one_import_upward_in_this_tree_is_seen() -> None:
    tree = with_an_import("aiotransfer/errors.py", "engine.engine")
    assert {"aiotransfer/errors.py", "aiotransfer/engine/engine.py"} <= {
        one.where.partition(":")[0] for one in circles.arrows_on_circles(tree)
    }
    tree = with_an_import("aiotransfer/core/boxes.py", "engine.engine")
    found = circles.upward_arrows(tree, MAY_IMPORT, LEAVES | {"_native"})
    assert [(one.room, one.what) for one in found] == [("core", "imports aiotransfer.engine.engine (typing)")]


@pytest.mark.parametrize(("path", "of"), [
    ("weights/protocol/wire.py", "weights.publisher.publisher"),
    ("weights/subscriber/gate.py", "weights.publisher.work"),
    ("weights/layouts/pack.py", "weights.planning.plan"),
    ("moe/protocol/messages.py", "moe.communicator.communicator"),
])  # fmt: skip
def test_one_import_out_of_a_room_of_this_tree_is_seen(path: str, of: str) -> None:
    folder = path.partition("/")[0]
    found = circles.out_of_rooms(with_an_import(f"aiotransfer/{path}", of), folder, ROOMS[folder])
    assert [(one.room, one.what) for one in found] == [(path.rpartition("/")[0], f"imports aiotransfer.{of}")]


A = """
class Base:
    def __init__(self):
        self._inherited = {}
class A(Base):
    _shared = 1
    __slots__ = ("_slot",)
    def __init__(self):
        self._own = 0
        self.other = Other()
    @property
    def next(self) -> A | None: ...
    def _call(self): ...
class Other:
    def __init__(self):
        self._hidden = []
"""


def foreign(text: str) -> dict[str, list[str]]:
    tree = modules(kv_a=A, engine_b=text)
    found = private.foreign(tree)
    assert all(one.where.startswith("aiotransfer/engine/b.py") for ones in found.values() for one in ones)
    return {rule: [one.what for one in ones] for rule, ones in found.items() if ones}


@pytest.mark.parametrize(
    "line",
    [
        "a._own",
        "a._slot",
        "a._shared",
        "a._inherited",
        "a._call()",
        "a.next._own",
        "a.other._hidden",
        "self.a._own",
        "self.made()._own",
        "unknown._own",
        "[x._own for x in unknown]",
        "(lambda: a._own)()",
    ],
)
def test_reading_a_private_name_of_another_file_is_seen(line: str) -> None:
    text = "from aiotransfer.kv.a import A\nclass B:\n    def __init__(self, a: A) -> None:\n        self.a = a\n"
    text += f"    def made(self) -> A: ...\n    def f(self, a: A, unknown):\n        {line}\n"
    found = foreign(text)
    assert set(found) == {"foreign reads", "reads across folders"}
    assert len(found["foreign reads"]) == 1
    assert "aiotransfer/kv/a.py" in found["foreign reads"][0]


@pytest.mark.parametrize(
    "line",
    [
        "a._own = 1",
        "a._own += 1",
        "del a._own",
        "a._own[2] = 1",
        "del a._own[2]",
        "a._own.append(1)",
        "a.other._hidden.clear()",
        "a._own: int = 1",
        "a._own, x = 1, 2",
        "for a._own in (): ...",
    ],
)
def test_changing_a_private_name_of_another_file_is_a_write(line: str) -> None:
    found = foreign(f"from aiotransfer.kv.a import A\ndef f(a: A):\n    {line}\n")
    assert set(found) == {"foreign writes", "writes across folders"}
    assert len(found["foreign writes"]) == 1


def test_a_private_name_that_both_have_is_told_apart_by_its_type() -> None:
    text = "from aiotransfer.kv.a import A\nclass B:\n    def __init__(self): self._own = 0\n    def f(self, a: {}): a._own\n"
    assert foreign(text.format("A"))
    assert not foreign(text.format("B"))
    assert not foreign(text.format("object")), "where the type is not known, the file's own name is meant"


@pytest.mark.parametrize(
    "text",
    [
        "class B:\n    def f(self): self._own\n",
        "def f(x): x._replace(a=1)\n",
        "import os\nos._exit(1)\n",
        "def f(x): x.__class__; x._nothing_here\n",
        "class B:\n    def f(self): super()._own\n",
    ],
)
def test_what_is_no_private_name_of_another_file_is_left_alone(text: str) -> None:
    assert not foreign(text)


def test_a_private_name_of_another_module_is_foreign() -> None:
    text = "from aiotransfer.kv import a\nfrom aiotransfer.kv.a import _f\na._limit\n"
    tree = modules(kv_a="_limit = 1\ndef _f(): ...\n", kv_b=text)
    found = private.foreign(tree)
    assert [one.where for one in found["foreign reads"]] == ["aiotransfer/kv/b.py:3", "aiotransfer/kv/b.py:2"]
    assert not found["reads across folders"]


def test_long_functions_and_files_are_counted_from_one_line_more() -> None:
    def text(lines: int) -> str:
        return "class A:\n    @property\n    def f(self):\n" + "        x = 1\n" * (lines - 1)

    assert not sizes.long_functions({"tests/kv/test_a.py": text(60)})
    assert [one.what for one in sizes.long_functions({"tests/kv/test_a.py": text(61)})] == ["A.f has 61 lines"]
    assert not sizes.long_files({"ffi/shm/a.c": "\n" * 500})
    long = dict.fromkeys(("ffi/shm/a.c", "aiotransfer/kv/a.py"), "\n" * 501)
    assert [one.room for one in sizes.long_files(long)] == ["ffi/shm", "kv"]


PUBLIC = "from aiotransfer.kv.a import A, f\n__all__ = ['A', 'f']\n"


def test_more_than_seven_parameters_are_seen() -> None:
    eight = "a, b, c, d, *, e, f, g, h=1"
    inner = f"class A:\n    def __init__(self, {eight}): ...\n    def seven(self, a, b, c, d, e, f, g): ...\n"
    text = inner + f"def f({eight}): ...\ndef seven(a, b, c, d, e, f, *, g): ...\n"
    found = sizes.many_parameters(modules(kv=PUBLIC, kv_a=text))
    assert [one.what for one in found] == ["A.__init__ has 8 parameters", "f has 8 parameters"]
    assert sizes.listed(found) == {"aiotransfer/kv/a.py A.__init__", "aiotransfer/kv/a.py f"}


def test_an_eighth_parameter_in_this_tree_is_seen_and_so_is_an_exception_without_a_need() -> None:
    files, path = texts(), "aiotransfer/engine/operations/submit.py"
    assert files[path].count("def submit(\n        self,") == 1
    more = files | {path: files[path].replace("def submit(\n        self,", "def submit(\n        self, one_more,")}
    assert sizes.listed(sizes.many_parameters(package(more))) - set(MORE_PARAMETERS) == {f"{path} Submitter.submit"}
    path = "aiotransfer/engine/open.py"
    fewer = files | {path: files[path].replace("def open_engine(", "def open_it(")}
    assert set(MORE_PARAMETERS) - sizes.listed(sizes.many_parameters(package(fewer))) == {f"{path} open_engine"}


def test_a_parameter_that_its_docstring_does_not_name_is_seen() -> None:
    text = '''class A:
    """`one`: of them; two is not code."""
    def __init__(self, one, two): ...
    def use(self, three, width):
        """Use `threefold`, `x.three` and `width=2`."""
    def _use(self, four): ...
    @staticmethod
    def make(five): ...
def f(six):
    """``six``"""
def g(seven): ...
'''
    found = docstrings.unnamed_parameters(modules(kv=PUBLIC, kv_a=text))
    assert [one.what.split(" does not name ") for one in found] == [["A.__init__", "two"], ["A.use", "three"], ["A.make", "five"]]


def test_a_docstring_of_few_words_is_seen() -> None:
    text = 'class A:\n    """One of those."""\n    def f(self):\n        """Says what it is for."""\n    def g(self): ...\n'
    text += '    def h(self):\n        """See `Room`."""\n'
    assert [one.what for one in docstrings.short_docstrings(modules(kv_a=text))] == ["A: 'One of those.'"]


@pytest.mark.parametrize(("path", "before", "name"), [
    ("engine/open.py", "def open_engine(\n    *,", "open_engine"),
    ("engine/peers/peer.py", "async def send(self,", "Peer.send"),
    ("weights/layouts/shards.py", "def sharded(", "sharded"),
    ("weights/subscriber/subscriber.py", "self, engine: Engine,", "Subscriber.__init__"),
])  # fmt: skip
def test_one_parameter_more_in_this_tree_that_no_docstring_names_is_seen(path: str, before: str, name: str) -> None:
    files, path = texts(), f"aiotransfer/{path}"
    assert files[path].count(before) == 1
    found = docstrings.unnamed_parameters(package(files | {path: files[path].replace(before, f"{before} unsaid,")}))
    assert [one.what for one in found] == [f"{name} does not name unsaid"]


def test_one_short_docstring_more_in_this_tree_is_seen() -> None:
    files, path = texts(), "aiotransfer/kv/protocol/layout.py"
    found = docstrings.short_docstrings(package(files | {path: files[path] + 'def _late():\n    """It is late."""\n'}))
    assert [(one.room, one.what) for one in found] == [("kv/protocol", "_late: 'It is late.'")]


C = {
    "ffi/lane/a.c": "static int turn(void) { return 1; }\nint at_a(void) { return at_b() + turn(); }\n",
    "ffi/lane/b.c": "#define TURN(x) (at_c(x) + 1)\nint at_b(void)\n{\n    if (1) {\n        return TURN(2);\n    }\n}\n",
    "ffi/shm/c.c": '/* at_d() */ int at_c(int x) { at_port.at_d(x); x->at_a; puts("at_a"); at_e(x); return turn; }\n',
    "ffi/shm/d.c": "static const struct t table = { .a = at_a };\nint __attribute__((cold)) at_d(void) { return at_a(); }\n",
    "ffi/shm/e.c": "int at_e(int) __attribute__((cold));\nint at_e(int x) __attribute__((cold)) { return x; }\n",
}


def test_calls_of_c_files_are_read_from_their_text() -> None:
    assert native.calls(C) == {
        ("ffi/lane/a.c", "ffi/lane/b.c"): {"at_b"},
        ("ffi/lane/b.c", "ffi/shm/c.c"): {"at_c"},
        ("ffi/shm/c.c", "ffi/shm/e.c"): {"at_e"},
        ("ffi/shm/d.c", "ffi/lane/a.c"): {"at_a"},
    }
    assert native.files_on_circles(C) == native.calls_on_circles(C) == native.folders_on_circles(C)[:0] == []


def test_a_circle_of_c_files_and_of_their_folders_is_seen() -> None:
    tree = C | {"ffi/shm/e.c": "int at_e(int x)\n{\n#if X\n    return at_b();\n#else\n    return x;\n#endif\n}\n"}
    assert [one.where for one in native.files_on_circles(tree)] == ["ffi/lane/b.c", "ffi/shm/c.c", "ffi/shm/e.c"]
    assert {one.what for one in native.files_on_circles(tree)} == {"on a circle of 3 files in ffi/lane, ffi/shm"}
    assert len(native.calls_on_circles(tree)) == 3
    assert [one.room for one in native.folders_on_circles(tree)] == ["ffi/lane", "ffi/shm"]


def test_every_function_that_the_library_has_is_found_in_the_text() -> None:
    """Else the call graph would have holes: each function that a declaration promises to cffi is defined in some file."""
    files = [native.read(path, text) for path, text in native.tree().items()]
    defined = {name for file in files for name in file.functions}
    promised: set[str] = set()
    for path, text in native.tree().items():
        if Path(path).name == "decls.h":
            promised |= set(re.findall(r"^[\w *]*?\b(at_\w+)\([^)]*\);", native.COMMENT.sub(" ", text), re.MULTILINE))
    assert len(promised) > 100
    assert not promised - defined


def test_a_header_of_a_folder_that_is_not_beneath_is_seen() -> None:
    tree = {"ffi/lane/a.c": '#include "lane.h"\n#include "native.h"\n'}
    tree["ffi/shm/b.c"] = '#include "lane/lane.h"\n#include "sim/sim.h"\n'
    assert [(one.room, one.what) for one in native.upward_includes(tree)] == [
        ("ffi/lane", "includes native.h"),
        ("ffi/shm", "includes sim/sim.h"),
    ]


def test_one_call_upward_in_this_tree_closes_circles_that_are_seen() -> None:
    tree = native.tree()
    tree["ffi/lane/peers.c"] += "int at_up(at_lane *lane) { return at_fab_break(lane, 0); }\n"
    assert {"ffi/fabric", "ffi/lane"} == {one.room for one in native.folders_on_circles(tree)}
    assert {"ffi/fabric/conns.c", "ffi/lane/peers.c"} <= {one.where for one in native.files_on_circles(tree)}
    assert "calls ffi/fabric/conns.c: at_fab_break" in {one.what for one in native.calls_on_circles(tree)}


@pytest.mark.parametrize(("path", "header"), [
    ("ffi/lane/peers.c", "fabric/fabric.h"), ("ffi/fabric/conns.c", "ofi/ofi.h"), ("ffi/fabric/rail.c", "verbs/verbs.h"),
    ("ffi/verbs/open.c", "ofi/ofi.h"), ("ffi/ofi/open.c", "simrail/decls.h"), ("ffi/shm/peer.c", "native.h"),
])  # fmt: skip
def test_one_include_upward_in_this_tree_is_seen(path: str, header: str) -> None:
    tree = native.tree()
    tree[path] = f'#include "{header}"\n{tree[path]}'
    assert [(one.where, one.what) for one in native.upward_includes(tree)] == [(f"{path}:1", f"includes {header}")]


def test_a_long_c_function_is_seen() -> None:
    def text(lines: int) -> str:
        return "int at_a(void)\n{\n" + "\n" * (lines - 2) + "}\n"

    assert not native.long_functions({"ffi/shm/a.c": text(60)})
    assert [one.what for one in native.long_functions({"ffi/shm/a.c": text(61)})] == ["at_a has 61 lines"]


def test_a_figure_that_rises_fails_and_one_that_falls_may_be_lowered() -> None:
    before = {"kv": 3, "moe": 2, "engine": 4}
    now = {"kv": 4, "moe": 1, "core": 1, "engine": 4}
    assert figures.risen(now, before) == {"core": (0, 1), "kv": (3, 4)}
    assert figures.fallen(now, before) == {"moe": (2, 1)}
    assert figures.lowered({"rule": now, "new": {"kv": 5}}, {"rule": before}) == {
        "rule": {"kv": 3, "moe": 1, "engine": 4},
        "new": {"kv": 5},
    }
    assert figures.lowered({"rule": now}, None) == {"rule": now}


def test_the_tree_is_read() -> None:
    """A rule that finds nothing, because it reads nothing, would pass for ever."""
    tree = package()
    assert len(tree) > 200
    assert len(arrows(tree)) > 1000
    assert len(exported(tree)["aiotransfer.engine.engine"]) == 1
    assert sum(map(len, native.calls(native.tree()).values())) > 200
    assert len(dict(sizes.files())) > 500
