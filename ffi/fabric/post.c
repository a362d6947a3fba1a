/* Posting: from steps of an operation to work requests.
 *
 * A large write is cut into pieces, so that withdrawing it does not have to wait for all of it. Its immediate goes with the last piece
 * where writes land in order; elsewhere it follows as a write of no bytes once every piece has been confirmed (the operation's tail).
 * Several pages go as one work request: neighbours as one piece of memory, others as pieces of a vector, where the immediate carries
 * how many they are or there is none. */

#include "fabric.h"

#include <errno.h>

#define MERGED ((uint64_t)1 << 20) /* bytes of pages in one work request: more gains nothing, and holds the window up */

static uint64_t piece_bytes(const at_fab *fab) { return fab->facts.most_bytes < AT_FAB_PIECE ? fab->facts.most_bytes : AT_FAB_PIECE; }

/* How many pieces one unit of the operation (a write, a page) is cut into. */
static uint64_t pieces_of(const at_op *op) {
    return op->nbytes <= op->piece ? 1 : (op->nbytes - 1) / op->piece + 1; /* hardly ever a division, which costs as much as all else here */
}

void at_fab_cut(at_peer *peer, at_op *op) {
    const at_fab_conn *conn = peer->impl;
    op->piece = op->kind & AT_OP_PAGES ? conn->fab->facts.most_bytes : piece_bytes(conn->fab);
    uint64_t pieces = pieces_of(op);
    op->extent = pieces * op->units;
    int last_may_count = !(op->kind & AT_OP_PAGES) && at_fab_is(conn->fab, AT_FAB_ORDERED);
    if (pieces > 1 && op->imm >= 0 && !last_may_count) { /* one write of no bytes for each unit */
        op->tail = op->units;
        op->extent += op->units;
    }
}

static void add(at_fab_vector *v, uint8_t *here, uint64_t there, uint64_t n) {
    v->here[v->count] = here;
    v->there[v->count] = there;
    v->nbytes[v->count++] = n;
    v->bytes += n;
}

/* The pages from `first` on that one work request covers, at most `most`: how many. */
static uint64_t gather_pages(const at_fab *fab, const at_op *op, uint64_t va, uint64_t first, uint64_t most, at_fab_vector *v) {
    uint64_t base = va + op->remote_offset, n = op->nbytes, taken = 0;
    uint64_t room = MERGED < fab->facts.most_bytes ? MERGED : fab->facts.most_bytes;
    uint32_t pieces = op->kind & AT_OP_READ && op->region->file && op->stage == NULL ? 1 : fab->facts.iov; /* a bounce lands in one */
    for (; taken < most && (taken == 0 || v->bytes + n <= room); taken++) {
        uint8_t *here = op->local + (uint64_t)op->local_pages[first + taken] * op->local_stride;
        uint64_t there = base + (uint64_t)op->remote_pages[first + taken] * op->remote_stride;
        if (v->count != 0) {
            uint32_t i = v->count - 1;
            if (v->here[i] + v->nbytes[i] == here && v->there[i] + v->nbytes[i] == there) { /* neighbours on both sides */
                v->nbytes[i] += n;
                v->bytes += n;
                continue;
            }
            if (v->count == pieces) break;
        }
        add(v, here, there, n);
    }
    return taken;
}

/* What the work request from step `first` on looks like: how many steps it covers (at most `most`), and how many units it counts. */
static uint64_t gather(const at_fab_conn *conn, const at_op *op, const at_remote_part *there, uint64_t first, uint64_t most, at_fab_vector *v,
                       uint64_t *counts) {
    const at_fab *fab = conn->fab;
    uint64_t pieces = pieces_of(op), body = pieces * op->units;
    if (op->remote == NULL || first >= body) { /* a signal, or a tail */
        add(v, (uint8_t *)(uintptr_t)fab->signal_target, conn->signal_target, 0);
        v->key = conn->signal_target_key;
        v->desc = fab->signal_target_desc;
        *counts = op->imm >= 0 && (op->remote == NULL ? 0 : first - body) >= op->precounted;
        return 1;
    }
    if (op->kind & AT_OP_PAGES && pieces == 1) {
        int before = first < op->precounted;
        uint64_t several = op->imm < 0 || before || at_fab_is(fab, AT_FAB_MARKS) ? AT_FAB_MOST_COUNT : 1;
        if (before && several > op->precounted - first) several = op->precounted - first;
        uint64_t taken = gather_pages(fab, op, there->va, first, most < several ? most : several, v);
        *counts = op->imm >= 0 && !before ? taken : 0;
        return taken;
    }
    uint64_t unit = first / pieces, k = first % pieces, from = 0, to = there->va + op->remote_offset, piece = op->piece;
    if (op->kind & AT_OP_PAGES) {
        from = (uint64_t)op->local_pages[unit] * op->local_stride;
        to += (uint64_t)op->remote_pages[unit] * op->remote_stride;
    }
    uint64_t at = k * piece, n = op->nbytes - at < piece ? op->nbytes - at : piece;
    add(v, op->local + from + at, to + at, n);
    *counts = op->imm >= 0 && body == op->extent && k == pieces - 1 && unit >= op->precounted; /* else by its last piece, or its tail */
    return 1;
}

/* Where the operation's memory is, seen by this connection. */
static at_remote_part part_for(const at_fab_conn *conn, const at_op *op) {
    const at_remote *remote = op->remote;
    if (remote == NULL) return (at_remote_part){0, 0};
    return remote->parts != NULL && conn->multirail != NULL ? remote->parts[conn->place] : (at_remote_part){remote->va, remote->key};
}

int at_fab_post_wr(at_fab_conn *conn, at_op *op, at_fab_wr *wr, uint64_t first, uint64_t most) {
    at_fab *fab = conn->fab;
    void *desc;
    int rc = at_fab_source(fab, op, &desc);
    if (rc != AT_OK) return rc;
    at_remote_part there = part_for(conn, op);
    at_fab_vector v; /* its pieces are filled in as they come: zeroing them for each work request shows */
    v.key = there.key;
    v.desc = desc;
    v.device = op->region != NULL && op->region->cuda >= 0;
    v.count = 0;
    v.bytes = 0;
    uint64_t counts = 0, data = 0, steps = gather(conn, op, &there, first, most, &v, &counts);
    if (counts != 0) {
        data = (uint64_t)op->imm;
        if (at_fab_is(fab, AT_FAB_MARKS)) data |= (counts - 1) << 32 | (uint64_t)conn->their_mark << 44;
    }
    if ((rc = at_fab_bounce(fab, op, wr, &v)) != AT_OK) {
        at_fab_bounce_free(fab, wr);
        return rc;
    }
    wr->kind = AT_WR_WORK;
    (void)pthread_mutex_lock(&fab->lock);
    int done = fab->driver->post(conn, wr, &v, op->kind & AT_OP_READ, counts != 0, data);
    (void)pthread_mutex_unlock(&fab->lock);
    if (done != 0 && wr->bounce != NULL) at_fab_bounce_free(fab, wr); /* it may be posted again, and be gone by then */
    if (done == EAGAIN) return at_fab_refused(conn) ? AT_ERAIL : AT_EAGAIN;
    if (done != 0) {
        at_fab_conn_break(conn, done);
        return AT_ERAIL;
    }
    wr->state = AT_WR_POSTED;
    wr->conn = conn;
    wr->op = op;
    wr->cookie = op->cookie;
    wr->first = first;
    wr->steps = steps;
    wr->bytes = v.bytes;
    wr->counts = counts;
    wr->serial = counts != 0 ? ++conn->serial : 0;
    at_fab_list_add(&conn->posted, wr);
    conn->posted_bytes += v.bytes;
    conn->out++;
    fab->posted++;
    return AT_OK;
}

int at_fab_has_room(at_fab_conn *conn) {
    at_fab *fab = conn->fab;
    if (conn->multirail != NULL && (!conn->heard || conn->out >= AT_FAB_WINDOW)) return 0; /* what is silent yet may stay so */
    if (conn->ep == NULL || !conn->begun || conn->mute) return 0;
    if (conn->posted.head != NULL && conn->posted_bytes >= (conn->multirail != NULL ? AT_FAB_RAIL_BYTES : AT_FAB_MOST_BYTES)) return 0;
    if (fab->posted < fab->facts.most_posted) return 1;
    fab->saturated = 1;
    return 0;
}

int64_t at_fab_post(at_peer *peer, at_op *op) {
    at_fab_conn *conn = peer->impl;
    if (conn->repost.head != NULL || !at_fab_has_room(conn)) return 0;
    if (op->remote != NULL && atomic_load(op->remote->word) != op->remote->epoch) return AT_ESTALE;
    at_fab_wr *wr = at_fab_wr_take(conn->fab);
    if (wr == NULL) return AT_EAGAIN;
    int rc = at_fab_post_wr(conn, op, wr, op->cursor, op->extent - op->tail - op->cursor);
    if (rc == AT_OK) return (int64_t)wr->steps;
    at_fab_wr_free(conn->fab, wr);
    if (rc == AT_EAGAIN) at_fab_kick(conn->fab); /* tried again by the loop, or by the thread if that does not come */
    return rc == AT_ERAIL ? 0 : rc; /* broken: it waits until the connection is open again */
}

/* After a refill, which takes the peer for not stalled any more: of what is to be posted again nothing was tried, and where nothing is posted
 * no completion will ask. */
void at_fab_still_stalled(at_peer *peer, const at_fab_list *repost) {
    if (repost->head != NULL && peer->posted == 0 && !peer->paused) at_stall(peer, 1);
}

void at_fab_flush_posts(at_peer *peer) {
    at_fab_conn *conn = peer->impl;
    at_fab *fab = conn->fab;
    at_fab_still_stalled(peer, &conn->repost);
    if (conn->ep == NULL || fab->driver->flush == NULL || fab->gathering) return;
    (void)pthread_mutex_lock(&fab->lock);
    int rc = fab->driver->flush(conn);
    (void)pthread_mutex_unlock(&fab->lock);
    if (rc != 0) at_fab_conn_break(conn, rc);
}

static void repost_some(at_fab_conn *conn) {
    at_peer *peer = conn->peer;
    while (conn->repost.head != NULL && peer->posted < AT_FAB_WINDOW && at_fab_has_room(conn)) {
        at_fab_wr *wr = conn->repost.head;
        at_op *op = at_op_find(peer->lane, wr->cookie);
        at_fab_list_remove(&conn->repost, wr);
        if (op == NULL || op->over || atomic_load(&op->withdrawn)) {
            at_fab_wr_free(conn->fab, wr);
            continue;
        }
        if (op->remote != NULL && atomic_load(op->remote->word) != op->remote->epoch) {
            at_fab_wr_free(conn->fab, wr);
            at_op_stop(op, AT_ESTALE);
            continue;
        }
        int rc = at_fab_post_wr(conn, op, wr, wr->first, wr->steps);
        if (rc == AT_OK) {
            op->posted++;
            peer->posted++;
            continue;
        }
        if (rc == AT_EMEMORY) {
            at_fab_wr_free(conn->fab, wr);
            at_op_stop(op, rc);
            continue;
        }
        wr->previous = NULL; /* back to the front */
        wr->next = conn->repost.head;
        if (conn->repost.head != NULL) conn->repost.head->previous = wr;
        else conn->repost.tail = wr;
        conn->repost.head = wr;
        if (rc == AT_EAGAIN) at_stall(peer, 1);
        return;
    }
}

void at_fab_repost(at_fab_conn *conn) {
    if (conn->repost.head == NULL) return;
    repost_some(conn);
    at_fab_flush_posts(conn->peer);
}
