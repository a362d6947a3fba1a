"""Guards of weights from and to files."""

from __future__ import annotations

from tests.guards.mutant import Mutant

WEIGHTS, TESTS = "aiotransfer/weights", "tests/weights/checkpoint"
GUARDS = (
    Mutant(
        "weights: a header is as long as its file allows", f"{WEIGHTS}/checkpoint/header.py",
        "    if length > min(MOST_HEADER, file.nbytes - 8):\n", "    if length > 1 << 64:\n", f"{TESTS}/test_opening.py",
    ),
    Mutant(
        "weights: what is no regular file is not read", f"{WEIGHTS}/memory/files.py",
        "        if not stat.S_ISREG(now.st_mode):\n", "        if False:\n", "tests/weights/memory/test_files.py",
    ),
    Mutant(
        "weights: a read that comes back short", f"{WEIGHTS}/memory/files.py",
        "            if not count:\n", "            if not count:\n                return\n            if False:\n",
        "tests/weights/memory/test_files.py",
    ),
    Mutant(
        "weights: files must rest", f"{WEIGHTS}/publisher/filed.py",
        "        if changed := self._bound.changed(self._bound.opened()):\n", "        if changed := list[str]():\n",
        f"{TESTS}/test_publishing.py",
    ),
    Mutant(
        "weights: publishers of files and of memory have no plan in common", f"{WEIGHTS}/publisher/work.py",
        "context.layout.digest, where, self._rules", "context.layout.digest, self._rules", f"{TESTS}/test_publishing.py",
    ),
    Mutant(
        "weights: an index names files of its own folder", f"{WEIGHTS}/checkpoint/finding.py",
        "        if outside is not None:\n", "        if False:\n", f"{TESTS}/test_opening.py",
    ),
    Mutant(
        "weights: an index names tensors that are there", f"{WEIGHTS}/checkpoint/opening.py",
        "in sorted((wanted or frozenset()) - header.tensors.keys())]", "in ()]", f"{TESTS}/test_opening.py",
    ),
    Mutant(
        "weights: files of two saves", f"{WEIGHTS}/checkpoint/opening.py",
        "    if len(saves) < 2:\n", "    if True:\n", f"{TESTS}/test_opening.py",
    ),
    Mutant(
        "weights: what is lent stays lent while other memory is written", f"{WEIGHTS}/subscriber/lending.py",
        " if of is None or lend[0] is of}", "}", f"{TESTS}/test_saving.py",
    ),
    Mutant(
        "weights: files that an index names are not removed", f"{WEIGHTS}/checkpoint/placing.py",
        "            if OURS.fullmatch(real) and name not in named:\n", "            if OURS.fullmatch(real):\n",
        f"{TESTS}/test_saving.py",
    ),
    Mutant(
        "weights: one save at a time", f"{WEIGHTS}/checkpoint/placing.py",
        "        except BlockingIOError:\n            raise ConfigurationError(TAKEN.format(self.path)) from None\n",
        "        except BlockingIOError:\n            return\n", f"{TESTS}/test_saving.py",
    ),
    Mutant(
        "weights: trainers' files appear when the version does", f"{WEIGHTS}/checkpoint/saving.py",
        "    update.afterwards(await saving.write(OfTrainers(role, update), update.version))\n",
        "    (await saving.write(OfTrainers(role, update), update.version)).commit()\n", f"{TESTS}/test_saving.py",
    ),
    Mutant(
        "weights: a cancel waits for work on memory that is used again", f"{WEIGHTS}/memory/aside.py",
        "        await wait_shielded(task)\n        if not task.cancelled():\n", "        if task.done():\n",
        "tests/weights/memory/test_aside.py",
    ),
)  # fmt: skip
