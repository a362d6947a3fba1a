/* Moving bytes for synchronous providers: by whom, how much at a time, and what is done when some of it is over.
 *
 * An operation is claimed part by part, with the lock; parts are moved without it, by the submitting thread (a head start, while
 * the native thread wakes up), by the native thread and by its helper, in any order. The thread that finishes the last part ends the
 * operation; its immediates are published with the lock, for what has been moved by then. */
#include "lane.h"

#define HEAD_NS UINT64_C(600000)           /* how long the caller moves parts of what it has submitted */
#define LAST_BYTES ((uint64_t)768 << 10)   /* unclaimed when the loop is told that the end is near */
#define SHARED_BYTES ((uint64_t)1 << 20) /* worth waking a second thread for */

/* Publish the immediates of what has landed. Pages carry one each; a write or signal one in all. */
int at_op_publish(at_op *op) {
    if (op->imm < 0 || op->landed <= op->counted) return AT_OK; /* less: counted on the path that it came from */
    int rc = op->peer->port->count(op->peer, op->remote, (uint32_t)op->imm, op->landed - op->counted);
    if (rc == AT_OK) op->counted = op->landed;
    return rc;
}

static uint64_t unclaimed(const at_op *op) { return (op->extent - op->cursor) * (op->kind & AT_OP_PAGES ? op->nbytes : 1); }

static int goes_on(const at_op *op) {
    return op->cursor < op->extent && op->peer->status == AT_OK && !atomic_load(&op->withdrawn);
}

/* Waking the loop takes as long as the last parts: it is called before they are moved, and waits for them (see at_poll). */
static void announce_end(at_op *op) {
    if (op->soon || op->risk != AT_RISK_NONE || op->detached || op->parent != 0 || unclaimed(op) > LAST_BYTES || op->nbytes * op->units < SHARED_BYTES) return;
    op->soon = 1;
    op->peer->lane->soon++;
    at_event_signal(op->peer->lane);
}

int at_op_move(at_op *op, uint64_t n, int mover, int *oserror) {
    at_peer *peer = op->peer;
    uint64_t first = op->cursor, moved = 0;
    op->cursor += n;
    if (op->cursor == op->extent) at_op_dequeue(op);
    if (mover != AT_MOVER_CALLER) announce_end(op);
    op->running++;
    at_unlock(peer->lane);
    int rc = peer->port->move(peer, op, first, n, mover, &moved, oserror);
    at_lock(peer->lane);
    op->running--;
    at_op_moved(op, moved);
    return rc;
}

void at_op_moved(at_op *op, uint64_t n) {
    op->moved += n;
    if (op->kind & AT_OP_PAGES) op->landed = op->moved;
    else if (op->moved == op->extent) op->landed = op->units;
}

/* After some of it was moved without the lock: withdrawn, finished, or to be gone on with? Returns 1 when nothing is left to do. */
static int move_over(at_lane *lane, at_op *op, int rc, int oserror) {
    at_peer *peer = op->peer;
    if (oserror != 0) lane->oserror = oserror;
    if (rc == AT_EPROTO) at_peer_broke(peer);
    int published = at_op_publish(op);
    if (rc == AT_OK && published != AT_EAGAIN) rc = published;
    if (rc != AT_OK || atomic_load(&op->withdrawn) || peer->status != AT_OK) {
        at_op_stop(op, rc != AT_OK ? rc : peer->status); /* ends it, or the last thread that moves some of it does */
        return 1;
    }
    if (op->landed != op->units) return op->cursor == op->extent; /* another thread moves the rest */
    if (published == AT_EAGAIN) {
        lane->soon -= (uint32_t)op->soon; /* the end is not near: the loop must not wait for it */
        op->soon = 0;
        if (op->risk != AT_RISK_NONE) { /* all of it has landed: what is left blocks no thread */
            at_op_dequeue(op);
            op->risk = AT_RISK_NONE;
        }
        if (!op->queued) at_op_enqueue(op);
        at_stall(peer, 1); /* tried again: by the thread after a pause, in progress="loop" at the engine's next retry */
        if (!(lane->config.flags & AT_LANE_LOOP)) at_thread_kick(lane);
        return 1;
    }
    at_op_dequeue(op);
    lane->stats.units_written += op->units;
    lane->stats.bytes_written += op->units * op->nbytes;
    at_op_end(op);
    return 1;
}

/* How much to claim next, in units of the extent: less towards the end, so that several movers finish together. */
static uint64_t chunk_for(const at_op *op, uint64_t most) {
    uint64_t left = unclaimed(op), unit = op->kind & AT_OP_PAGES ? op->nbytes : 1;
    uint64_t share = op->risk != AT_RISK_NONE ? 4 * AT_CHUNK : left / 8 < AT_CHUNK ? AT_CHUNK : left / 8 > 4 * AT_CHUNK ? 4 * AT_CHUNK : left / 8;
    share = share < most ? share : most;
    uint64_t n = share / unit > 0 ? share / unit : 1;
    return n < op->extent - op->cursor ? n : op->extent - op->cursor;
}

void at_move_one(at_lane *lane, at_peer *peer, at_op *op, uint64_t budget, int mover, uint64_t *since) {
    int rc = AT_OK, oserror = 0;
    while (rc == AT_OK && budget > 0 && goes_on(op)) {
        uint64_t before = unclaimed(op);
        if (since != NULL) *since = at_now();
        rc = at_op_move(op, chunk_for(op, budget), mover, &oserror);
        lane->stats.thread_chunks++;
        uint64_t taken = before - unclaimed(op); /* by others too: their share of the round as well */
        budget -= taken < budget ? taken : budget;
    }
    at_line *line = &peer->lines[op->risk];
    if (!move_over(lane, op, rc, oserror) && line->head == op && op->next != NULL) { /* fair: behind the others of this peer */
        at_op_dequeue(op);
        at_op_enqueue(op);
    }
}

int at_queued_work(const at_lane *lane, int refused) {
    for (uint32_t i = 0; i < lane->peer_count; i++) {
        const at_peer *peer = lane->peers[i];
        if (peer != NULL && peer->port->window == 0 && peer->lines[0].head != NULL && (refused || !peer->stalled)) return 1;
    }
    return 0;
}

int at_queued_for_two(const at_lane *lane) {
    for (uint32_t i = 0; i < lane->peer_count; i++) {
        const at_peer *peer = lane->peers[i];
        if (peer == NULL || peer->port->window != 0 || peer->lines[0].head == NULL) continue;
        if (unclaimed(peer->lines[0].head) >= SHARED_BYTES || (peer->lines[0].head->next != NULL && unclaimed(peer->lines[0].head->next) != 0)) return 1;
    }
    return 0;
}

void at_move_queued(at_lane *lane, uint64_t budget, int mover) {
    for (uint32_t k = 0; k < lane->peer_count; k++) {
        at_peer *peer = lane->peers[(lane->thread_turn + k) % lane->peer_count];
        if (peer == NULL || peer->port->window != 0 || peer->lines[0].head == NULL) continue;
        peer->users++;
        at_stall(peer, 0);
        at_move_one(lane, peer, peer->lines[0].head, budget, mover, NULL);
        at_peer_release(peer);
    }
    lane->thread_turn++;
}

/* Waking the native thread takes as long as copying some hundred KiB, and so does waking the loop at the end: the caller moves parts
 * for a while, a fraction of the turn that inline copies may take. */
void at_head_start(at_lane *lane, at_op *op) {
    if (op->peer->lines[0].head != op || lane->turn_due || unclaimed(op) < SHARED_BYTES) return;
    int oserror = 0, rc = AT_OK;
    uint64_t before = unclaimed(op), until = at_now() + HEAD_NS;
    lane->moving_here = 1;
    do rc = at_op_move(op, chunk_for(op, 4 * AT_CHUNK), AT_MOVER_CALLER, &oserror);
    while (rc == AT_OK && goes_on(op) && at_now() < until);
    at_here_over(lane);
    at_count_turn(lane, 1, before - unclaimed(op));
    (void)move_over(lane, op, rc, oserror);
}
