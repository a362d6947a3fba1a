"""How the extension is built on machines that are not ours: no compiler, another compiler, flags of the user, a linked Python."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ADVICE = ("apt-get install gcc", "--no-cache-dir --force-reinstall", "AIOTRANSFER_SKIP_NATIVE=1")
COMPILER = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["ASKED"], "a") as asked:
    asked.write(json.dumps(sys.argv[1:]) + "\\n")
sys.stderr.write("a warning of another compiler")
"""


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`ffi/build.py`, as hatchling loads it; it writes its facts into a folder of the test."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "ffi" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FACTS", tmp_path / "facts.json")
    for name in ("CC", "CFLAGS", "CPPFLAGS", "AIOTRANSFER_SKIP_NATIVE", "AIOTRANSFER_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that has a warning for everything, and the file in which it notes what it was asked."""
    compiler = tmp_path / "another compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"'{compiler}' --of-the-user")
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return tmp_path / "asked"


def test_without_a_compiler_the_installation_fails_and_says_what_to_do(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(SystemExit) as refused:
        hook.build()
    assert all(words in str(refused.value) for words in ("no-such-compiler", *ADVICE))
    assert not hook.FACTS.exists()


@pytest.mark.parametrize("compiler", ["false", "true", "ls --no-such-option"])
def test_a_compiler_that_makes_nothing_is_named_and_the_installation_says_what_to_do(
    hook: Any, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    """`CC` is another program, or the C library is not installed."""
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(SystemExit) as refused:
        hook.build()
    assert all(words in str(refused.value) for words in (f"({compiler})", *ADVICE))
    assert not hook.FACTS.exists()


def test_without_the_headers_of_python_the_installation_fails(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook.sysconfig, "get_paths", lambda: {"include": "/no/such/folder"})
    with pytest.raises(SystemExit) as refused:
        hook.build()
    assert all(words in str(refused.value) for words in ("Python.h", *ADVICE))
    assert not hook.FACTS.exists()


def test_who_wants_no_extension_gets_none_and_the_reason_is_kept(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("AIOTRANSFER_SKIP_NATIVE", "1")
    assert hook.build() is None
    facts = json.loads(hook.FACTS.read_text())
    assert facts == {"built": False, "reason": "AIOTRANSFER_SKIP_NATIVE=1 was set when aiotransfer was installed"}


def test_warnings_of_another_compiler_do_not_fail_an_installation_and_its_flags_are_honoured(
    hook: Any, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPPFLAGS", "-I/opt/here")
    monkeypatch.setenv("CFLAGS", "-O1 -std=c99 '-DNAME=two words'")
    sources = hook.sources()
    assert len(hook.compile_own(tmp_path, hook.find_compiler(), [], sources)) == len(sources)
    calls = [json.loads(line) for line in asked.read_text().splitlines()]
    assert len(calls) == len(sources)
    for flags in calls:
        assert flags[0] == "--of-the-user"
        assert "-Werror" not in flags
        assert {"-I/opt/here", "-DNAME=two words", "-Wconversion"} <= set(flags)
        assert flags.index("-O3") < flags.index("-O1")  # the last one counts: the user's
        assert flags.index("-std=c99") < flags.index("-std=gnu11")  # ... but not where the code depends on it
        assert flags.index("-O1") < min(flags.index(needed) for needed in hook.NEEDED)


def test_lint_makes_every_warning_an_error_and_keeps_nothing(hook: Any, asked: Path, tmp_path: Path) -> None:
    hook.strict([str(tmp_path / "more.c")])
    calls = [json.loads(line) for line in asked.read_text().splitlines()]
    assert len(calls) == len(hook.sources()) + 1
    assert all("-Werror" in flags for flags in calls)
    assert sum(str(tmp_path / "more.c") in flags for flags in calls) == 1


def test_what_does_not_compile_is_an_error_with_the_words_of_the_compiler(hook: Any, tmp_path: Path) -> None:
    (tmp_path / "wrong.c").write_text("int main(void) { return nothing; }\n")
    with pytest.raises(SystemExit, match=r"(?s)wrong\.c does not compile.*nothing"):
        hook.compile_own(tmp_path, ["cc"], [], [tmp_path / "wrong.c"])


def test_making_the_environment_leaves_the_python_that_it_links_to_alone(tmp_path: Path) -> None:
    """That Python is the system's. As an ordinary user nothing may be written there; as root nothing should be."""
    system = tmp_path / "system-python"
    system.write_text('#!/bin/sh\nmkdir -p "$3/bin"\nln -sfn "$0" "$3/bin/python"\n')
    system.chmod(0o555)
    os.utime(system, (1, 1))
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".make").mkdir()
    (tmp_path / ".make" / "python").write_text(str(system))
    (tmp_path / ".make" / "system").touch()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for _ in range(2):
        done = subprocess.run(["make", ".venv/made"], cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert "up to date" in done.stdout
    assert (tmp_path / ".venv" / "bin" / "python").resolve() == system
    assert system.stat().st_mtime == 1
