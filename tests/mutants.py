"""Guards taken out one at a time: for each, some test must turn red.

    make mutants [ARGS="--only epoch,bounds --jobs 2"]

The tree is copied, changed in one place, built where that is C, and the tests named with the guard are run there. A guard whose
tests stay green is one that nothing watches: the command fails and names it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # this file is run by its path

from tests.guards import EVERY  # noqa: E402
from tests.guards.mutant import Mutant  # noqa: E402

LOG = "mutants.log"
TIMEOUT = 300  # a mutant that hangs is a mutant that was noticed


def copy(where: Path) -> None:
    """What git knows of, and what was built."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, where / name)
    for built in ROOT.glob("aiotransfer/_*.so"):
        shutil.copy2(built, where / "aiotransfer" / built.name)
    shutil.copy2(ROOT / "aiotransfer" / "_build_facts.json", where / "aiotransfer")


def run(where: Path, tests: str, timeout: float = TIMEOUT) -> int | None:
    """pytest's exit status there, negative for a signal; None when it did not end in `timeout` seconds."""
    environ = {**os.environ, "PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", *tests.split()]
    with open(where / LOG, "wb") as log:
        process = subprocess.Popen(command, cwd=where, env=environ, stdout=log, stderr=log)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def build(where: Path, **changes: str) -> None:
    """The extension in the copy, with these changes of the environment."""
    environ = {**os.environ, "PYTHONPATH": str(where), **changes}
    done = subprocess.run([sys.executable, "ffi/build.py"], cwd=where, capture_output=True, text=True, env=environ)
    if done.returncode != 0 or "does not compile" in done.stdout + done.stderr:
        raise SystemExit(done.stdout + done.stderr)


def survives(where: Path, mutant: Mutant) -> bool:
    """Take the guard out of the copy, look, and put it back."""
    file = where / mutant.path
    text = file.read_text()
    if text.count(mutant.guard) != 1:
        print(f"{mutant.name}: the guard stands {text.count(mutant.guard)} times in {mutant.path}", flush=True)
        return True
    native = {built: built.read_bytes() for built in where.glob("aiotransfer/_*.so")} if mutant.path.startswith("ffi/") else {}
    file.write_text(text.replace(mutant.guard, mutant.instead))
    start = time.monotonic()
    if native:
        build(where, CFLAGS="-O0")  # most of the time of a mutant would go by here
    status = run(where, mutant.tests)
    verdict = "hung" if status is None else "SURVIVED" if status == 0 else "crashed" if status < 0 else "red"
    print(f"{mutant.name:<40} {verdict:<9} {time.monotonic() - start:5.1f} s", flush=True)
    file.write_text(text)
    for built, content in native.items():
        built.write_bytes(content)
    return status == 0


def share(chosen: list[Mutant]) -> int:
    """Those in a copy of their own, until `chosen` is empty; how many survived."""
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        while chosen:
            survivors += survives(Path(folder), chosen.pop(0))
    return survivors


def main() -> int:
    """Returns the number of guards that nothing watches."""
    parser = argparse.ArgumentParser(description="guards taken out one at a time")
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default 1)")
    parser.add_argument("--unchecked", action="store_true", help="their tests are known to be green as they are")
    arguments = parser.parse_args()
    parts = [part for part in arguments.only.split(",") if part]
    chosen = [mutant for mutant in EVERY if not parts or any(part in mutant.name for part in parts)]
    if not arguments.unchecked:
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            copy(where)
            tests = sorted({test for mutant in chosen for test in mutant.tests.split()})
            if (status := run(where, " ".join(tests), 20 * TIMEOUT)) != 0:
                print((where / LOG).read_text()[-3000:])
                print(f"the tests are not green as they are: pytest ended with {status}")
                return 1
    with ThreadPoolExecutor(arguments.jobs) as pool:
        return sum(pool.map(share, [chosen] * arguments.jobs))


if __name__ == "__main__":
    raise SystemExit(main())
