"""The native code under sanitizers: the contract of the providers, the native tests, the tests of what several threads do, chaos.

    python -m tests.sanitize address [--chaos 300] [--only tests/native]       (and `thread`: `make sanitize`)
    python -m tests.sanitize thread --whole [--chaos 1000]                     (and `address`: `make test-sanitize`)

The tree is copied and the extension built there with the sanitizer, so that the plain build is never gone. First come the
canaries: mistakes made on purpose, in an object of their own and by the extension's own copy routine; each must be caught, and
code without a mistake must not be, or the run proves nothing. Reports go to files, which processes that are killed or that nobody
waits for write as well: one report of any process fails the run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutants import build, copy

THREADED = ("bad_input", "counters", "scatter", "threads", "watch", "leases", "plans", "reads")
SHARE = (  # what `make sanitize` runs, and with it every run of the continuous integration
    "tests/native",
    "tests/providers",
    "tests/weights/kernels/test_convert.py",
    "tests/control/test_hostile_shm.py",
    *(f"tests/engine/test_{name}.py" for name in THREADED),
)
WHOLE = (*SHARE, "tests/engine", "tests/control", "tests/testing", "tests/reliability/test_chaos.py")
EXTENSION = """
import numpy as np
from threading import Barrier, Thread
from aiotransfer.providers.native import ffi, lib
source, target = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.uint8)
source_p, target_p = ffi.cast("void *", source.ctypes.data), ffi.cast("void *", target.ctypes.data)
def copy(times, n):
    for _ in range(times): lib.at_bench_once(target_p, source_p, n, 0)
"""
SUPPRESSED = Path(__file__).resolve().parent / "native" / "thread_sanitizer.supp"


@dataclass(frozen=True)
class Sanitizer:
    """How one is built and run, and the mistakes that it must catch: code, and what the report says of it."""

    flags: str
    libraries: tuple[str, ...]
    environ: dict[str, str]
    canaries: dict[str, tuple[str, str]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def _object(call: str) -> str:
    return f"import ctypes, os\nctypes.CDLL(os.environ['CANARY']).{call}\n"


SANITIZERS = {
    "address": Sanitizer(
        "address,undefined",
        ("libasan.so", "libubsan.so"),
        # leaks are valgrind's (tests/native/test_valgrind.py): the interpreter itself leaves much behind
        {
            "ASAN_OPTIONS": "detect_leaks=0:log_path={log}",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "REPORTS": "{log}",
        },
        {
            "overflow": (_object("overflow(8)"), "heap-buffer-overflow"),
            "use after free": (_object("use_after_free(8)"), "heap-use-after-free"),
            "undefined": (_object("undefined(0x7FFFFFFF)"), "signed integer overflow"),
            "overflow in the extension": (EXTENSION + "copy(1, (1 << 16) + 1)\n", "heap-buffer-overflow"),
        },
    ),
    "thread": Sanitizer(
        "thread",
        ("libtsan.so",),
        {"TSAN_OPTIONS": f"second_deadlock_stack=1:exitcode=66:suppressions={SUPPRESSED}:print_suppressions=0:log_path={{log}}"},
        {
            "race": (_object("race(1000)"), "data race"),
            "race in the extension": (
                EXTENSION + "other = Thread(target=copy, args=(2000, 4096))\nother.start()\ncopy(2000, 4096)\nother.join()\n",
                "data race",
            ),
        },
        (
            # two writes of a user to the same place at the same time: allowed, without an order; the race is his
            "tests/engine/test_plans.py::test_posts_may_overlap",
            # threads that a withheld page holds are left behind on purpose, which is reported; and what is written to a
            # source while it waits for such a page is a race of the test
            "tests/engine/test_withheld.py",
            "tests/engine/test_lifetime.py::test_a_stuck_native_thread_keeps_what_it_uses_and_holds_nobody_up",
            # its memory lies at an address that the sanitizer keeps for itself
            "tests/engine/test_replaced.py",
            # how much is done within some ms is asked of the plain build: this one is ten times slower
            "tests/engine/test_one_sided.py::test_bytes_and_counts_land_in_a_blocked_process",
            "tests/engine/test_leases.py::test_nothing_lands_or_counts_after_a_revoke_under_fire",
            # libfabric is not instrumented: no race is reported, but some connections among several are not made within
            # peer_timeout when everything around it is ten times slower
            "tests/providers/fabric/test_fabric.py",
        ),
    ),
}
# libubsan beside libasan takes no log_path: its function for that is hidden behind libasan's of the same name.
SITE = """
import ctypes, os
if "REPORTS" in os.environ: ctypes.CDLL("libubsan.so.1").__sanitizer_set_report_path(os.environ["REPORTS"].encode())
"""
# The thread sanitizer now and then wants more address space for its shadow than there is, and ends the process. Nothing else may
# stand in the report then.
GAVE_UP = re.compile(r"\s*==\d+==ERROR: \w+Sanitizer failed to allocate 0x\w+ \(\d+\) bytes at address \w+ \(errno: \d+\)\s*")
ATTEMPTS = 3
FAULTLESS = {"clean": _object("clean(8)"), "clean in the extension": EXTENSION + "copy(10, 1 << 16)\n"}


class Tree:
    """A copy of the sources, built with one sanitizer."""

    def __init__(self, where: Path, sanitizer: Sanitizer) -> None:
        self.where, self.sanitizer = where, sanitizer
        self.logs = where / "sanitizer"
        self.logs.mkdir()
        copy(where)
        build(where, AIOTRANSFER_SANITIZE=sanitizer.flags)
        (where / "sitecustomize.py").write_text(SITE)
        canary = where / "canary.so"
        flags = [f"-fsanitize={sanitizer.flags}", "-g", "-O1", "-shared", "-fPIC", "-pthread"]
        subprocess.run(["cc", *flags, str(where / "tests/native/canary.c"), "-o", str(canary)], check=True)
        places = {"log": str(self.logs / "report")}
        found = [
            subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
            for name in sanitizer.libraries
        ]
        self.environ = {
            **os.environ,
            **{name: text.format(**places) for name, text in sanitizer.environ.items()},
            "LD_PRELOAD": " ".join(done.stdout.strip() for done in found),
            "PYTHONPATH": str(where),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CANARY": str(canary),
        }

    def run(self, *arguments: str) -> int:
        """Python's exit status."""
        return subprocess.run([sys.executable, *arguments], cwd=self.where, env=self.environ).returncode

    def reports(self) -> str:
        """What the sanitizer wrote since it was last asked."""
        text = ""
        for file in sorted(self.logs.iterdir()):
            text += file.read_text(errors="replace")
            file.unlink()
        return text

    def canaries(self) -> int:
        """How many of them were not treated as they must."""
        wrong = 0
        for name, code in FAULTLESS.items():
            status, report = self.run("-c", code), self.reports()
            wrong += bool(status or report)
            print(f"canary {name}: {'passes' if not status and not report else f'FAILED ({status}) {report}'}", flush=True)
        for name, (code, words) in self.sanitizer.canaries.items():
            status, report = self.run("-c", code), self.reports()
            caught = status != 0 and words in report
            wrong += not caught
            print(f"canary {name}: {'caught' if caught else f'NOT CAUGHT ({status}) {report}'}", flush=True)
        return wrong


def main() -> int:
    """Returns 0 when the canaries were caught and nothing else was found."""
    parser = argparse.ArgumentParser(prog="tests.sanitize")
    parser.add_argument("sanitizer", choices=sorted(SANITIZERS))
    parser.add_argument("--whole", action="store_true", help="all tests of the native code, not only a share")
    parser.add_argument("--only", default="", help="these arguments for pytest instead")
    parser.add_argument("--chaos", type=int, default=0, help="so many chaos runs as well")
    arguments = parser.parse_args()
    tests = shlex.split(arguments.only) or [*(WHOLE if arguments.whole else SHARE)]
    with tempfile.TemporaryDirectory(prefix="sanitize-") as folder:
        tree = Tree(Path(folder), SANITIZERS[arguments.sanitizer])
        if tree.canaries():
            print("the canaries were not caught: a run would prove nothing")
            return 1
        begun, failed = time.monotonic(), []
        tests += [f"--deselect={test}" for test in tree.sanitizer.left_out]
        for left in reversed(range(ATTEMPTS)):
            status, report = tree.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=600", *tests), tree.reports()
            if not left or not GAVE_UP.fullmatch(report):
                break
            print(f"the sanitizer gave up by itself and says nothing of the code: {report.strip()}; once more", flush=True)
        if status:
            failed.append("tests")
        if arguments.chaos and tree.run("-m", "tests.reliability.chaos", "--runs", str(arguments.chaos)):
            failed.append("chaos")
        if report := report + tree.reports():
            print(report[:100_000])
            failed.append("reports of the sanitizer")
    print(f"{arguments.sanitizer} sanitizer: {', '.join(failed) or 'nothing found'}, {time.monotonic() - begun:.0f} s")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
