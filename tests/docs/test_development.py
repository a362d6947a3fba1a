"""The pages for those who change the code: what they name is there, and what they must name is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aiotransfer.config import Config
from tests.architecture import native
from tests.docs import arrows, folders
from tests.guards import EVERY

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "docs" / "development"
PAGES = [ROOT / "CONTRIBUTING.md", *sorted(FOLDER.glob("*.md"))]
ROOTS = ("aiotransfer/", "ffi/", "tests/", "docs/", "examples/")
CODE = re.compile(r"`([^`\n]+)`")
NAMED = re.compile(r"`([\w/.]+\.(?:py|c|h))` \(`([\w.]+)`\)|`([\w.]+)` (?:in|of) `([\w/.]+\.(?:py|c|h))`")


def text_of(page: Path) -> str:
    """A page without the blocks of code, and with each sentence on one line."""
    return re.sub(r"\s*\n\s*", " ", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))


def missing_files(text: str) -> list[str]:
    """Files and folders of ours that a text names and that are not there, with where one of that name is now."""
    found = []
    for name in CODE.findall(text):
        if name.startswith(ROOTS) and re.fullmatch(r"[\w/.-]+", name) and not (ROOT / name).exists():
            now = [str(file.relative_to(ROOT)) for root in ROOTS for file in (ROOT / root).rglob(Path(name).name)]
            found.append(f"{name} is not there{'; is it ' + ' or '.join(now) + ' now?' if now else ''}")
    return found


def missing_names(text: str) -> list[str]:
    """Names that a text says a file has ("`FILE` (`NAME`)", "`NAME` in `FILE`", "`NAME` of `FILE`") and that it has not."""
    found = []
    for behind, name, before, file in NAMED.findall(text):
        path, inner = (behind, name) if behind else (file, before)
        if not (ROOT / path).exists():
            continue
        words = set(re.findall(r"\w+", (ROOT / path).read_text()))
        found += [f"{path} has no {word}" for word in inner.split(".") if word and word not in words]
    return found


def make_targets() -> set[str]:
    texts = [(ROOT / name).read_text() for name in ("Makefile", "tests/benchmarks/rivals.mk")]
    return {name for text in texts for name in re.findall(r"^([a-z][\w-]*):(?!=)", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_of_a_page_are_there(page: Path) -> None:
    assert missing_files(text_of(page)) == []
    assert missing_names(text_of(page)) == []


def test_what_is_not_there_is_seen() -> None:
    assert missing_files("see `aiotransfer/config.py`, `tests/` and `make`") == []
    assert missing_files("see `aiotransfer/core/config.py`") == [
        "aiotransfer/core/config.py is not there; is it aiotransfer/config.py now?"
    ]
    assert missing_names("`aiotransfer/config.py` (`Config`), `Config` in `aiotransfer/config.py`") == []
    assert missing_names("`aiotransfer/config.py` (`Confug`)") == ["aiotransfer/config.py has no Confug"]
    assert missing_names("`Confug` of `aiotransfer/config.py`") == ["aiotransfer/config.py has no Confug"]


def test_the_page_on_testing_has_every_command_and_no_other() -> None:
    named = {name for page in PAGES for name in re.findall(r"make ([a-z][\w-]*)", "\n".join(CODE.findall(page.read_text())))}
    there = set(re.findall(r"`make ([a-z][\w-]*)", (FOLDER / "testing.md").read_text()))
    assert named - make_targets() == set()
    assert make_targets() - there - {"help", "rivals"} == set()


def test_the_page_on_testing_has_every_stage_of_the_continuous_integration() -> None:
    stages = re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    rows = (FOLDER / "testing.md").read_text()
    for stage in stages:
        assert re.search(rf"`make {stage}`( \(\*\)|[^\n]*\(\*\))?", rows), stage
        assert stage in ("test", "lint", "docs") or re.search(rf"`make {stage}` \(\*\)", rows), stage


def test_a_file_that_asks_for_torch_is_run_by_a_stage_that_has_it() -> None:
    """`make test` has no torch: what only skips there would never run."""
    (triton,) = re.findall(r"TESTS_REQUIRE=triton .*? -m pytest (.+?) \$\(ARGS\)", (ROOT / "Makefile").read_text(), re.DOTALL)
    with_triton = triton.replace("\\", "").split()
    asking = [file for file in (ROOT / "tests").rglob("test_*.py") if 'importorskip("torch' in file.read_text()]
    assert len(asking) > 10
    for file in asking:
        name = str(file.relative_to(ROOT))
        assert "mark.demo" in file.read_text() or name.startswith(tuple(with_triton)), f"{name}: mark what needs torch as demo"


def test_the_number_of_guards_is_about_right() -> None:
    (said,) = set(re.findall(r"(\d+) (?:guards taken|of them)", (FOLDER / "testing.md").read_text()))
    assert abs(int(said) - len(EVERY)) < len(EVERY) / 5


def text_lines(page: Path) -> str:
    """A page with each item of a list on one line."""
    return re.sub(r"\n  +", " ", page.read_text())


def test_the_glossary_has_words_of_the_code() -> None:
    words = {word.lower() for text in arrows.tree().values() for word in re.findall(r"[A-Za-z]+", text.replace("_", " "))}
    items = re.findall(r"^- (.+)", text_lines(FOLDER / "glossary.md"), re.MULTILINE)
    assert len(items) > 50
    for item in items:
        terms, _, meaning = item.partition(": ")
        assert terms.startswith("**"), item
        assert len(meaning.split()) > 4, terms
        for term in re.findall(r"\*\*(.+?)\*\*", terms):
            assert set(term.lower().split()) <= words, f"{term} is no word of the code any more"


def test_the_walk_begins_with_the_pages() -> None:
    named = re.findall(r"\]\((docs/[\w/.-]+)\)", (ROOT / "CONTRIBUTING.md").read_text())
    assert {f"docs/development/{page.name}" for page in FOLDER.glob("*.md")} <= set(named)
    assert "accept_timeout" not in Config.__dataclass_fields__, "the example of first-change.md is a setting that there is not"


def test_the_guard_of_the_walk_is_a_line_of_the_code_but_for_the_setting() -> None:
    walk = (FOLDER / "first-change.md").read_text()
    (block,) = re.findall(r"    Mutant\(\n(.+?)\n    \),", walk, re.DOTALL)
    _, path, guard, instead, tests = eval(f"({block})")
    for text in (guard.replace("engine.config.accept_timeout", "ACCEPT_SECONDS"), instead.replace("1e6", "ACCEPT_SECONDS")):
        assert (ROOT / path).read_text().count(text) == 1, text
    assert (ROOT / tests).is_file()


def test_the_architecture_has_the_folders_in_their_own_words() -> None:
    assert folders.written() == folders.table(), "python -m tests.docs.folders writes it"
    for folder, sentence in folders.folders().items():
        assert 3 < len(sentence.split()) < 50, folder


def test_a_first_sentence_ends_where_a_sentence_does() -> None:
    assert folders.first_sentence("One thing.\n\nAnother.") == "One thing."
    assert folders.first_sentence("Of `a.b`: this,\nand that. And more.") == "Of `a.b`: this, and that."
    assert folders.first_sentence("No stop\n\nafter") == "No stop"


def test_the_site_is_strict_and_not_quiet() -> None:
    """mkdocs counts the warnings that it shows: a quiet strict build lets every one of them pass."""
    (line,) = re.findall(r"mkdocs build (.*)", (ROOT / "Makefile").read_text())
    assert line.split() == ["--strict"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_native_names_of_a_page_are_there(page: Path) -> None:
    known = set(re.findall(r"\b(?:at_|AT_)\w+", "\n".join(native.tree().values())))
    named = {name for name in re.findall(r"\b(?:at_|AT_)\w+", page.read_text()) if not name.endswith("_")}
    assert named - known == set()
