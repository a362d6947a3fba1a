/* What a copier does when it has found something, see copiers.c: all with the lock, which is dropped for what may take any time. */
#include "copiers.h"
#include "stage.h"
#include "threads.h"

#define ROUND_BYTES ((uint64_t)4 << 20) /* one operation is served this long before others are looked at */

/* Local memory first, where both sides may hold it up: afterwards only the peer's can. */
static void fetch_local(at_lane *lane, at_op *op) {
    at_op_dequeue(op);
    op->running++;
    at_unlock(lane);
    at_fetch_local(op);
    at_lock(lane);
    op->running--;
    op->waits = 0;
    if (atomic_load(&op->withdrawn) || op->peer->status != AT_OK) at_op_stop(op, op->peer->status);
    else at_op_enqueue(op);
}

/* Bring the next step of an operation that `waits`. Afterwards it is queued for its port, or it has ended. */
static void stage_next(at_lane *lane, at_op *op) {
    int rc = AT_OK, staged = op->region->slow && !op->peer->pins;
    at_op_dequeue(op);
    if (staged && op->stage == NULL) rc = at_stage_new(op);
    op->running++;
    at_unlock(lane);
    if (!staged) at_fetch_local(op);
    else if (rc == AT_OK) rc = at_stage_copy(op);
    at_lock(lane);
    op->running--;
    op->waits = 0;
    op->risk = AT_RISK_NONE;
    int over = rc != AT_OK || atomic_load(&op->withdrawn) || op->peer->status != AT_OK || lane->shut;
    if (over) {
        at_op_stop(op, rc != AT_OK ? rc : op->peer->status != AT_OK ? op->peer->status : AT_ESHUT);
    } else if (staged && at_stage_is_over(op)) { /* of a read: all of it is where it belongs */
        op->moved = op->extent;
        op->landed = op->units;
        at_op_end(op);
    } else {
        if (staged) at_stage_show(op);
        at_op_enqueue(op);
    }
}

/* For a port that only posts: local memory is made ready, and then the port has its turn. */
static void make_ready(at_lane *lane, at_peer *peer, at_op *op) {
    stage_next(lane, op);
    at_refill(peer);
    at_rail *rails = lane->rails;
    at_unlock(lane);
    at_rails_progress(rails, AT_TURN_POST);
    at_lock(lane);
}

static void probe(at_lane *lane, at_peer *peer) {
    peer->probe = AT_PROBE_RUNS;
    at_unlock(lane);
    peer->port->probe(peer);
    at_lock(lane);
    peer->probe = AT_PROBE_NONE;
    lane->risky--;
}

void at_copier_job(at_lane *lane, at_peer *peer, at_op *op, int risk, int mover, uint64_t *since) {
    if (op == NULL) probe(lane, peer);
    else if (peer->port->window != 0) make_ready(lane, peer, op);
    else if (risk == op->risk) at_move_one(lane, peer, op, ROUND_BYTES, mover, since);
    else fetch_local(lane, op);
}
