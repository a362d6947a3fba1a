"""Guards of the native code."""

from __future__ import annotations

from tests.guards.mutant import Mutant

GUARDS = (
    Mutant(
        "withheld: foreign memory is for copiers", "ffi/lane/copiers.h",
        "return op->remote->foreign ? AT_RISK_FOREIGN : op->waits ? AT_RISK_SLOW : AT_RISK_NONE;", "return AT_RISK_NONE;",
        "tests/engine/test_withheld.py",
    ),
    Mutant(
        "withheld: what only posts waits for copiers, too", "ffi/lane/submit.c",
        "    op->risk = at_risk(op);\n", "    if (port->window == 0) op->risk = at_risk(op);\n", "tests/engine/test_withheld.py",
    ),
    Mutant(
        "withheld: nothing is fenced of which nothing is posted", "ffi/lane/ops.c",
        "if (one->peer->port->window != 0 && one->posted == 0) continue;", "", "tests/engine/test_withheld.py",
    ),
    Mutant(
        "reposts: what is refused after a break stays asked for", "ffi/fabric/post.c",
        "    at_fab_still_stalled(peer, &conn->repost);\n", "", "tests/native/test_reposts.py",
    ),
    Mutant(
        "reposts: the same of a multirail peer", "ffi/fabric/multirail.c",
        "    if (room) at_fab_still_stalled(peer, &multirail->repost); /* else one that comes up will ask */\n", "",
        "tests/native/test_reposts.py",
    ),
    Mutant(
        "withheld: a grant that is over ends what waits for a copier", "ffi/fabric/ctrl.c",
        "for (int risk = 0; risk < AT_RISKS; risk++) {\n        for (at_op *op",
        "for (int risk = 0; risk < 1; risk++) {\n        for (at_op *op",
        "tests/engine/test_withheld.py",
    ),
    Mutant(
        "slow memory: no step goes before its copy", "ffi/lane/ops.c",
        "        if (at_stage_landed(op)) {\n", "        if (0) {\n", "tests/engine/test_slow_memory.py",
    ),
    Mutant(
        "slow memory: what was read goes to memory", "ffi/lane/stage.c",
        "if (stage->reads && stage->end != 0 && exchange(stage, op, 1) != 0) return AT_EMEMORY;", "",
        "tests/engine/test_slow_memory.py",
    ),
    Mutant(
        "slow memory: it is the region's again on another path", "ffi/lane/reroute.c", "    at_stage_drop(op);\n", "",
        "tests/engine/test_slow_memory.py",
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
        "exec: the program is still the same, asked before the call and in it", "ffi/shm/memory.c",
        """    if (!at_shm_unchanged(shm)) {
        errno = ESRCH;
        return -1;
    }
    memcpy(cookie, shm->probe_cookie, sizeof cookie);
    here[0] = (struct iovec){cookie, sizeof cookie};
""",
        """    if (k > 1) {
        if (read) return process_vm_readv(shm->pid, here + 1, k - 1, there + 1, k - 1, 0);
        return process_vm_writev(shm->pid, here + 1, k - 1, there + 1, k - 1, 0);
    }
    memcpy(cookie, shm->probe_cookie, sizeof cookie);
    here[0] = (struct iovec){cookie, sizeof cookie};
""", "tests/engine/test_replaced.py",
    ),
    Mutant(
        "punched: pages are counted", "ffi/shm/post.c", "if (is_punched(remote, k)) return AT_EPROTO;", "",
        "tests/engine/test_punched.py",
    ),
    Mutant(
        "pages: what is checked is what is used", "ffi/lane/submit.c", "        op->remote_pages = own_remote;\n",
        "        op->remote_pages = order->remote_pages;\n", "tests/engine/test_changing_tables.py",
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
        "vanishing memory: the simulator looks at both sides", "ffi/sim/peer.c",
        "op->region->file || remote->file;", "op->region->file;",
        "tests/engine/test_vanishing_targets.py",
    ),
    Mutant(
        "vanishing memory: tcp does not lend it", "ffi/fabric/keys.c",
        "if (region->slow && !at_fab_is(fab, AT_FAB_LOCAL_MR)) goto out;", "", "tests/engine/test_vanishing_targets.py",
    ),
    Mutant(
        "memory of a GPU: only where it is taken", "ffi/lane/submit.c",
        "if (region->cuda >= 0 && !remote->peer->device) return AT_EDEVICE;", "", "tests/engine/test_staging.py",
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
        "waiting for a holder on another host", "ffi/fabric/ctrl.c",
        "return may_still && slot < conn->hold_room", "return 0 && may_still && slot < conn->hold_room",
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
        "bounds of a scatter of pages: a slice of the source", "ffi/lane/plan.c",
        "least(op->region->nbytes, to->src.offset + to->src.nbytes)", "op->region->nbytes", "tests/engine/test_scatter_pages.py",
    ),
    Mutant(
        "bounds of a scatter of pages: a slice of the target", "ffi/lane/plan.c",
        "least(op->remote->nbytes, to->bases[i] + to->limits[i])", "op->remote->nbytes", "tests/engine/test_scatter_pages.py",
    ),
    Mutant(
        "bounds of a scatter of pages: rows of the tables", "ffi/lane/plan.c", "begin > to->rows || n > to->rows - begin", "0",
        "tests/engine/test_scatter_pages.py",
    ),
    Mutant(
        "pages that are read: a right that was taken back", "ffi/shm/post.c",
        "        if (op->kind & AT_OP_READ && revoked(remote)) return AT_ESTALE;\n", "", "tests/engine/test_read_pages.py",
    ),
    Mutant(
        "pages that are read: one piece where it lands by a bounce", "ffi/fabric/post.c",
        "op->kind & AT_OP_READ && op->region->file && op->stage == NULL ? 1 : fab->facts.iov", "fab->facts.iov",
        "tests/engine/test_read_pages.py",
    ),
    Mutant(
        "pages that are read: to slow memory by a copy", "ffi/lane/stage.c",
        "if (stage->reads && stage->end != 0 && exchange(stage, op, 1) != 0) return AT_EMEMORY;", "",
        "tests/engine/test_read_pages.py",
    ),
    Mutant(
        "pages that are read: only the source may have no stride", "ffi/lane/submit.c",
        "at_pages_make_sense(n, page_bytes, remote_stride, local_stride)",
        "at_pages_make_sense(n, page_bytes, local_stride, remote_stride)", "tests/engine/test_read_pages.py",
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
        "simulated network: what lies behind a region's end", "ffi/simrail/simrail.c",
        " && address - m->address <= m->nbytes &&", " &&", "tests/native/test_wire.py",
    ),
    Mutant(
        "immediates: a full shelf is split, not widened", "ffi/lane/values.c",
        "shelf->mask + 1 < SLOTS || bit < LAST_BIT ? widen", "bit >= 0 ? widen", "tests/native/test_values.py",
    ),
    Mutant(
        "control messages: a grant is confirmed when nothing is posted under it", "ffi/fabric/ctrl.c",
        " && !in_use(conn, slot, after - 1)) {", ") {", "tests/native/test_ctrl.py",
    ),
    Mutant(
        "control messages: what is named twice is owed once", "ffi/fabric/ctrl.c",
        "    conn->over_count += (conn->over[slot / 64] & bit) == 0;\n", "    conn->over_count++;\n", "tests/native/test_ctrl.py",
    ),
    Mutant(
        "connections: a step that the table has not", "ffi/fabric/conns.c",
        "    if (known && (now == conn->state", "    if (known || (now == conn->state", "tests/native/test_states.py",
    ),
    Mutant(
        "strangers: silent connections to a data port", "ffi/ofi/half_open.c",
        "    int seconds = DEFERRED;", "    int seconds = 0;", "tests/providers/fabric/test_data_ports.py",
    ),
    Mutant(
        "strangers: the door is shut once the peer is in", "ffi/ofi/driver.c",
        "    .settle = ofi_settle,\n", "", "tests/providers/fabric/test_data_ports.py",
    ),
    Mutant(
        "strangers: who came in before the peer", "ffi/ofi/half_open.c",
        "    drop_strangers(conn->first, port);\n", "    (void)drop_strangers;\n", "tests/providers/fabric/test_data_ports.py",
    ),
    Mutant(
        "strangers: no other process takes the port", "ffi/ofi/half_open.c",
        "    if (rc == 0) rc = setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &no, sizeof no);", "",
        "tests/providers/fabric/test_data_ports.py tests/hosts/test_advertise.py",
    ),
    Mutant(
        "a connection that broke while it was idle", "ffi/fabric/conns.c",
        "    if (!conn->alone || !conn->heard || conn->out != 0 || conn->telling) return 0;", "    if (conn != NULL) return 0;",
        "tests/providers/fabric/test_data_ports.py",
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
        "hostile: rings without arrivals are bounded", "ffi/shm/queue.c",
        "if (--shm->idle_rings < 0)", "if (shm->idle_rings < 0)", "tests/control/test_hostile_shm.py",
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
        "hostile: pulses take a nap", "ffi/lane/mover.c",
        "if (at_now() - lane->pulse_answered < PULSE_NS) {", "if (0) {", "tests/control/test_hostile_shm.py",
    ),
    Mutant(
        "hostile: what a descriptor is", "ffi/shm/peer.c",
        "ours && is_eventfd(theirs->doorbell_fd) && is_eventfd(theirs->pulse_fd)", "ours && !is_eventfd(-1)",
        "tests/control/test_hostile_shm.py",
    ),
    Mutant(
        "hostile: memory that is not allocated", "ffi/shm/memory.c",
        "if ((uint64_t)info.st_blocks * 512 < (uint64_t)info.st_size) return -ENODATA;", "", "tests/control/test_hostile_shm.py",
    ),
    Mutant(
        "hostile: values of the departed", "ffi/lane/imm.c",
        "    if (own == 0) return;", "    return;", "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "installation: no compiler is an error", "ffi/build.py", "    if missing:\n        raise SystemExit(",
        "    if missing:\n        print(", "tests/system/test_build.py",
    ),
    Mutant(
        "installation: a compiler that makes nothing", "ffi/build.py", "    try_compiler(compiler)\n", "",
        "tests/system/test_build.py",
    ),
    Mutant(
        "installation: a user's warnings are no errors", "ffi/build.py", 'flags = ["-O3", *WARNINGS,',
        'flags = ["-O3", "-Werror", *WARNINGS,', "tests/system/test_build.py",
    ),
    Mutant(
        "installation: the flags of the user", "ffi/build.py", "*of_the_user(), ", "", "tests/system/test_build.py",
    ),
    Mutant(
        "plans of places: a source and a place that there are", "ffi/lane/plan.c",
        "if (source >= from->count || (uint64_t)row->place >= places) return AT_ESIZE;",
        "if (source >= from->count && (uint64_t)row->place >= places) return AT_ESIZE;", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "plans of places: bounds of the slice of a source", "ffi/lane/plan.c",
        "    if (!lies_in(row->local_offset, row->nbytes, from->limits[source])) return AT_ESRC;\n",
        "", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "plans of places: bounds of the region of a source", "ffi/lane/plan.c",
        "    if (offset > region->nbytes || n > region->nbytes - offset) return AT_ESRC;\n",
        "", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "plans of places: an offset that a place can have", "ffi/lane/plan.c",
        "    if (row->remote_offset < 0 || row->nbytes > INT64_MAX - row->remote_offset) return AT_EDST;\n",
        "", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "posts of places: as many as the plan has", "ffi/lane/plan.c",
        "plan == NULL || plan->needs == NULL || plan->places != places",
        "plan == NULL || plan->needs == NULL", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "posts of places: what the rows need of each", "ffi/lane/plan.c",
        "plan->needs[k] > limits[k] || bases[k] > remote->nbytes",
        "bases[k] > remote->nbytes", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "posts of places: bounds of the remote region", "ffi/lane/plan.c",
        " || bases[k] > remote->nbytes || limits[k] > remote->nbytes - bases[k]) result = AT_EDST;",
        ") result = AT_EDST;", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "posts of places: a right that was taken back", "ffi/lane/plan.c",
        "        if (remote == NULL) result = AT_ESTALE;\n        else if (plan->needs",
        "        if (remote == NULL) continue;\n        else if (plan->needs", "tests/engine/test_scatter_plans.py",
    ),
    Mutant(
        "posts of places: a plan says where it goes, or the post does", "ffi/lane/plan.c",
        "if (plan == NULL || plan->needs != NULL) return AT_EUNKNOWN;",
        "if (plan == NULL) return AT_EUNKNOWN;", "tests/engine/test_scatter_plans.py",
    ),
)  # fmt: skip
