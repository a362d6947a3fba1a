/* Submission: what was asked for is resolved and checked, then moved here and now or handed to ops.c.
 *
 * A refused call leaves no trace: everything that can be refused is, before the first byte. Small operations of synchronous
 * providers are over when the call returns, and cost no operation, no event and no future. */
#include "copiers.h"
#include "lane.h"

#include <string.h>

#define CHECKED_PAGES 512u /* of a table at a time: 4 KiB */
#define LATE_BYTES ((uint64_t)64 << 10) /* once a turn is overdue, only smaller operations run inside the call */
#define RECENT_LEAST ((uint64_t)64 << 10)

/* How much has been written since this place was written last, or to other places if it has not been: more than a cache holds? */
static void note_footprint(at_lane *lane, at_op *op, uint64_t nbytes) {
    op->footprint = nbytes;
    lane->written += nbytes;
    if (nbytes < RECENT_LEAST) return;
    int reads = op->kind & AT_OP_READ;
    uint64_t where = reads ? (uint64_t)(uintptr_t)op->local : op->remote->va + op->remote_offset;
    if (op->kind & AT_OP_PAGES) where += reads ? (uint64_t)op->local_pages[0] * op->local_stride : (uint64_t)op->remote_pages[0] * op->remote_stride;
    uint32_t i = 0;
    while (i < AT_RECENT && lane->recent[i].where != where) i++;
    int again = i != AT_RECENT;
    if (!again) i = lane->recent_next++ % AT_RECENT;
    lane->recent_bytes += nbytes - lane->recent[i].nbytes;
    op->footprint = again ? lane->written - lane->recent[i].stamp : lane->recent_bytes;
    lane->recent[i].where = where;
    lane->recent[i].nbytes = nbytes;
    lane->recent[i].stamp = lane->written;
}

/* ---- checks ---- */

/* Compilers clear so large a struct by `rep stos`, which takes longer than all else of a short operation. */
static inline void op_clear(at_op *op) {
    typedef uint64_t pair __attribute__((vector_size(16), aligned(8), may_alias));
    _Static_assert(sizeof(at_op) % sizeof(uint64_t) == 0, "whole words");
    uint8_t *at = (uint8_t *)op;
    size_t i = 0;
#pragma GCC unroll 32
    for (; i + sizeof(pair) <= sizeof *op; i += sizeof(pair)) {
        *(pair *)(void *)(at + i) = (pair){0, 0};
        __asm__("" : : : "memory"); /* nor is this loop to become a memset */
    }
    if (i < sizeof *op) *(uint64_t *)(void *)(at + i) = 0;
}

int at_resolve(at_lane *lane, const at_order *order, int64_t imm, at_op *op) {
    int64_t value = order->imm >= 0 ? order->imm : imm;
    if (value > (int64_t)UINT32_MAX) return AT_EIMM;
    uint64_t extent = order->kind & AT_OP_PAGES ? order->units : order->nbytes != 0 ? order->nbytes : 1;
    op_clear(op);
    op->kind = order->kind;
    op->imm = value;
    op->nbytes = order->nbytes;
    op->units = order->units;
    op->extent = extent;
    if (order->kind == AT_OP_SIGNAL) {
        op->peer = at_peer_find(lane, order->remote);
        return value < 0 ? AT_EIMM : op->peer == NULL || op->peer->status != AT_OK ? AT_EPEER : AT_OK;
    }
    at_region *region = at_region_use(lane, order->region);
    if (region == NULL) return AT_ECLOSED;
    at_remote *remote = at_remote_use(lane, order->remote);
    if (remote == NULL) return AT_ESTALE;
    if (remote->peer->status != AT_OK) return AT_EPEER;
    if (region->cuda >= 0 && !remote->peer->device) return AT_EDEVICE;
    if (!(remote->access & (order->kind & AT_OP_READ ? AT_ACCESS_READ : AT_ACCESS_WRITE))) return AT_EGRANT;
    if (atomic_load_explicit(remote->word, memory_order_acquire) != remote->epoch) return AT_ESTALE; /* order: alone: looked at again by the port */
    op->peer = remote->peer;
    op->remote = remote;
    op->region = region;
    op->remote_index = (uint32_t)order->remote;
    op->region_index = (uint32_t)order->region;
    op->local = (uint8_t *)((uintptr_t)region->base + order->local_offset); /* wherever that is: bounds come next */
    op->remote_offset = order->remote_offset;
    op->local_stride = order->local_stride;
    op->remote_stride = order->remote_stride;
    op->local_pages = order->local_pages;
    op->remote_pages = order->remote_pages;
    return AT_OK;
}

/* The largest legal index for pages at offset + index * stride inside `nbytes`; -1 when not even page 0 fits. */
static int64_t last_page(uint64_t nbytes, uint64_t offset, uint64_t page, uint64_t stride) {
    if (offset > nbytes || page > nbytes - offset) return -1;
    if (stride == 0) return INT64_MAX;
    uint64_t most = (nbytes - offset - page) / stride;
    return most > (uint64_t)INT64_MAX ? INT64_MAX : (int64_t)most;
}

/* AT_OK when all of pages[0..n) lie in [0, last]. With `own` they are copied there, part by part while the cache has them, and the copy
 * is what is checked. A vectorisable pass (a negative index is huge when read unsigned). */
static int check_pages(at_lane *lane, const int64_t *pages, int64_t *own, uint64_t n, int64_t last, int status) {
    for (uint64_t at = 0; at < n; at += CHECKED_PAGES) {
        uint64_t k = n - at < CHECKED_PAGES ? n - at : CHECKED_PAGES, bad = (uint64_t)(last < 0);
        if (own != NULL) memcpy(own + at, pages + at, (size_t)k * sizeof *own);
        const int64_t *these = own != NULL ? own + at : pages + at;
        for (uint64_t i = 0; i < k; i++) bad |= (uint64_t)((uint64_t)these[i] > (uint64_t)last);
        for (uint64_t i = 0; bad != 0 && i < k; i++) {
            if (last >= 0 && (uint64_t)these[i] <= (uint64_t)last) continue;
            lane->detail = these[i];
            return status;
        }
    }
    return AT_OK;
}

int at_check_pages(at_lane *lane, const at_order *order, at_op *op, uint64_t here, uint64_t there, const at_tables *tables) {
    int64_t *own_local = tables != NULL ? tables->pages : NULL, *own_remote = tables != NULL ? own_local + order->units : NULL;
    int rc = check_pages(lane, order->local_pages, own_local, order->units,
                         last_page(here, order->local_offset, order->nbytes, order->local_stride), AT_EINDEX_SRC);
    if (rc == AT_OK)
        rc = check_pages(lane, order->remote_pages, own_remote, order->units,
                         last_page(there, order->remote_offset, order->nbytes, order->remote_stride), AT_EINDEX_DST);
    if (tables != NULL) {
        op->local_pages = own_local;
        op->remote_pages = own_remote;
    }
    return rc;
}

int at_check(at_lane *lane, const at_order *order, at_op *op, const at_tables *tables) {
    if (order->kind == AT_OP_SIGNAL) return AT_OK;
    uint64_t here = op->region->nbytes, there = op->remote->nbytes, n = order->nbytes;
    if (order->kind & AT_OP_PAGES) return at_check_pages(lane, order, op, here, there, tables);
    if (order->local_offset > here || n > here - order->local_offset) return AT_ESRC;
    if (order->remote_offset > there || n > there - order->remote_offset) return AT_EDST;
    return AT_OK;
}

/* ---- here and now, or later ---- */

int at_submit_here(at_lane *lane, at_op *op) {
    const at_port *port = op->peer->port;
    uint64_t nbytes = op->nbytes * op->units;
    if (op->units == 0) return AT_OK;
    if (op->peer->status != AT_OK) return AT_EPEER; /* of a scatter: since it was resolved */
    if (op->remote != NULL) note_footprint(lane, op, nbytes);
    op->risk = at_risk(op);
    if (port->window != 0 || op->risk != AT_RISK_NONE || (op->detached && lane->moving_other)) return AT_EAGAIN;
    int here = nbytes <= lane->config.inline_bytes && (nbytes <= LATE_BYTES || op->detached || !lane->turn_due);
    return here || (lane->config.flags & AT_LANE_NO_THREAD) ? AT_HERE : AT_EAGAIN;
}

/* What it takes to tell the owner of memory of one operation that has landed there. */
typedef struct {
    at_peer *peer;
    at_remote *remote; /* NULL for a signal */
    int64_t imm;       /* -1: none */
    uint64_t units, nbytes;
} at_tell;

/* All of it has landed. Without a call where there is no immediate: most operations are short. */
static inline int whole_here(at_op *op) {
    op->cursor = op->moved = op->extent;
    op->landed = op->units;
    if (op->imm < 0 || op->counted == op->units) return AT_OK;
    int rc = op->peer->port->count(op->peer, op->remote, (uint32_t)op->imm, op->units - op->counted);
    if (rc == AT_OK) op->counted = op->units;
    return rc;
}

/* A part of it has landed: its immediates are told all the same. */
static int part_here(at_op *op, uint64_t moved, int rc) {
    op->cursor += moved;
    at_op_moved(op, moved);
    int published = rc == AT_OK || op->landed != 0 ? at_op_publish(op) : AT_OK;
    return rc == AT_OK ? published : rc;
}

/* What became of an operation that was moved inside the call. */
static inline int moved_here(at_lane *lane, at_op *op, uint64_t moved, int rc, int oserror) {
    rc = rc == AT_OK && moved == op->extent ? whole_here(op) : part_here(op, moved, rc);
    if (!op->detached) at_count_turn(lane, 1, op->nbytes * op->units);
    if (rc == AT_OK) {
        lane->stats.ops_inline++;
        lane->stats.units_written += op->units;
        lane->stats.bytes_written += op->nbytes * op->units;
    } else {
        if (oserror != 0) lane->oserror = oserror;
        if (rc == AT_EPROTO) at_peer_broke(op->peer);
    }
    return rc;
}

static int moves_bytes(const at_op *op) { return op->remote != NULL && op->nbytes != 0; }

static int mover_of(const at_op *op) { return op->detached ? AT_MOVER_OTHER : AT_MOVER_CALLER; }

static void begin_here(at_lane *lane, int detached) {
    if (detached) lane->moving_other = 1;
    else atomic_store_explicit(&lane->moving_here, 1, memory_order_relaxed); /* order: alone: the lock orders it */
    at_unlock(lane);
}

static void end_here(at_lane *lane, int detached) {
    if (!detached) {
        at_here_over(lane);
        return;
    }
    lane->moving_other = 0;
    if (lane->shut) (void)pthread_cond_broadcast(&lane->ended);
}

/* What the operation uses stays while the loop's thread moves it: nothing is closed by another one meanwhile (at_wait_here). Operations of
 * other threads are counted among its users.
 *
 * One operation, moved inside the call, without the lock meanwhile: AT_OK; AT_EAGAIN: its count has to be queued; else it failed. */
static inline int move_bytes_here(at_lane *lane, at_op *op, int detached) {
    uint64_t moved = 0;
    int oserror = 0;
    if (detached) at_op_hold(op);
    begin_here(lane, detached);
    int rc = op->peer->port->move(op->peer, op, 0, op->extent, detached ? AT_MOVER_OTHER : AT_MOVER_CALLER, &moved, &oserror);
    at_lock(lane);
    rc = moved_here(lane, op, moved, rc, oserror);
    if (rc == AT_EAGAIN && !(op->remote->open && op->region->open)) rc = AT_ESTALE; /* closed meanwhile: it cannot be kept */
    if (detached) at_op_let_go(lane, op);
    end_here(lane, detached);
    return rc == AT_EAGAIN && lane->shut ? AT_ESHUT : rc; /* shut meanwhile: no thread would end it */
}

static int move_here(at_lane *lane, at_op *op) {
    if (moves_bytes(op)) return op->detached ? move_bytes_here(lane, op, 1) : move_bytes_here(lane, op, 0);
    uint64_t moved = 0;
    int oserror = 0;
    int rc = op->peer->port->move(op->peer, op, 0, op->extent, mover_of(op), &moved, &oserror);
    return moved_here(lane, op, moved, rc, oserror);
}

/* The loop's own, without an immediate: when all has gone well there is nothing to be done with the lock, and it is not taken again (1; the
 * usual case of short writes, for which a lock costs as much as the copy). 0: the lock is held, *result is as of move_here. */
static int move_freely(at_lane *lane, at_op *op, int *result) {
    uint64_t moved = 0, nbytes = op->nbytes * op->units;
    int oserror = 0;
    lane->stats.ops_inline++;
    lane->stats.units_written += op->units;
    lane->stats.bytes_written += nbytes;
    begin_here(lane, 0);
    int rc = op->peer->port->move(op->peer, op, 0, op->extent, AT_MOVER_CALLER, &moved, &oserror);
    if (rc == AT_OK && moved == op->extent) {
        at_count_turn(lane, 1, nbytes);
        *result = lane->turn_due ? AT_DUE : AT_OK;
        if (atomic_exchange(&lane->moving_here, 0) == 1) return 1;
        at_lock(lane);
        (void)pthread_cond_broadcast(&lane->ended);
        at_unlock(lane);
        return 1;
    }
    at_lock(lane);
    lane->stats.ops_inline--;
    lane->stats.units_written -= op->units;
    lane->stats.bytes_written -= nbytes;
    *result = moved_here(lane, op, moved, rc, oserror);
    at_here_over(lane);
    return 0;
}

/* All bytes of ops[0..n) have landed: tell their immediates, up to the first that cannot be told. Returns how many were, or had none.
 * `tells` has what is needed for that: the operations themselves have left the first cache while other memory was copied. */
static uint32_t tell_here(at_lane *lane, const at_tell *tells, uint32_t n, int detached) {
    uint32_t told = 0;
    uint64_t units = 0, nbytes = 0;
    for (; told < n; told++) {
        const at_tell *tell = &tells[told];
        if (tell->imm >= 0 && tell->peer->port->count(tell->peer, tell->remote, (uint32_t)tell->imm, tell->units) != AT_OK) break;
        units += tell->units;
        nbytes += tell->nbytes;
    }
    lane->stats.ops_inline += told;
    lane->stats.units_written += units;
    lane->stats.bytes_written += nbytes;
    if (!detached) at_count_turn(lane, told, nbytes);
    return told;
}

int at_move_here(at_lane *lane, at_op *ops, uint32_t n) {
    at_tell tells[AT_TOGETHER];
    int bytes = 0, detached = ops[0].detached, mover = mover_of(&ops[0]), whole = 1;
    for (uint32_t i = 0; i < n; i++) bytes |= moves_bytes(&ops[i]);
    if (bytes) begin_here(lane, detached);
    for (uint32_t i = 0; i < n; i++) {
        at_op *op = &ops[i];
        op->landed = 0;
        op->oserror = 0;
        tells[i] = (at_tell){op->peer, op->remote, op->imm, op->units, op->nbytes * op->units};
        op->status = op->peer->port->move(op->peer, op, 0, op->extent, mover, &op->landed, &op->oserror);
        whole &= op->status == AT_OK && op->landed == op->extent;
    }
    if (bytes) at_lock(lane);
    uint32_t told = whole ? tell_here(lane, tells, n, detached) : 0;
    int all = 1;
    for (uint32_t i = told; i < n; i++) {
        at_op *op = &ops[i];
        uint64_t moved = op->landed;
        op->landed = 0;
        op->status = moved_here(lane, op, moved, op->status, op->oserror);
        if (op->status == AT_OK) continue;
        all = 0;
        if (op->status == AT_EAGAIN && lane->shut) op->status = AT_ESHUT;
    }
    if (bytes) end_here(lane, detached);
    return all;
}

void at_wake_mover(at_lane *lane, int64_t cookie) {
    if (lane->config.flags & AT_LANE_LOOP) {
        at_event_signal(lane);
        return;
    }
    at_thread_kick(lane);
    at_op *op = cookie != 0 ? at_op_find(lane, cookie) : NULL;
    if (op != NULL && !op->detached && lane->thread_started && !(lane->config.flags & AT_LANE_THREAD)) at_head_start(lane, op);
}

/* rc: what became of an attempt to move it here. */
static int64_t submitted(at_lane *lane, at_op *op, int rc) {
    if (rc == AT_OK) return !op->detached && lane->turn_due ? AT_DUE : AT_OK;
    if (rc != AT_EAGAIN) return rc;
    int64_t cookie = at_op_keep(lane, op);
    if (cookie < 0) return cookie;
    if (op->risk != AT_RISK_NONE) at_copiers_call(lane);
    else if (op->peer->port->window != 0) at_refill(op->peer);
    else at_wake_mover(lane, cookie);
    return cookie;
}

int64_t at_submit(at_lane *lane, at_op *op) {
    int rc = at_submit_here(lane, op);
    return submitted(lane, op, rc == AT_HERE ? move_here(lane, op) : rc);
}

int64_t at_submit_last(at_lane *lane, at_op *op) {
    int rc = at_submit_here(lane, op);
    if (rc == AT_HERE && op->imm < 0 && !op->detached && moves_bytes(op)) {
        if (move_freely(lane, op, &rc)) return rc;
    } else if (rc == AT_HERE) {
        rc = move_here(lane, op);
    }
    return at_unlock_and_progress(lane, submitted(lane, op, rc));
}

int64_t at_unlock_and_progress(at_lane *lane, int64_t result) {
    at_rail *rails = result >= AT_FIRST_COOKIE ? lane->rails : NULL;
    at_unlock(lane);
    if (rails != NULL) at_rails_progress(rails, AT_TURN_POST);
    return result;
}

/* ---- the door ---- */

static int64_t submit_one(at_lane *lane, const at_order *order, int64_t imm) {
    int64_t result = at_check_owner(lane);
    if (result != AT_OK) return result;
    at_op op;
    at_tables tables = {NULL, 0};
    at_lock(lane);
    if (order->kind & AT_OP_PAGES) result = at_tables_take(lane, order->units, &tables);
    if (result == AT_OK) result = at_resolve(lane, order, imm, &op);
    if (result == AT_OK) result = at_check(lane, order, &op, &tables);
    if (result == AT_OK && !(order->kind & AT_OP_PAGES)) return at_submit_last(lane, &op);
    if (result == AT_OK) result = at_submit(lane, &op);
    if (order->kind & AT_OP_PAGES) at_tables_give(lane, &tables);
    return at_unlock_and_progress(lane, result);
}

/* Field by field, see op_clear. */
static inline void order_bytes(at_order *order, int kind, int64_t remote, uint64_t remote_offset, int64_t region, uint64_t local_offset,
                               uint64_t nbytes) {
    order->kind = kind;
    order->remote = remote;
    order->region = region;
    order->local_offset = local_offset;
    order->remote_offset = remote_offset;
    order->nbytes = nbytes;
    order->units = 1;
    order->local_stride = order->remote_stride = 0;
    order->local_pages = order->remote_pages = NULL;
    order->imm = -1;
}

int64_t at_write(at_lane *lane, int64_t remote, uint64_t remote_offset, int64_t region, uint64_t local_offset, uint64_t nbytes,
                 int64_t imm) {
    at_order order;
    order_bytes(&order, AT_OP_WRITE, remote, remote_offset, region, local_offset, nbytes);
    return submit_one(lane, &order, imm);
}

int64_t at_read(at_lane *lane, int64_t remote, uint64_t remote_offset, int64_t region, uint64_t local_offset, uint64_t nbytes) {
    at_order order;
    order_bytes(&order, AT_OP_READ, remote, remote_offset, region, local_offset, nbytes);
    return submit_one(lane, &order, -1);
}

int64_t at_write_pages(at_lane *lane, int64_t remote, int64_t region, const int64_t *local_pages, const int64_t *remote_pages,
                       uint64_t n, uint64_t page_bytes, uint64_t local_stride, uint64_t remote_stride, uint64_t local_offset,
                       uint64_t remote_offset, int64_t imm) {
    if (!at_pages_make_sense(n, page_bytes, local_stride, remote_stride)) return AT_ESIZE;
    at_order order = {.kind = AT_OP_PAGES, .remote = remote, .region = region, .local_offset = local_offset,
                      .remote_offset = remote_offset, .nbytes = page_bytes, .units = n, .local_stride = local_stride,
                      .remote_stride = remote_stride, .local_pages = local_pages, .remote_pages = remote_pages, .imm = -1};
    return submit_one(lane, &order, imm);
}

int64_t at_read_pages(at_lane *lane, int64_t remote, int64_t region, const int64_t *local_pages, const int64_t *remote_pages,
                      uint64_t n, uint64_t page_bytes, uint64_t local_stride, uint64_t remote_stride, uint64_t local_offset,
                      uint64_t remote_offset) {
    if (!at_pages_make_sense(n, page_bytes, remote_stride, local_stride)) return AT_ESIZE;
    at_order order = {.kind = AT_OP_READ | AT_OP_PAGES, .remote = remote, .region = region, .local_offset = local_offset,
                      .remote_offset = remote_offset, .nbytes = page_bytes, .units = n, .local_stride = local_stride,
                      .remote_stride = remote_stride, .local_pages = local_pages, .remote_pages = remote_pages, .imm = -1};
    return submit_one(lane, &order, -1);
}

int at_pages_make_sense(uint64_t n, uint64_t page_bytes, uint64_t from_stride, uint64_t to_stride) {
    return page_bytes != 0 && page_bytes <= (uint64_t)INT64_MAX && to_stride >= page_bytes &&
           (from_stride == 0 || from_stride >= page_bytes) && n <= (uint64_t)INT64_MAX / page_bytes;
}

int64_t at_signal(at_lane *lane, int64_t peer, int64_t imm) {
    at_order order = {.kind = AT_OP_SIGNAL, .remote = peer, .units = 1, .imm = -1};
    return submit_one(lane, &order, imm);
}
