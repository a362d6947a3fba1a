"""Guards of publishers and subscribers of weights."""

from __future__ import annotations

from tests.guards.mutant import Mutant

GUARDS = (
    Mutant(
        "weights: a report from before the last Pass says nothing",
        "aiotransfer/weights/protocol/agreement.py",
        "        member.held = passed == member.passes\n",
        "        member.held = True\n",
        "tests/weights/test_agreement.py",
    ),
    Mutant(
        "weights: a rank that is asked heeds rank 0 no more",
        "aiotransfer/weights/protocol/agreement.py",
        '        self.lose_chair()\n        if self.state in ("doubt", "cut off"):',
        '        if self.state in ("doubt", "cut off"):',
        "tests/weights/test_agreement.py",
    ),
    Mutant(
        "weights: versions only rise",
        "aiotransfer/weights/protocol/version.py",
        "        if version <= self.highest:\n",
        "        if False:\n",
        "tests/weights/test_agreement.py",
    ),
    Mutant(
        "weights: an epoch has one owner",
        "aiotransfer/weights/protocol/version.py",
        "        if version.epoch == self.highest.epoch and self.life not in (0, life):\n",
        "        if False:\n",
        "tests/weights/test_agreement.py",
    ),
    Mutant(
        "weights: an outcome that was heard stands",
        "aiotransfer/weights/publisher/update.py",
        "            if self._error is not None and self._outcome is None:",
        "            if self._error is not None:",
        "tests/weights/test_roles.py",
    ),
    Mutant(
        "weights: sources must rest",
        "aiotransfer/weights/publisher/memory.py",
        "        if changed:\n",
        "        if False:\n",
        "tests/weights/test_faults.py",
    ),
    Mutant(
        "weights: bytes that came are those that were sent",
        "aiotransfer/weights/checksum.py",
        "    if sum_of_pieces(layout, rank, regions, names) != sent & MASK:\n",
        "    if False:\n",
        "tests/weights/test_faults.py",
    ),
    Mutant(
        "weights: in place there is no version from the first fence on",
        "aiotransfer/weights/subscriber/session.py",
        "            role.unset()\n        await role.revoke_lends()\n",
        "        await role.revoke_lends()\n",
        "tests/weights/test_faults.py",
    ),
    Mutant(
        "weights: a native call has so many writes",
        "aiotransfer/weights/publisher/sending.py",
        "for k in range(a, b, MOST_WRITES)]",
        "for k in (a,)]",
        "tests/weights/scale/test_replay.py",
    ),
    Mutant(
        "weights: memory of a subscriber that left is let go",
        "aiotransfer/weights/publisher/publisher.py",
        "                self.mappings.left(peer, message.instance, message.rank)\n",
        "",
        "tests/weights/test_mappings.py",
    ),
    Mutant(
        "weights: memory of subscribers stays mapped, of so many grants",
        "aiotransfer/weights/publisher/mappings.py",
        "deque(maxlen=SETS)",
        "deque(maxlen=None)",
        "tests/weights/test_mappings.py",
    ),
    Mutant(
        "weights: what shows an update and fails is not called again",
        "aiotransfer/weights/progress.py",
        "        if not self._show(last=False):\n            self._stop()\n",
        "        self._show(last=False)\n",
        "tests/weights/test_progress.py",
    ),
    Mutant(
        "weights: what is shown never falls",
        "aiotransfer/weights/progress.py",
        "max(self._done, min(self._count(), self._total))",
        "self._count()",
        "tests/weights/test_progress.py",
    ),
    Mutant(
        "weights: a bar is taken away however the update ends",
        "aiotransfer/weights/publisher/update.py",
        "        if self._showing is not None:\n            self._showing.close()\n",
        "",
        "tests/weights/test_progress.py",
    ),
    Mutant(
        "weights: a subscriber's progress ends with its version",
        "aiotransfer/weights/subscriber/session.py",
        "        if self._showing is not None:\n            self._showing.close()\n",
        "        pass\n",
        "tests/weights/test_progress.py",
    ),
    Mutant(
        "weights: an instance that was left behind is counted once",
        "aiotransfer/weights/metrics.py",
        "        if record.rank == 0:\n",
        "        if True:\n",
        "tests/weights/test_metrics.py",
    ),
    Mutant(
        "weights: a wait for the first version is no pause",
        "aiotransfer/weights/subscriber/gate.py",
        "        if self._shut is not None:\n            self._closed_for",
        "        if True:\n            self._closed_for",
        "tests/weights/test_records.py",
    ),
)
