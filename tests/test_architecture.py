"""The layers, read from the sources: imports point one way, folders keep to their job, files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiotransfer
from tests.architecture import native, private, sizes
from tests.architecture.circles import arrows_on_circles, out_of_rooms, upward_arrows
from tests.architecture.docstrings import short_docstrings, unnamed_parameters
from tests.architecture.exceptions import MORE_PARAMETERS
from tests.architecture.sources import package

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "aiotransfer"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 500
LEAVES = {"errors", "config", "advice", "quote"}
PACKAGE_ITSELF = ""  # `import aiotransfer`: only what stands above the package's own names uses them
MAY_IMPORT = {  # folder: the folders beneath it
    "aio": set(),
    "model": set(),
    "telemetry": {"aio"},
    "kv": {"aio", "model", "control", "engine", "telemetry"},
    "core": {"model"},
    "providers": {"model"},
    "control": {"aio", "model"},
    "engine": {"aio", "model", "core", "providers", "control"},
    "rendezvous": {"model", "engine"},
    "moe": {"aio", "model", "control", "engine", "providers"},
    "weights": {"aio", "model", "core", "engine", "providers", "telemetry"},
    "testing": {"model", "core", "providers", "control", "engine"},
    "bench": {PACKAGE_ITSELF, "engine", "moe", "providers", "testing"},
    "integrations": {PACKAGE_ITSELF, "aio", "providers", "rendezvous", "kv", "weights"},
    "cli": {PACKAGE_ITSELF, "bench", "model", "core", "providers", "control", "engine", "weights", "testing"},
}
ROOMS: dict[str, dict[str, set[str]]] = {  # by folder: each room, and those beneath it; "" is the folder itself, else above all
    "cli": {"demo": set(), "doctor": set()},
    "integrations": {"ray": set(), "vllm": set(), "vllm/weights": {"vllm"}},
    "engine": {
        "runtime": set(),
        "peers": {"runtime"},
        "memory": {"runtime", "peers"},
        "operations": {"runtime", "peers", "memory"},
        "sync": {"runtime", "peers", "memory", "operations"},
    },
    "providers": {
        "host": set(),
        "": {"host"},
        "shm": {"", "host"},
        "fabric": {"", "host"},
        "selection": {"", "host", "shm", "fabric"},
    },
    "kv": {
        "protocol": set(),
        "roles": {"protocol"},
        "decode": {"protocol", "roles"},
        "prefill": {"protocol", "roles"},
        "registry": {"protocol", "decode", "prefill"},
        "threads": {"protocol", "roles", "decode", "prefill"},
    },
    "moe": {
        "protocol": set(),
        "kernels": set(),
        "communicator": {"protocol"},
        "step": {"protocol", "communicator"},
    },
    "weights": {
        "protocol": set(),
        "kernels": set(),
        "layouts": set(),
        "planning": {"layouts", "protocol"},
        "records": {"protocol"},
        "memory": {"layouts", "planning", "kernels"},
        "roles": {"layouts", "planning", "protocol", "memory"},
        "publisher": {"layouts", "planning", "protocol", "kernels", "records", "memory", "roles"},
        "subscriber": {"layouts", "planning", "protocol", "records", "memory", "roles"},
        "checkpoint": {"layouts", "planning", "protocol", "memory", "roles", "publisher", "subscriber"},
        "scale": {"layouts", "planning"},
    },
}
PRIVATE_OF_THE_ENGINE = {"kv": {"_values"}, "moe": {"_check", "_connections", "_lane", "_loop"}}  # that components use: no more
PURE = (
    "model/", "core/", "control/frames.py", "control/handshake.py", "control/resume.py", "rendezvous/roster.py", "errors.py",
    "kv/protocol/", "kv/prefill/schedule.py",
    "kv/registry/member.py", "kv/registry/changes.py", "kv/registry/cache.py", "kv/registry/stamp.py",
    "moe/protocol/",
    "weights/layouts/", "weights/planning/", "weights/protocol/", "weights/records/record.py",
)  # fmt: skip
IMPURE = {"asyncio", "time", "socket", "logging", "select", "threading", "subprocess", "random", "anyio", "pathlib"}


def name_of(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(file: Path) -> Iterator[str]:
    """Modules imported at run time (never under TYPE_CHECKING)."""

    def visit(nodes: list[ast.stmt]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield full if full in MODULES else str(node.module)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from visit(node.orelse)
            else:
                for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                    yield from visit(getattr(node, field, None) or [])

    yield from visit(ast.parse(file.read_text()).body)


MODULES = {name_of(file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_module_is_short_has_a_docstring_and_imports_only_what_lies_beneath(file: Path) -> None:
    source = file.read_text()
    assert len(source.splitlines()) <= MOST_LINES
    assert not source or ast.get_docstring(ast.parse(source)), "a module says what it is for"
    folder = folder_of(name_of(file))
    if folder not in MAY_IMPORT:
        return
    for target in imports(file):
        if target.startswith("aiotransfer.") and (beneath := folder_of(target)) != folder:
            assert beneath in MAY_IMPORT[folder] | LEAVES or target == "aiotransfer._native", target
        assert target != "aiotransfer" or PACKAGE_ITSELF in MAY_IMPORT[folder], "below them nothing names the package itself"


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.py")), ids=lambda f: f.name)
def test_an_example_is_short_and_has_a_docstring(file: Path) -> None:
    source = file.read_text()
    assert len(source.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(source)), "an example says what it shows"


@pytest.mark.parametrize("file", [f for f in FILES if str(f.relative_to(PACKAGE)).startswith(PURE)], ids=lambda f: f.name)
def test_pure_modules_have_no_clock_no_await_and_no_input_or_output(file: Path) -> None:
    assert not IMPURE & {target.split(".")[0] for target in imports(file)}
    for node in ast.walk(ast.parse(file.read_text())):
        assert not isinstance(node, ast.Await | ast.AsyncFunctionDef)
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("open", "print"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_coroutine_that_is_dropped_awaits_nothing(file: Path) -> None:
    """A handler of every exception takes `GeneratorExit` too, and may not await then: it lets that pass, or asks for it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Try):
            continue
        apart = False
        for handler in node.handlers:
            caught = "" if handler.type is None else ast.unparse(handler.type)
            apart = apart or "GeneratorExit" in caught
            waits = any(isinstance(inner, ast.Await) for line in handler.body for inner in ast.walk(line))
            if waits and (handler.type is None or "BaseException" in caught):
                assert apart or "GeneratorExit" in ast.unparse(handler), f"line {handler.lineno}"


def test_what_runs_on_the_simulator_has_its_chances_from_there() -> None:
    """Else a seed does not replay its run. shm and registries never run on it."""
    own = {"providers/shm/fd_listener.py", "providers/shm/provider.py", "kv/registry/membership.py", "testing/fabric.py"}
    found = {str(file.relative_to(PACKAGE)) for file in FILES if "random" in imports(file)}
    assert found == own


@pytest.mark.parametrize("file", [f for f in FILES if "getLogger" in f.read_text()], ids=lambda f: f.name)
def test_every_line_of_the_log_is_limited(file: Path) -> None:
    """A line is written where a `RateLimit` admitted it, and says how many it did not."""
    tree = ast.parse(file.read_text())
    lines = {node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("_logger.")}
    limited: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "left_out is not None":
            limited |= {call for call in ast.walk(node) if call in lines and "more(left_out)" in ast.unparse(call)}
    assert lines
    assert lines == limited


def test_only_providers_import_the_extension() -> None:
    users = [f for f in FILES if re.search(r"import _native|aiotransfer\._native", f.read_text())]
    assert users == [PACKAGE / "providers" / "native.py"]


@pytest.mark.parametrize("folder", ["kv", "moe", "rendezvous", "weights", "integrations"])
def test_components_use_no_private_name_of_the_engine_but_those_that_are_listed(folder: str) -> None:
    used = {
        node.attr
        for file in (PACKAGE / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr)
        and re.search(r"(^|[._])engine$", ast.unparse(node.value))
    }  # fmt: skip
    assert used == PRIVATE_OF_THE_ENGINE.get(folder, set())


@pytest.mark.parametrize("folder", ROOMS)
def test_rooms_import_only_those_beneath_them(folder: str) -> None:
    modules = package()
    assert {module.room for module in modules.values() if module.room.startswith(f"{folder}/")} == {
        f"{folder}/{room}" for room in ROOMS[folder] if room
    }
    assert out_of_rooms(modules, folder, ROOMS[folder]) == []


def test_no_module_reaches_itself_by_imports() -> None:
    """Those for annotations and those inside functions included."""
    assert arrows_on_circles(package()) == []


def test_no_folder_imports_what_is_not_beneath_it() -> None:
    """The same ones included; and of two rooms within a folder at most one imports the other."""
    assert upward_arrows(package(), MAY_IMPORT, LEAVES | {"_native"}) == []


def test_no_folder_changes_a_private_name_of_another() -> None:
    assert private.foreign(package())["writes across folders"] == []


def test_what_users_may_give_is_named_in_a_docstring() -> None:
    """Each parameter between backticks, with meaning, unit and default; of a constructor also in the docstring of the class."""
    assert unnamed_parameters(package()) == []


def test_a_docstring_says_more_than_a_name() -> None:
    assert short_docstrings(package()) == []


def test_a_function_fits_on_a_screen() -> None:
    """Those of tests, examples and benchmarks, too."""
    assert sizes.long_functions(dict(sizes.files())) == []


def test_a_file_has_at_most_five_hundred_lines() -> None:
    """The same ones, and C."""
    assert sizes.long_files(dict(sizes.files())) == []


def test_a_function_has_at_most_seven_parameters_but_for_those_that_are_listed() -> None:
    assert sizes.listed(sizes.many_parameters(package())) == set(MORE_PARAMETERS)


def test_public_names_are_few_and_documented() -> None:
    assert len(aiotransfer.__all__) <= 50
    for name in aiotransfer.__all__:
        assert getattr(aiotransfer, name).__doc__, f"{name} says what it is"


def test_every_folder_of_the_package_has_tests() -> None:
    for folder in MAY_IMPORT:
        assert list((ROOT / "tests" / folder).glob("test_*.py")), folder


@pytest.mark.parametrize("file", sorted((ROOT / "ffi").rglob("*.[ch]")), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_c_file_is_short_and_says_what_it_is_for(file: Path) -> None:
    source = file.read_text()
    assert len(source.splitlines()) <= MOST_LINES
    assert source.startswith("/*")


def test_c_files_and_their_folders_call_each_other_in_no_circle() -> None:
    tree = native.tree()
    assert native.calls_on_circles(tree) == native.files_on_circles(tree) == native.folders_on_circles(tree) == []


def test_a_c_folder_includes_headers_of_its_own_and_of_those_beneath_it() -> None:
    tree = native.tree()
    assert native.folders(tree) == set(native.MAY_INCLUDE)
    assert native.upward_includes(tree) == []


def test_a_c_function_fits_on_a_screen() -> None:
    assert native.long_functions(native.tree()) == []


def test_no_tracked_file_names_a_place_of_this_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    places = re.compile("|".join(("/ro" + "ot/", "/ho" + "me/", "/wo" + "rk/")))
    found = [name for name in listed if places.search((ROOT / name).read_text(errors="ignore"))]
    assert not found
