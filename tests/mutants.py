"""Guards taken out one at a time: for each, some test must turn red.

    make mutants [ARGS="--only epoch,bounds"]

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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # this file is run by its path

from tests.mutants_kv import KV  # noqa: E402

LOG = "mutants.log"
PATIENCE = 300  # a mutant that hangs is a mutant that was noticed


@dataclass(frozen=True)
class Mutant:
    """One guard: where it stands, what takes its place, and who must notice."""

    name: str
    path: str
    guard: str
    instead: str
    tests: str


MUTANTS = (
    Mutant(
        "drain on cancel", "aiotransfer/engine/outcomes.py",
        "        self._sweeper.draining(cookie)\n        self._progress.poll()\n",
        "        transfer._end(CANCELLED, 0, None)\n",
        "tests/engine/test_cancellation.py tests/engine/test_write.py",
    ),
    Mutant(
        "withheld: foreign memory is for copiers", "ffi/lane/copiers.h",
        "return op->remote->foreign ? AT_RISK_FOREIGN : op->waits ? AT_RISK_SLOW : AT_RISK_NONE;", "return AT_RISK_NONE;",
        "tests/engine/test_withheld.py",
    ),
    Mutant(
        "withheld: one copier for a process", "ffi/lane/copiers.c",
        "(peer->process != 0 && one->peer->process == peer->process)", "0", "tests/engine/test_withheld.py",
    ),
    Mutant(
        "withheld: pages of ours are looked at", "ffi/lane/resident.c", "if (seen[i] & 1u) continue;", "continue;",
        "tests/engine/test_withheld.py",
    ),
    Mutant(
        "withheld: no lock during a copy", "ffi/lane/submit.c", "    at_unlock(lane);\n}\n\nstatic void end_here",
        "}\n\nstatic void end_here", "tests/engine/test_withheld.py",
    ),
    Mutant(
        "exec: the program is still the same", "ffi/shm/memory.c", "    if (!at_shm_unchanged(shm)) {", "    if (0) {",
        "tests/engine/test_replaced.py",
    ),
    Mutant(
        "punched: pages are counted", "ffi/shm/post.c", "if (is_punched(remote, k)) return AT_EPROTO;", "",
        "tests/engine/test_punched.py",
    ),
    Mutant(
        "registered: the storage of a tensor", "aiotransfer/engine/hold.py", "            owner = owner.untyped_storage()\n",
        "            break\n", "tests/engine/test_registered_memory.py",
    ),
    Mutant(
        "registered: no resize of an array", "aiotransfer/engine/hold.py", "            held.append(weakref.ref(owner))\n", "",
        "tests/engine/test_registered_memory.py",
    ),
    Mutant(
        "registered: no resize of a storage", "aiotransfer/engine/hold.py",
        "            held.append(_view_of(owner, torch))\n", "", "tests/engine/test_registered_memory.py",
    ),
    Mutant(
        "registered: no move into shared memory", "aiotransfer/engine/hold.py", "            held.append(_unshared(owner))\n", "",
        "tests/engine/test_registered_memory.py",
    ),
    Mutant(
        "registered: dense memory only", "aiotransfer/core/dense.py", "        if stride != expected:\n",
        "        if stride < expected:\n", "tests/core/test_dense.py",
    ),
    Mutant(
        "pages: what is checked is what is used", "ffi/lane/submit.c", "            op->remote_pages = own_remote;\n",
        "            op->remote_pages = order->remote_pages;\n", "tests/engine/test_changing_tables.py",
    ),
    Mutant(
        "pages: tables of a slice are copied before they are checked", "aiotransfer/engine/arguments.py",
        "        return pages.copy()\n", "        return pages\n", "tests/engine/test_changing_tables.py",
    ),
    Mutant(
        "vanishing memory: the kernel copies it", "ffi/shm/post.c",
        "        else if (op->region->file) error = at_own_copy(reads ? here : there, reads ? there : here, k);\n", "",
        "tests/engine/test_vanishing_memory.py",
    ),
    Mutant(
        "vanishing memory: it is not posted itself", "ffi/fabric/memory.c", "!op->region->file || v->bytes == 0", "v->bytes != 0",
        "tests/engine/test_vanishing_memory.py",
    ),
    Mutant(
        "memory of a GPU: only where it is taken", "ffi/lane/submit.c",
        "if (region->cuda >= 0 && !remote->peer->device) return AT_EDEVICE;", "", "tests/engine/test_staging.py",
    ),
    Mutant(
        "memory of a GPU: a cancel waits for the copy", "aiotransfer/engine/outcomes.py",
        "        if stage is not None and stage.moving and self._lane.usable:\n", "        if False:\n",
        "tests/engine/test_staging.py",
    ),
    Mutant(
        "addresses: a wildcard is never dialled", "aiotransfer/engine/engine.py", "Address.parse(address).dialable()",
        "Address.parse(address)", "tests/engine/test_addresses.py",
    ),
    Mutant(
        "addresses: a silent one holds nothing up", "aiotransfer/control/dialer.py", "timeout=STAGGER if more else None",
        "timeout=None", "tests/engine/test_addresses.py",
    ),
    Mutant(
        "pods: the kernel names the process at the other end", "aiotransfer/providers/pidfd.py",
        "        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)\n", "        return -1\n", "tests/hosts/test_pods.py",
    ),
    Mutant(
        "a required provider holds for the memory", "aiotransfer/engine/submit.py",
        "                    self._check_required(peer, require, region)", "                    pass",
        "tests/engine/test_paths.py",
    ),
    Mutant(
        "lease: only its holder", "aiotransfer/engine/submit.py",
        "if dst._grant.holder not in (0, self.incarnation):", "if False:", "tests/engine/test_leases.py",
    ),
    Mutant(
        "lease: waiting for who is inside", "ffi/shm/peer.c",
        "if (atomic_load(&shm->inbound->active[i].grant) == (uint64_t)slot + 1) return 1;",
        "if (shm == NULL && slot == 0) return 1;", "tests/engine/test_leases.py",
    ),
    Mutant(
        "epoch compare", "ffi/shm/shm.h",
        "if (atomic_load(remote->word) == remote->epoch && barred == 0) return AT_OK;", "if (barred == 0) return AT_OK;",
        "tests/engine/test_leases.py tests/engine/test_reads.py",
    ),
    Mutant(
        "epoch compare before a count", "ffi/shm/queue.c",
        "int rc = remote != NULL ? at_shm_enter(shm, &channel->active[AT_COUNTING], remote)", "int rc = remote != NULL ? AT_OK",
        "tests/engine/test_leases.py",
    ),
    Mutant(
        "fence of who does not confirm", "aiotransfer/engine/quarantine.py",
        "                held._fence()\n", "                pass\n", "tests/hosts/test_leases.py",
    ),
    Mutant(
        "waiting for a holder on another host", "ffi/fabric/letters.c",
        "return may_still && slot < end->hold_room", "return 0 && may_still && slot < end->hold_room",
        "tests/hosts/test_leases.py",
    ),
    Mutant(
        "bar on who was given up", "ffi/shm/peer.c",
        "    atomic_store(&shm->inbound->barred, 1);", "    (void)shm;",
        "tests/engine/test_leases.py tests/engine/test_processes.py",
    ),
    Mutant(
        "bounds of a page table", "ffi/lane/submit.c",
        "        for (uint64_t i = 0; i < k; i++) bad |= (uint64_t)((uint64_t)these[i] > (uint64_t)last);\n", "",
        "tests/engine/test_bad_input.py",
    ),
    Mutant(
        "bounds of a destination", "ffi/lane/submit.c",
        "if (order->remote_offset > there || n > there - order->remote_offset) return AT_EDST;", "",
        "tests/native tests/engine/test_bad_input.py",
    ),
    Mutant(
        "bounds of a scatter of arrays", "ffi/lane/plan.c",
        "if (!lies_in(from, n, src->nbytes)) return AT_ESRC;", "", "tests/engine/test_scatter.py",
    ),
    Mutant(
        "bounds of a scatter of arrays, there", "ffi/lane/plan.c",
        "if (!lies_in(at, n, to->limits[i]) || (to->remote_offsets == NULL && (uint64_t)n != to->limits[i])) return AT_EDST;", "",
        "tests/engine/test_scatter.py",
    ),
    Mutant(
        "a sum of rows by another way", "ffi/rows/tile.h",
        "        if (s->rows[k] == 0) continue;\n        const uint8_t *row = at_row_at(s->rows[k]) + column * width;\n",
        "        if (s->rows[k] == 0) break;\n        const uint8_t *row = at_row_at(s->rows[k]) + column * width;\n",
        "tests/providers/test_rows.py",
    ),
    Mutant(
        "early arrivals", "ffi/lane/imm.c",
        "int early = peer->early < lane->config.early_values;", "int early = 0;", "tests/engine/test_counters.py",
    ),
    Mutant(
        "authentication", "aiotransfer/control/key.py",
        "return hmac.compare_digest(self.mac(role, transcript), mac)", "return True",
        "tests/control/test_handshake.py tests/engine/test_peers.py",
    ),
    Mutant(
        "ids: a slot of operations whose generations are used up", "ffi/lane/ops.c",
        "if (lane->op_generation[index] < MOST_LIVES) lane->op_free", "lane->op_free", "tests/native/test_generations.py",
    ),
    Mutant(
        "ids: a slot of memory whose generations are used up", "ffi/lane/functions.h",
        "return generation < AT_MOST_LIVES ? generation + 1 : AT_MOST_LIVES + 2;", "return generation + 1;",
        "tests/native/test_generations.py",
    ),
    Mutant(
        "ids: a record whose generations are used up", "ffi/lane/values.c",
        "record->generation < AT_MOST_LIVES ? AT_IMM_FREE : AT_IMM_SPENT", "AT_IMM_FREE", "tests/native/test_generations.py",
    ),
    Mutant(
        "ids: a watch whose generations are used up", "ffi/lane/watch.c",
        "|| lane->watches[i].generation == AT_MOST_LIVES)", ")", "tests/native/test_generations.py",
    ),
    Mutant(
        "simulated network: what lies behind a region's end", "ffi/wire/wire.c",
        " && address - m->address <= m->nbytes &&", " &&", "tests/native/test_wire.py",
    ),
    Mutant(
        "kv: the immediate of a request only after the proof", "aiotransfer/kv/handle.py",
        "        self._decoder.forget(part.number for part in self._parts)\n",
        "        self._decoder.engine._values.give_back(self._counter)\n",
        "tests/kv/test_many.py",
    ),
    Mutant(
        "immediates: what a user names is not given to others", "aiotransfer/engine/values.py",
        "        self._proved.pop(value, None)\n", "", "tests/engine/test_counters.py",
    ),
    Mutant(
        "immediates: a full shelf is split, not widened", "ffi/lane/values.c",
        "shelf->mask + 1 < SLOTS || bit < LAST_BIT ? widen", "bit >= 0 ? widen", "tests/native/test_values.py",
    ),
    Mutant(
        "letters: a grant is confirmed when nothing is posted under it", "ffi/fabric/letters.c",
        " && !in_use(end, slot, after - 1)) {", ") {", "tests/native/test_letters.py",
    ),
    Mutant(
        "letters: what is named twice is owed once", "ffi/fabric/letters.c",
        "    end->over_count += (end->over[slot / 64] & bit) == 0;\n", "    end->over_count++;\n", "tests/native/test_letters.py",
    ),
    Mutant(
        "strangers: silent connections to a data port", "ffi/fabric/halfway.c",
        "    int seconds = DEFERRED;", "    int seconds = 0;", "tests/providers/test_silent_strangers.py",
    ),
    Mutant(
        "orders: the look after clearing", "ffi/shm/queue.c",
        "if (atomic_load(&channel->summary[w]) == 0) continue;",
        "if (atomic_load_explicit(&channel->summary[w], memory_order_relaxed) == 0) continue;", "tests/native/test_orders.py",
    ),
    Mutant(
        "orders: the look before sleeping", "ffi/shm/queue.c",
        "if (atomic_load(&channel->dirty) == 0 || peer->broke) return;",
        "if (atomic_load_explicit(&channel->dirty, memory_order_relaxed) == 0 || peer->broke) return;",
        "tests/native/test_orders.py",
    ),
    Mutant(
        "orders: word left before the turn is tried", "ffi/fabric/queue.c",
        "atomic_thread_fence(memory_order_seq_cst);                    /* order: turn wanted 2 */",
        "atomic_thread_fence(memory_order_relaxed);                    /* order: turn wanted 2 */", "tests/native/test_orders.py",
    ),
    Mutant(
        "hostile: a ring that cannot block", "ffi/shm/queue.c",
        "    uint64_t nothing = 0;", "    uint64_t nothing = 1;", "tests/control/test_hostile_shm.py",
    ),
    Mutant(
        "hostile: patience with rings", "ffi/shm/queue.c",
        "if (--shm->patience < 0)", "if (shm->patience < 0)", "tests/control/test_hostile_shm.py",
    ),
    Mutant(
        "lifetime: a lane keeps registered memory", "aiotransfer/providers/lane.py",
        """        self.holdings.hold("region", int(region), keep)\n""", "", "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "lifetime: a forgotten lane ends", "aiotransfer/providers/lane.py",
        "        weakref.finalize(self, self.holdings.end).atexit = False", "        weakref", "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "lifetime: native threads end before the interpreter", "aiotransfer/providers/holdings.py",
        "atexit.register(_at_exit)", "atexit", "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "lifetime: no thread is waited for without end", "ffi/lane/end.c",
        "while (is_busy(lane) && at_now() < until)", "while (is_busy(lane))", "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "lifetime: peers are shut out", "ffi/lane/end.c",
        "while (quiet && (*inside = peers_inside(lane)) != 0 && at_now() < until) {", "while (0) {",
        "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "lifetime: an engine whose loop is gone", "aiotransfer/engine/engine.py",
        "        if self._loop.is_closed():\n            take_apart(self)\n            return\n", "",
        "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "lifetime: a close that never began", "aiotransfer/engine/engine.py",
        "            self._closer.add_done_callback(lambda _: finish(self))  # cancelled before it began\n", "",
        "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "lifetime: descriptors that nobody took", "aiotransfer/providers/fdchannel.py",
        "        if self:\n            close_elsewhere(self)\n", "        pass\n", "tests/providers/test_fdchannel.py",
    ),
    Mutant(
        "hostile: pulses take a nap", "ffi/lane/thread.c",
        "if (at_now() - lane->pulse_answered < PULSE_NS) {", "if (0) {", "tests/control/test_hostile_shm.py",
    ),
    Mutant(
        "hostile: what a descriptor is", "ffi/shm/peer.c",
        "!is_eventfd(shm->outbound_doorbell) || !is_eventfd(shm->outbound_pulse)", "is_eventfd(-1)",
        "tests/control/test_hostile_shm.py",
    ),
    Mutant(
        "hostile: memory that is not allocated", "ffi/shm/memory.c",
        "if ((uint64_t)info.st_blocks * 512 < (uint64_t)info.st_size) return -ENODATA;", "", "tests/control/test_hostile_shm.py",
    ),
    Mutant(
        "hostile: forged loopback memory", "aiotransfer/providers/loopback.py",
        "if not owner.covers(grant):", "if False:", "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "hostile: values of the departed", "ffi/lane/imm.c",
        "    if (own == 0) return;", "    return;", "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "hostile: questions that wait", "aiotransfer/engine/connections.py",
        "if len(peer._answers) >= MOST_QUESTIONS or", "if", "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "kv: whose turn it is is not passed", "aiotransfer/kv/schedule.py", "full.add(job.peer)", "pass",
        "tests/kv/test_schedule.py",
    ),
    Mutant(
        "kv: who has had more than others waits", "aiotransfer/kv/schedule.py",
        "max(self._clock, self._ends.pop(job.request, 0))", "self._clock", "tests/kv/test_schedule.py",
    ),
    Mutant(
        "kv: blocks that changed places", "aiotransfer/kv/checksum.py", "blocks * weights[place]", "blocks",
        "tests/kv/test_checksum.py",
    ),
    Mutant(
        "resume: only with the session's secret", "aiotransfer/control/resume.py",
        '        self._verify("dialer", tag, frame.attempt, frame.received, frame.mac)\n', "", "tests/control/test_resume.py",
    ),
    Mutant(
        "resume: only the acceptor's own answer", "aiotransfer/control/resume.py",
        '        self._verify("acceptor", tag, self._attempt, frame.received, frame.mac)\n', "", "tests/control/test_resume.py",
    ),
    Mutant(
        "resume: not an attempt that was overtaken", "aiotransfer/control/resume.py", "if frame.attempt <= self._attempt:",
        "if False:", "tests/control/test_resume.py",
    ),
    Mutant(
        "resume: what had come is not sent again", "aiotransfer/control/resume.py", "for _ in range(received - least):",
        "for _ in range(received - least - 1):", "tests/control/test_resume.py",
    ),
    Mutant(
        "resume: the old connection is not heard", "aiotransfer/control/line.py", "        self.link.mute()\n", "",
        "tests/engine/test_redial.py",
    ),
    Mutant(
        "resume: not by another incarnation", "aiotransfer/control/dialer.py", "if incarnation != link.incarnation:",
        "if False:", "tests/engine/test_redial.py",
    ),
    Mutant("kv: another version", "aiotransfer/kv/wire.py", "if version != VERSION:", "if False:", "tests/kv/test_wire.py"),
    Mutant(
        "kv: what was mapped stays so", "aiotransfer/kv/ledger.py", "if request.delivered else asked.kept",
        "if False else asked.kept", "tests/kv/test_many.py",
    ),
    Mutant(
        "kv: withdrawn requests are taken out", "aiotransfer/kv/prefiller.py",
        "if 2 * self._withdrawn > len(self._offered):", "if False:", "tests/kv/test_many.py",
    ),
    Mutant(
        "kv: a span's parent", "aiotransfer/kv/tracing.py", "contexts.Context() if context is None else context", "None",
        "tests/kv/test_tracing.py",
    ),
    Mutant(
        "a passphrase is stretched", "aiotransfer/control/key.py",
        "    if _GENERATED.fullmatch(secret):\n", "    if secret:\n", "tests/control/test_key_file.py",
    ),
    Mutant(
        "a place that another user has taken", "aiotransfer/control/key.py",
        "if owner in (None, os.getuid()):", "if owner is not None or owner is None:", "tests/control/test_key_file.py",
    ),
    Mutant(
        "registry: only files of this user are entries", "aiotransfer/kv/registry/file.py",
        "            if status.st_uid != self._owner():\n", "            if status.st_uid < 0:\n",
        "tests/kv/registry/test_file.py",
    ),
    Mutant(
        "paths of one peer are bounded", "aiotransfer/engine/peer.py",
        ">= MOST_PATHS:\n", ">= 1 << 30:\n", "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "one at random makes room: control", "aiotransfer/control/listener.py",
        "one = random.choice(strangers)", "one = strangers[0]", "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "who has shown the key is no stranger", "aiotransfer/control/session.py",
        "return self.state in (\"await info\", \"established\")", "return self.state == \"established\"",
        "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "an incarnation is told after the proof, and covered", "aiotransfer/control/session.py",
        "            self._theirs = (version, frame.incarnation, nonce)\n", "            self._theirs = (version, 2, nonce)\n",
        "tests/control/test_handshake.py",
    ),
    Mutant(
        "what strangers sent is not closed on the loop", "aiotransfer/providers/elsewhere.py",
        "    _closer.close(fds)\n", "    for fd in fds:\n        _close(fd)\n", "tests/providers/test_fdlistener.py",
    ),
    Mutant(
        "what strangers sent is only looked at", "aiotransfer/providers/fdlistener.py",
        "parse(sock.recv(MOST_BYTES + 1, socket.MSG_PEEK), 0)", "parse(socket.recv_fds(sock, MOST_BYTES, 4)[0], 0)",
        "tests/providers/test_fdlistener.py",
    ),
    Mutant(
        "another user is dropped at once", "aiotransfer/providers/fdlistener.py",
        "welcome = self._uid in (None, uid)", "welcome = True", "tests/providers/test_fdlistener.py",
    ),
    Mutant(
        "one at random makes room: descriptors", "aiotransfer/providers/fdlistener.py",
        "random.choice([stranger for stranger in self._strangers.values() if users[stranger.uid] == most])",
        "next(stranger for stranger in self._strangers.values() if users[stranger.uid] == most)",
        "tests/providers/test_fdlistener.py",
    ),
    Mutant(
        "a friend waits in line", "aiotransfer/providers/fdchannel.py",
        "        sock = await _Line(name, seconds).wait(loop)\n", "        raise\n", "tests/providers/test_fdlistener.py",
    ),
    Mutant(
        "installation: no compiler is an error", "ffi/build.py", "    if missing:\n        raise SystemExit(",
        "    if missing:\n        print(", "tests/system/test_build.py",
    ),
    Mutant(
        "installation: a user's warnings are no errors", "ffi/build.py", 'flags = ["-O3", *WARNINGS,',
        'flags = ["-O3", "-Werror", *WARNINGS,', "tests/system/test_build.py",
    ),
    Mutant(
        "installation: the flags of the user", "ffi/build.py", "*of_the_user(), ", "", "tests/system/test_build.py",
    ),
    Mutant(
        "installation: a stamp is no link", "Makefile", "-m venv $(VENV)\n\t@touch $@",
        "-m venv $(VENV)\n\t@touch $@ $(VENV)/bin/python", "tests/system/test_build.py",
    ),
    Mutant(
        "group: who speaks for a member", "aiotransfer/engine/group.py",
        "        if (known is not None and known[0] is peer) or self._known(join.rank) is peer:\n",
        "        if True:\n", "tests/engine/test_groups.py",
    ),
    Mutant(
        "group: lists that differ", "aiotransfer/engine/rosters.py",
        "if there and lists and ours not in lists:",
        "if False:", "tests/engine/test_groups.py",
    ),
    Mutant(
        "group: a list that cannot be", "aiotransfer/engine/rosters.py",
        "size % MEMBER_BYTES or size > MOST_MEMBERS * MEMBER_BYTES:",
        "False:", "tests/engine/test_groups.py",
    ),
    Mutant(
        "reach: another engine is there", "aiotransfer/engine/reach.py",
        "        if found is not peer:\n            self._refused.add(peer)\n",
        "        if False:\n            self._refused.add(peer)\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "reach: what is held of a stranger", "aiotransfer/engine/reach.py",
        "len(claim.held) >= MOST_HELD or",
        "", "tests/engine/test_groups.py",
    ),
    Mutant(
        "MoE: who speaks for a rank", "aiotransfer/moe/party.py",
        "or self._at(content.rank) is message.peer:",
        "or True:", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: a reader goes on", "aiotransfer/moe/party.py",
        "        except Exception as error:\n            left_out = self._limit.admit(",
        "        except MemoryError as error:\n            left_out = self._limit.admit(", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: views that cannot be", "aiotransfer/moe/party.py",
        "        if wrong and (self.rank,",
        "        if False and (self.rank,", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: pieces of one message", "aiotransfer/moe/wire.py",
        "        if self._of != (piece.incarnation, piece.of) or piece.number != len(held):\n",
        "        if False:\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: length of a message in pieces", "aiotransfer/moe/wire.py",
        "        if piece.of * PIECE > self._most + PIECE:\n",
        "        if False:\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: ranks that are gone", "aiotransfer/moe/members.py",
        "return len(self._gone) + len(self._present) >= MOST_GONE",
        "return False", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: a rank that cannot set up says so", "aiotransfer/moe/meeting.py",
        "                self._send_to(peer, unable)\n",
        "                pass\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: connected ranks are not dialled", "aiotransfer/moe/meeting.py",
        "                if rank not in found and (peer := self._at(rank)) is not None:\n",
        "                if False and (peer := self._at(rank)) is not None:\n", "tests/moe/test_identity.py",
    ),
    Mutant(
        "MoE: whatever an argument raises", "aiotransfer/moe/alltoall.py",
        "            except BaseException as error:  # whatever it is", "            except (TypeError, ValueError) as error:  #",
        "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: a deadline that cannot be uses up the step", "aiotransfer/moe/alltoall.py",
        "            refusal, timeout = error, None\n", "            raise\n", "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: a first write that was not taken", "aiotransfer/moe/step.py",
        "            party.next_step = self.number\n            raise\n", "            raise\n", "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: digest of routing", "aiotransfer/moe/step.py",
        "elif any(mate.digest != head.digest for mate in mates):", "elif False:", "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: tags are compared", "aiotransfer/moe/step.py",
        "if len(tags := {head.tag for head in heads.values()}) > 1:", "tags = set(b'')\n        if len(tags) > 1:",
        "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: counts of a header", "aiotransfer/moe/buffers.py",
        "        if rows > self.tokens * shape.topk:\n", "        if False:\n", "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: sums over what is still read", "aiotransfer/moe/handle.py",
        "    if overlap(memory, stride, results, results_stride, shape.result_bytes):\n", "    if False:\n",
        "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: innocents in deadlines", "aiotransfer/moe/traffic.py",
        "if found := [r for r in waited if party.counter(kind, self.slot, r).value < expected[r]]:", "if found := waited:",
        "tests/moe/test_out_of_step.py",
    ),
    Mutant(
        "MoE: gradients that nobody gets", "aiotransfer/moe/tensors.py",
        'if getattr(array, "requires_grad", False) and', "if False and", "tests/moe/test_torch.py",
    ),
    Mutant(
        "mistakes: what belongs to a loop is not pickled", "aiotransfer/engine/unpicklable.py",
        "        raise TypeError(", "        return object.__reduce_ex__(self, 2)\n        raise TypeError(",
        "tests/engine/test_mistakes.py",
    ),
    Mutant(
        "mistakes: an engine needs asyncio", "aiotransfer/engine/open.py", "        _need_asyncio()\n", "",
        "tests/engine/test_mistakes.py",
    ),
    Mutant(
        "mistakes: a forgotten await", "aiotransfer/engine/open.py", 'if not self.__dict__.get("_awaited", True):', "if False:",
        "tests/engine/test_mistakes.py",
    ),
    Mutant(
        "mistakes: a rank that waits for itself", "aiotransfer/engine/group.py",
        'peer._check_other(f"member {rank} of the group ({self.members[rank]})")', "pass", "tests/engine/test_mistakes.py",
    ),
    Mutant(
        "plugin: names of our own", "aiotransfer_pytest.py", "def aiotransfer_payload(", "def payload(",
        "tests/testing/test_plugin.py",
    ),
    Mutant(
        "names are looked up before they are dialled", "aiotransfer/rendezvous/environment.py",
        "                found = await loop.getaddrinfo(",
        "                await asyncio.open_connection(launch.host, 4)\n                found = await loop.getaddrinfo(",
        "tests/control/test_names.py",
    ),
)  # fmt: skip


def copy(where: Path) -> None:
    """What git knows of, and what was built."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, where / name)
    for built in ROOT.glob("aiotransfer/_*.so"):
        shutil.copy2(built, where / "aiotransfer" / built.name)
    shutil.copy2(ROOT / "aiotransfer" / "_build_facts.json", where / "aiotransfer")


def run(where: Path, tests: str) -> int:
    """pytest's exit status there; -1 when it did not end."""
    environ = {**os.environ, "PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", *tests.split()]
    with open(where / LOG, "wb") as log:
        process = subprocess.Popen(command, cwd=where, env=environ, stdout=log, stderr=log)
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return -1


def build(where: Path, **changes: str) -> None:
    """The extension in the copy."""
    environ = {**os.environ, "PYTHONPATH": str(where), **changes}
    done = subprocess.run([sys.executable, "ffi/build.py"], cwd=where, capture_output=True, text=True, env=environ)
    if done.returncode != 0 or "does not compile" in done.stdout + done.stderr:
        raise SystemExit(done.stdout + done.stderr)


def main() -> int:
    """Returns the number of guards that nothing watches."""
    parser = argparse.ArgumentParser(description="guards taken out one at a time")
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parts = [part for part in parser.parse_args().only.split(",") if part]
    every = (*MUTANTS, *(Mutant(*guard) for guard in KV))
    chosen = [mutant for mutant in every if not parts or any(part in mutant.name for part in parts)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        copy(where)
        tests = sorted({test for mutant in chosen for test in mutant.tests.split()})
        if status := run(where, " ".join(tests)):
            print((where / LOG).read_text()[-3000:])
            print(f"the tests are not green as they are: pytest ended with {status}")
            return 1
        for mutant in chosen:
            file = where / mutant.path
            text = file.read_text()
            if text.count(mutant.guard) != 1:
                print(f"{mutant.name}: the guard stands {text.count(mutant.guard)} times in {mutant.path}")
                survivors += 1
                continue
            native = mutant.path.startswith("ffi/")
            file.write_text(text.replace(mutant.guard, mutant.instead))
            start = time.monotonic()
            if native:
                build(where)
            status = run(where, mutant.tests)
            survivors += status == 0
            verdict = "SURVIVED" if status == 0 else "hung" if status < 0 else "red"
            print(f"{mutant.name:<40} {verdict:<9} {time.monotonic() - start:5.1f} s", flush=True)
            file.write_text(text)
            if native:
                build(where)
    return survivors


if __name__ == "__main__":
    raise SystemExit(main())
