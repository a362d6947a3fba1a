"""The commands, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys

from aiotransfer.cli import COMMANDS

WITHOUT_EXTENSION = (
    "import sys; sys.modules['aiotransfer._native'] = None; from aiotransfer.cli import main; sys.exit(main(sys.argv[1:]))"
)


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "aiotransfer"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=100, check=False)


def test_hello_shows_the_idea_and_the_error_of_a_killed_peer() -> None:
    done = run("hello", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    text = json.dumps(report)
    assert "PeerLostError" in text
    assert "hint" in text
    assert done.stderr == ""


def test_doctor_finds_what_works_and_tries_it() -> None:
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    facts = report["facts"]
    usable = {name for name, state in facts["providers"]["data"].items() if state == "ok"}
    assert {"shm", "loopback"} <= usable
    assert facts["self test"]["data"] == dict.fromkeys(usable, "ok")
    assert facts["providers"]["data"]["verbs"] != "ok"
    assert facts["foreign memory"]["data"]
    assert "aiotransfer works here" in run("doctor").stdout


def test_doctor_without_the_extension_says_what_to_do() -> None:
    done = run("doctor", code=WITHOUT_EXTENSION)
    assert done.returncode == 1
    assert "install a C compiler" in done.stdout
    assert done.stderr == ""


def test_every_command_explains_itself() -> None:
    for name in COMMANDS:
        assert run(name, "--help").returncode == 0
    assert run().returncode == 2
