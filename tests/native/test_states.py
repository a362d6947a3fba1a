"""The states of a fabric's connection: builds with a sanitizer let pass the steps of the table in fabric.h, and no others."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FFI = HERE.parent.parent / "ffi"
HEADER = (FFI / "fabric" / "fabric.h").read_text()
STATES = re.search(r"enum at_fab_state \{ (.*) \};", HEADER)
STATE = r"^ \*   (\w+)" + 4 * r" +(x|-|any)(?= )"
STEP = r"^ \*   ([A-Z]+|each) +([A-Z]+) +\S"


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and a compiler")
def test_the_steps_that_pass_are_those_of_the_table(tmp_path: Path) -> None:
    assert STATES is not None
    number = {name.removeprefix("AT_CONN_"): place for place, name in enumerate(STATES[1].split(", "))}
    flags_of = {name: "".join(flags) for name, *flags in re.findall(STATE, HEADER, re.M)}
    assert flags_of.keys() == number.keys()
    state_of = {flags: name for name, flags in flags_of.items() if "any" not in flags}
    state_of |= {"-" + "".join(rest): "CLOSED" for rest in itertools.product("x-", repeat=3)}
    steps = [(source, target) for source, target in re.findall(STEP, HEADER, re.M) if target in number]
    allowed = {(name, target) for source, target in steps for name in number if source in (name, "each")}
    allowed |= {(name, name) for name in number}  # nothing has changed
    assert len(steps) == 8

    program = tmp_path / "states"
    own = [str(f) for folder in ("lane", "fabric") for f in sorted((FFI / folder).glob("*.c"))]
    flags = ["-std=gnu11", "-O1", "-pthread", "-D__SANITIZE_ADDRESS__=1", f"-I{FFI}"]
    command = ["cc", *flags, str(HERE / "states.c"), *own, "-o", str(program), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    every = ["".join(flags) for flags in itertools.product("x-", repeat=4)]
    done = subprocess.run([str(program), *every], capture_output=True, text=True, check=True, timeout=60)
    passed = {tuple(line.split()) for line in done.stdout.splitlines()}
    wanted = {(str(number[a]), said) for said, b in state_of.items() for a in number if (a, b) in allowed}
    assert passed == wanted
