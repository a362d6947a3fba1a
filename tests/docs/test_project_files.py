"""What stands around the code: the list of `make`, workflows, hooks, metadata, the examples' index, what is stable."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import aiotransfer
from tests.docs.test_development import ROOT, make_targets

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEP = re.compile(r"^ +(?:- )?run: (.*)$", re.MULTILINE)


def listed_targets() -> dict[str, str]:
    """What `make` alone prints: each target with its time."""
    shown = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^  make ([\w-]+) +\S.*?  +(\S.*)$", shown, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a target is listed twice"
    return dict(rows)


def page_times() -> dict[str, str]:
    """The time of each target in the rows of the page on testing that have one."""
    found = {}
    for line in (ROOT / "docs" / "development" / "testing.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `make") and len(cells) >= 3 and re.match(r"(some )?\d|not measured", cells[2]):
            found |= dict.fromkeys(re.findall(r"`make ([\w-]+)", cells[0]), cells[2])
    return found


def called_targets(text: str) -> set[str]:
    """Targets that a workflow calls; those of a matrix are written out."""
    (matrix,) = re.findall(r"^ +target:((?: \[.*\]|(?:\n +- [\w-]+)+))", text, re.MULTILINE) or [""]
    names = {re.sub(r"^make (\$\{\{ matrix\.target \}\}|[\w-]+).*", r"\1", step) for step in STEP.findall(text)}
    if "${{ matrix.target }}" in names:
        names = names - {"${{ matrix.target }}"} | set(re.findall(r"[a-z][\w-]*", matrix))
    return names


def all_called_targets() -> set[str]:
    return set().union(*(called_targets(workflow.read_text()) for workflow in WORKFLOWS))


def test_make_alone_lists_every_target_with_its_time() -> None:
    listed = listed_targets()
    assert set(listed) == make_targets(), 'the comment behind a target says it: "## GROUP: WHAT | TIME"'
    assert [target for target, time in listed.items() if not re.match(r"(some )?\d|not measured", time)] == []


def test_the_list_and_the_page_on_testing_say_the_same_times() -> None:
    listed = {target: time.removesuffix(" each") for target, time in listed_targets().items()}
    page = {target: time.removesuffix(" each") for target, time in page_times().items()}
    assert len(page) > 25
    assert {target: time for target, time in page.items() if listed[target] != time} == {}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_a_workflow_calls_targets_of_the_makefile_and_nothing_else(workflow: Path) -> None:
    text = workflow.read_text()
    steps = STEP.findall(text)
    assert steps
    assert [step for step in steps if not step.startswith("make ") or re.search(r"[;&|`>]|\$\(", step)] == []
    assert called_targets(text) - make_targets() == set()
    assert "permissions:\n  contents: read\n" in text


def test_the_targets_of_a_matrix_are_found() -> None:
    text = "        target:\n          - one\n          - two-b\n    steps:\n      - run: make ${{ matrix.target }}\n"
    assert called_targets(text) == {"one", "two-b"}
    assert called_targets(text + "      - run: make three ARGS=-q\n") == {"one", "two-b", "three"}
    assert called_targets("        target: [one, two]\n      - run: make ${{ matrix.target }}\n") == {"one", "two"}
    assert called_targets("      - run: pip install x\n") == {"pip install x"}


def test_the_workflows_call_every_stage_of_the_continuous_integration_and_what_takes_long() -> None:
    called = all_called_targets()
    stages = set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert stages - called == set()
    assert {target for target in make_targets() if target.startswith("test-")} - called == set()
    assert {"soak", "fuzz", "strangers", "mutants"} <= called


def test_the_workflows_build_wheels_as_soon_as_the_makefile_does() -> None:
    assert ("wheels" in make_targets()) == ("wheels" in all_called_targets())
    assert ("wheels" in make_targets()) != ("Wheels are not built yet" in (ROOT / "CONTRIBUTING.md").read_text())


def test_the_workflows_test_every_python_that_the_package_names() -> None:
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    (matrix,) = re.findall(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert named == re.findall(r'"(.*?)"', matrix)


def test_the_hooks_are_those_of_make_lint() -> None:
    """From `.venv`, so that their versions are those of the project, and nothing is fetched."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (.*)", hooks) == ["local"]
    entries = re.findall(r"entry: \.venv/bin/(\w+)", hooks)
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert entries == ["ruff", "mypy"] == re.findall(r"\$\(VENV\)/bin/(\w+)", lint)[:2]


def test_one_version_is_everywhere() -> None:
    version = PROJECT["version"]
    assert aiotransfer.__version__ == version
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [version]
    assert f"version {version}" in (ROOT / "docs" / "stability.md").read_text()
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_changelog_has_no_empty_section_and_no_line_outside_one() -> None:
    """Version, then kind, then subject."""
    text = (ROOT / "CHANGELOG.md").read_text()
    blocks = re.split(r"^(#{2,4}) (.*)$", text, flags=re.MULTILINE)[1:]
    kinds = [name for level, name in zip(blocks[::3], blocks[1::3], strict=True) if level == "###"]
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Inside"}
    for level, name, body in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        assert level != "####" or body.strip().startswith("- "), f"{name} is empty"
        assert level != "##" or "\n- " not in body, f"{name} has lines without a kind"


def test_every_example_is_in_the_index() -> None:
    named = re.findall(r"\[([\w.]+)\]\(\1\)", (ROOT / "examples" / "README.md").read_text())
    assert len(named) == len(set(named))
    assert set(named) == {file.name for file in (ROOT / "examples").iterdir() if file.suffix in (".py", ".ipynb", ".sh")}


def test_the_table_of_what_is_stable_has_every_module() -> None:
    rows = re.findall(r"^\| `aiotransfer\.(\w+)` \| ([\w ]+) \|", (ROOT / "docs" / "stability.md").read_text(), re.MULTILINE)
    package = ROOT / "aiotransfer"
    modules = {file.parent.name for file in package.glob("*/__init__.py")} | {file.stem for file in package.glob("[a-z]*.py")}
    assert {name for name, _ in rows} == modules
    assert len(rows) == len(modules)
    assert {state for _, state in rows} == {"settled", "may change", "inside"}
    documented = set(re.findall(r"^## `aiotransfer\.(\w+)", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE))
    assert {name for name, state in rows if state == "inside"} & documented == set()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md", "examples/README.md"])
def test_the_links_of_a_page_outside_of_the_site_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    here = (ROOT / page).parent
    assert [link for link in links if not link.startswith("http") and not (here / link).exists()] == []


def test_the_page_on_security_says_what_is_not_promised() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    promised, _, not_promised = text.partition("## What is not promised")
    assert "## How to report" in promised
    for words in ("signed after the handshake", "Port squatting", "Relay", "encrypted"):
        assert words in not_promised, words
