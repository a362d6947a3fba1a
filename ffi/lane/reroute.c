/* Operations that change paths: what was not finished on a path that died begins again on another one.
 *
 * Bytes may be written twice; that is the same bytes in the same place. Immediates may not be counted twice: units are alike, so it is
 * enough to know how many of an operation's were counted, and to let so many of its units go without one. */
#include "copiers.h"
#include "lane.h"
#include "stage.h"

#include <stddef.h>

int64_t at_remote_uses(at_lane *lane, int64_t id) {
    at_lock(lane);
    const at_remote *remote = at_remote_use(lane, id);
    int64_t result = remote != NULL ? (int64_t)remote->users : AT_ESTALE;
    at_unlock(lane);
    return result;
}

typedef struct {
    uint64_t n;
    const int64_t *olds, *news;
} mapping;

/* The same memory by the new path; NULL: it cannot be reached there. */
static at_remote *counterpart(at_lane *lane, const at_op *op, const at_peer *to, const mapping *map, uint32_t *index) {
    for (uint64_t i = 0; i < map->n; i++) {
        if ((uint32_t)map->olds[i] != op->remote_index) continue;
        at_remote *remote = at_remote_use(lane, map->news[i]);
        *index = (uint32_t)map->news[i];
        return remote != NULL && remote->peer == to && remote->nbytes == op->remote->nbytes ? remote : NULL;
    }
    return NULL;
}

static int go(at_lane *lane, at_op *op, at_peer *from, at_peer *to, const mapping *map) {
    at_remote *remote = NULL;
    uint32_t index = 0;
    if (op->remote != NULL && (remote = counterpart(lane, op, to, map, &index)) == NULL) return AT_ERAIL;
    at_op_dequeue(op);
    at_stage_drop(op);
    uint64_t nbytes = op->nbytes * op->units;
    from->queued_ops--, from->queued_bytes -= nbytes;
    to->queued_ops++, to->queued_bytes += nbytes;
    to->users++;
    if (remote != NULL) {
        remote->users++;
        at_remote_release(lane, op->remote_index);
        op->remote = remote;
        op->remote_index = index;
    }
    op->peer = to;
    op->precounted = op->counted;
    op->cursor = op->moved = op->landed = op->bytes = op->tail = 0;
    if (to->port->window != 0) op->extent = op->units;
    else op->extent = op->kind & AT_OP_PAGES ? op->units : op->nbytes != 0 ? op->nbytes : 1;
    if (to->port->cut != NULL) to->port->cut(to, op);
    op->risk = at_risk(op);
    at_op_enqueue(op);
    at_peer_release(from);
    return AT_OK;
}

int64_t at_reroute(at_lane *lane, int64_t from_id, int64_t to_id, uint64_t n, const int64_t *olds, const int64_t *news) {
    mapping map = {n, olds, news};
    int64_t count = AT_EPEER;
    at_lock(lane);
    at_peer *from = at_peer_find(lane, from_id), *to = at_peer_find(lane, to_id);
    if (from != NULL && to != NULL && to->status == AT_OK) {
        count = 0;
        from->users++;
        for (uint32_t i = 0; i < lane->op_count; i++) {
            at_op *op = lane->ops[i];
            if (op == NULL || op->batch != NULL || op->over || op->peer != from || op->posted != 0 || op->running != 0) continue;
            if (go(lane, op, from, to, &map) == AT_OK) count++;
            else at_op_stop(op, AT_ERAIL);
        }
        if (from->port->forget != NULL) from->port->forget(from);
        at_peer_release(from);
        if (to->port->window != 0) at_refill(to);
        else at_wake_mover(lane, 0);
        at_copiers_call(lane);
    }
    at_unlock(lane);
    return count;
}
