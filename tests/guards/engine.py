"""Guards of the engine."""

from __future__ import annotations

from tests.guards.mutant import Mutant

GUARDS = (
    Mutant(
        "drain on cancel", "aiotransfer/engine/operations/inflight.py",
        "        self.deadlines.draining(cookie)\n        engine._progress.poll()\n",
        "        transfer._end(CANCELLED, 0, None)\n",
        "tests/engine/test_cancellation.py tests/engine/test_write.py",
    ),
    Mutant(
        "registered: the storage of a tensor", "aiotransfer/engine/memory/hold.py",
        "            owner = owner.untyped_storage()\n",
        "            break\n", "tests/engine/test_registered_memory.py",
    ),
    Mutant(
        "registered: no resize of an array", "aiotransfer/engine/memory/hold.py",
        "            held.append(weakref.ref(owner))\n", "",
        "tests/engine/test_registered_memory.py",
    ),
    Mutant(
        "registered: no resize of a storage", "aiotransfer/engine/memory/hold.py",
        "            held.append(_view_of(owner, torch))\n", "", "tests/engine/test_registered_memory.py",
    ),
    Mutant(
        "registered: no move into shared memory", "aiotransfer/engine/memory/hold.py",
        "            held.append(_unshared(owner))\n", "",
        "tests/engine/test_registered_memory.py",
    ),
    Mutant(
        "registered: dense memory only", "aiotransfer/core/dense.py", "        if stride != expected:\n",
        "        if stride < expected:\n", "tests/core/test_dense.py",
    ),
    Mutant(
        "pages: tables of a slice are copied before they are checked", "aiotransfer/engine/runtime/arguments.py",
        "        return pages.copy()\n", "        return pages\n", "tests/engine/test_changing_tables.py",
    ),
    Mutant(
        "memory of a GPU: a cancel waits for the copy", "aiotransfer/engine/operations/inflight.py",
        "        if stage is not None and stage.moving and engine._lane.usable:\n", "        if False:\n",
        "tests/engine/test_staging.py",
    ),
    Mutant(
        "transfers: the way that the bytes took", "aiotransfer/engine/operations/transfer.py",
        "self._keep = None if peer is None or len(peer._paths) < 2 else self.path", "self._keep = None",
        "tests/engine/test_paths.py",
    ),
    Mutant(
        "paths: a host that is not known is no other one", "aiotransfer/engine/peers/paths.py",
        "not apart(name, ours.host, theirs.host)", "theirs.host == ours.host", "tests/engine/test_paths.py",
    ),
    Mutant(
        "closing: one deadline for all steps", "aiotransfer/engine/ending.py",
        "SHARE * engine.config.drain_timeout", "engine.config.drain_timeout", "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "addresses: a star is a wildcard, too", "aiotransfer/model/address.py",
        '    if host == "*":', '    if host == "**":', "tests/model/test_address.py",
    ),
    Mutant(
        "addresses: a wildcard is never dialled", "aiotransfer/engine/engine.py", "Address.parse(address).dialable()",
        "Address.parse(address)", "tests/engine/test_addresses.py",
    ),
    Mutant(
        "a required provider holds for the memory", "aiotransfer/engine/operations/deferred.py",
        "                    check_required(peer, require, region)", "                    pass",
        "tests/engine/test_paths.py",
    ),
    Mutant(
        "connecting: who says that it listens on another host is dialled", "aiotransfer/engine/peers/reach.py",
        " and link.remote_address.host == address.host", "", "tests/engine/test_connecting.py",
    ),
    Mutant(
        "callbacks: every end calls them", "aiotransfer/engine/operations/transfer.py",
        "            engine._loop.call_soon(callback, self, context=context)\n        self._callbacks = ()\n",
        "            callback(self)\n        self._callbacks = ()\n", "tests/engine/test_done_callbacks.py",
    ),
    Mutant(
        "scatter of pages: numbers are whole numbers", "aiotransfer/engine/operations/page_targets.py",
        "if type(column) is not int and column.dtype != _INT64:", "if False:", "tests/engine/test_scatter_pages.py",
    ),
    Mutant(
        "memory of a GPU: only the pages that were read are stored", "aiotransfer/engine/operations/pages.py",
        "page_spans(local, table, reads=reads)", "page_spans(local, table)", "tests/engine/test_staging.py",
    ),
    Mutant(
        "memory of a GPU: pages that overlap are one piece", "aiotransfer/engine/operations/staged.py",
        "prepend=starts[0] - n - 1) > n)",
        "prepend=starts[0] - n - 1) != n)", "tests/engine/test_staging.py",
    ),
    Mutant(
        "lease: only its holder", "aiotransfer/engine/peers/owners.py",
        "if dst._grant.holder not in (0, self._engine.incarnation):", "if False:", "tests/engine/test_leases.py",
    ),
    Mutant(
        "fence of who does not confirm", "aiotransfer/engine/memory/quarantine.py",
        "                held._fence()\n", "                pass\n", "tests/hosts/test_leases.py",
    ),
    Mutant(
        "kv: the immediate of a request only after the proof", "aiotransfer/kv/decode/handle.py",
        "        self._pool.forget(source.number for source in self._sources)\n",
        "        self._role.engine._values.give_back(self._counter)\n",
        "tests/kv/test_many.py",
    ),
    Mutant(
        "immediates: what a user names is not given to others", "aiotransfer/engine/sync/values.py",
        "        self._proved.pop(value, None)\n", "", "tests/engine/test_counters.py",
    ),
    Mutant(
        "lifetime: an engine whose loop is gone", "aiotransfer/engine/engine.py",
        "        if self._loop.is_closed():\n            take_apart(self, self._parts)\n            return\n", "",
        "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "lifetime: a close that never began", "aiotransfer/engine/engine.py",
        "            self._closer.add_done_callback(lambda _: finish(self, self._parts))  # cancelled before it began\n", "",
        "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "hostile: questions that wait", "aiotransfer/engine/peers/connections.py",
        "if len(peer._answers) >= MOST_QUESTIONS or", "if", "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "a process that has ended: what it said before is heard", "aiotransfer/engine/peers/peer.py",
        "        if self._channel.down:\n            self._lose(reason)\n        elif not self._dying:",
        "        self._lose(reason)\n        if self._error is None:", "tests/engine/test_last_words.py",
    ),
    Mutant(
        "a connection that a write ended: what came by it is heard", "aiotransfer/control/link.py",
        "        if exc is not None:\n            self._read_rest()\n", "", "tests/engine/test_last_words.py",
    ),
    Mutant(
        "kv: whose turn it is is not passed", "aiotransfer/kv/prefill/schedule.py", "full.add(job.peer)", "pass",
        "tests/kv/prefill/test_schedule.py",
    ),
    Mutant(
        "kv: who has had more than others waits", "aiotransfer/kv/prefill/schedule.py",
        "max(self._clock, self._ends.pop(job.request, 0))", "self._clock", "tests/kv/prefill/test_schedule.py",
    ),
    Mutant(
        "kv: blocks that changed places", "aiotransfer/kv/protocol/checksum.py", "blocks * weights[place]", "blocks",
        "tests/kv/protocol/test_checksum.py",
    ),
    Mutant(
        "kv: another version", "aiotransfer/kv/protocol/messages.py", "if version != VERSION:", "if False:",
        "tests/kv/protocol/test_messages.py",
    ),
    Mutant(
        "kv: what was mapped stays so", "aiotransfer/kv/prefill/ledger.py", "if request.delivered else asked.kept",
        "if False else asked.kept", "tests/kv/test_many.py",
    ),
    Mutant(
        "kv: withdrawn requests are taken out", "aiotransfer/kv/prefill/offers.py",
        "if 2 * self._withdrawn > len(self._offered):", "if False:", "tests/kv/test_many.py",
    ),
    Mutant(
        "kv: a span's parent", "aiotransfer/telemetry/spans.py", "contexts.Context() if context is None else context", "None",
        "tests/kv/roles/test_tracing.py",
    ),
    Mutant(
        "paths of one peer are bounded", "aiotransfer/engine/peers/peer.py",
        ">= MOST_PATHS:\n", ">= 1 << 30:\n", "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "group: who speaks for a member", "aiotransfer/engine/sync/group.py",
        "        if (known is not None and known[0] is peer) or self._known(rank) is peer:\n",
        "        if True:\n", "tests/engine/test_group_members.py",
    ),
    Mutant(
        "group: lists that differ", "aiotransfer/engine/sync/rosters.py",
        "if there and lists and ours not in lists:",
        "if False:", "tests/engine/test_group_members.py",
    ),
    Mutant(
        "group: lists that contradict each other", "aiotransfer/engine/sync/rosters.py",
        "        if not any(counts for *_, counts in odd):\n", "        if True:\n", "tests/engine/test_group_members.py",
    ),
    Mutant(
        "group: a group that is made while lists are compared", "aiotransfer/engine/sync/rosters.py",
        "                self._against.get(group._key, {}).pop(peer, None)\n", "                pass\n",
        "tests/engine/test_group_members.py",
    ),
    Mutant(
        "group: answers to answers", "aiotransfer/engine/sync/rosters.py",
        "        if pair in answered or len(answered) >= MOST_ANSWERED:\n", "        if False:\n",
        "tests/engine/test_group_members.py",
    ),
    Mutant(
        "group: which member has left", "aiotransfer/engine/sync/group.py",
        "                self._name_member(error)\n", "                pass\n", "tests/engine/test_errors.py",
    ),
    Mutant(
        "group: whose signal has not come", "aiotransfer/engine/sync/group.py",
        "if rank not in come and not self._counters[rank][turn].value]", "]", "tests/engine/test_groups.py",
    ),
    Mutant(
        "group: a Join that is taken back", "aiotransfer/engine/sync/group.py",
        "or (join.generation == self._generation and not join.imms[0])", "", "tests/engine/test_groups.py",
    ),
    Mutant(
        "group: why a member cannot form it", "aiotransfer/engine/sync/group.py",
        'if join.reason and join.generation > self._generation and peer._state == "up":', "if False:",
        "tests/engine/test_groups.py",
    ),
    Mutant(
        "group: a list that cannot be", "aiotransfer/engine/sync/rosters.py",
        "            or size % MEMBER_BYTES or size > MOST_MEMBERS * MEMBER_BYTES\n", "", "tests/engine/test_group_members.py",
    ),
    Mutant(
        "group: a member that was restarted while it forms", "aiotransfer/engine/sync/group.py",
        "                    if not await reach.replaced(self.members[rank]):\n", "                    if True:\n",
        "tests/engine/test_group_members.py",
    ),
    Mutant(
        "group: a member that ended while it forms", "aiotransfer/engine/sync/group.py",
        "                    if not await reach.replaced(self.members[rank]):\n",
        "                    if await reach.replaced(self.members[rank]):\n", "tests/engine/test_group_members.py",
    ),
    Mutant(
        "reach: this engine is no other one", "aiotransfer/engine/peers/reach.py",
        'peer._state == "up" and peer.incarnation != self._engine.incarnation', 'peer._state == "up"',
        "tests/engine/test_group_members.py",
    ),
    Mutant(
        "reach: another engine is there", "aiotransfer/engine/peers/reach.py",
        "        if found is not peer:\n            self._refused.add(peer)\n",
        "        if False:\n            self._refused.add(peer)\n", "tests/moe/communicator/test_identity.py",
    ),
    Mutant(
        "reach: what is held of a stranger", "aiotransfer/engine/peers/reach.py",
        "len(claim.held) >= MOST_HELD or",
        "", "tests/engine/test_group_members.py",
    ),
    Mutant(
        "mistakes: what belongs to a loop is not pickled", "aiotransfer/engine/runtime/unpicklable.py",
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
        "mistakes: a rank that waits for itself", "aiotransfer/engine/sync/group.py",
        'peer._check_other(f"member {rank} of the group ({self.members[rank]})")', "pass", "tests/engine/test_mistakes.py",
    ),
    Mutant(
        "own immediates: nothing has come of them", "aiotransfer/engine/sync/values.py",
        "            if not native.lib.at_imm_known(self._engine._p, value):\n                return value\n",
        "            return value\n", "tests/engine/test_forged_counts.py",
    ),
    Mutant(
        "scatter plans: columns of one length", "aiotransfer/engine/operations/places.py",
        "        if len({len(column) for column in columns}) > 1:\n",
        "        if False:\n", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "scatter plans: numbers of sources and destinations", "aiotransfer/engine/operations/places.py",
        "            bad = np.flatnonzero((column < 0) | (column > most))\n",
        "            bad = np.zeros(0)\n", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "scatter plans: rows lie in their sources", "aiotransfer/engine/operations/places.py",
        "(src_offset < 0) | (nbytes < 0) | (nbytes > limit) | (src_offset > limit - nbytes)",
        "nbytes != nbytes", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "scatter plans: rows lie where a destination can be", "aiotransfer/engine/operations/places.py",
        "(dst_offset < 0) | (dst_offset > MOST - nbytes)",
        "nbytes != nbytes", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "scatter plans: a post names as many destinations as the rows", "aiotransfer/engine/operations/places.py",
        "        if len(regions) != len(self.needs):\n",
        "        if False:\n", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "scatter plans: a destination that is only read", "aiotransfer/engine/operations/places.py",
        '            if region.access == "read":\n',
        "            if False:\n", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "scatter plans: a destination that is too small", "aiotransfer/engine/operations/places.py",
        "            if region.nbytes < need:\n",
        "            if False:\n", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "threads: the end of a loop waits so long for a task that does not obey", "aiotransfer/engine/loop_thread.py",
        "timeout=max(0.0, end - time.monotonic())", "timeout=None", "tests/engine/test_submit.py",
    ),
    Mutant(
        "threads: a loop that ends by an error ends its tasks", "aiotransfer/engine/loop_thread.py",
        "                self._loop.run_until_complete(self._end())\n", "", "tests/engine/test_submit.py",
    ),
    Mutant(
        "threads: a forgotten loop ends before the interpreter", "aiotransfer/engine/loop_thread.py",
        "        atexit.register(self._end_at_exit)\n", "", "tests/engine/test_submit.py",
    ),
)  # fmt: skip
