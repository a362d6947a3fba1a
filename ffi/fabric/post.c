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
    const at_fab_end *end = peer->impl;
    op->piece = op->kind & AT_OP_PAGES ? end->fab->facts.most_bytes : piece_bytes(end->fab);
    uint64_t pieces = pieces_of(op);
    op->extent = pieces * op->units;
    int last_may_count = !(op->kind & AT_OP_PAGES) && at_fab_is(end->fab, AT_FAB_ORDERED);
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
static uint64_t gather(const at_fab_end *end, const at_op *op, const at_remote_part *there, uint64_t first, uint64_t most, at_fab_vector *v,
                       uint64_t *counts) {
    const at_fab *fab = end->fab;
    uint64_t pieces = pieces_of(op), body = pieces * op->units;
    if (op->remote == NULL || first >= body) { /* a signal, or a tail */
        add(v, (uint8_t *)(uintptr_t)fab->signal_target, end->signal_target, 0);
        v->key = end->signal_target_key;
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
static at_remote_part part_for(const at_fab_end *end, const at_op *op) {
    const at_remote *remote = op->remote;
    if (remote == NULL) return (at_remote_part){0, 0};
    return remote->parts != NULL && end->multirail != NULL ? remote->parts[end->place] : (at_remote_part){remote->va, remote->key};
}

int at_fab_post_slot(at_fab_end *end, at_op *op, at_fab_slot *slot, uint64_t first, uint64_t most) {
    at_fab *fab = end->fab;
    void *desc;
    int rc = at_fab_source(fab, op, &desc);
    if (rc != AT_OK) return rc;
    at_remote_part there = part_for(end, op);
    at_fab_vector v; /* its pieces are filled in as they come: zeroing them for each work request shows */
    v.key = there.key;
    v.desc = desc;
    v.device = op->region != NULL && op->region->cuda >= 0;
    v.count = 0;
    v.bytes = 0;
    uint64_t counts = 0, data = 0, steps = gather(end, op, &there, first, most, &v, &counts);
    if (counts != 0) {
        data = (uint64_t)op->imm;
        if (at_fab_is(fab, AT_FAB_MARKS)) data |= (counts - 1) << 32 | (uint64_t)end->their_mark << 44;
    }
    if ((rc = at_fab_bounce(fab, op, slot, &v)) != AT_OK) {
        at_fab_bounce_free(fab, slot);
        return rc;
    }
    slot->kind = AT_SLOT_WORK;
    (void)pthread_mutex_lock(&fab->lock);
    int done = fab->driver->post(end, slot, &v, op->kind & AT_OP_READ, counts != 0, data);
    (void)pthread_mutex_unlock(&fab->lock);
    if (done != 0 && slot->bounce != NULL) at_fab_bounce_free(fab, slot); /* it may be posted again, and be gone by then */
    if (done == EAGAIN) return at_fab_refused(end) ? AT_ERAIL : AT_EAGAIN;
    if (done != 0) {
        at_fab_end_break(end, done);
        return AT_ERAIL;
    }
    slot->state = AT_SLOT_POSTED;
    slot->end = end;
    slot->op = op;
    slot->cookie = op->cookie;
    slot->first = first;
    slot->steps = steps;
    slot->bytes = v.bytes;
    slot->counts = counts;
    slot->serial = counts != 0 ? ++end->serial : 0;
    at_fab_list_add(&end->posted, slot);
    end->posted_bytes += v.bytes;
    end->out++;
    fab->posted++;
    return AT_OK;
}

int at_fab_has_room(at_fab_end *end) {
    at_fab *fab = end->fab;
    if (end->multirail != NULL && (!end->heard || end->out >= AT_FAB_WINDOW)) return 0; /* what is silent yet may stay so */
    if (end->ep == NULL || !end->begun || end->mute) return 0;
    if (end->posted.head != NULL && end->posted_bytes >= (end->multirail != NULL ? AT_FAB_RAIL_BYTES : AT_FAB_MOST_BYTES)) return 0;
    if (fab->posted < fab->facts.most_posted) return 1;
    fab->saturated = 1;
    return 0;
}

int64_t at_fab_post(at_peer *peer, at_op *op) {
    at_fab_end *end = peer->impl;
    if (end->repost.head != NULL || !at_fab_has_room(end)) return 0;
    if (op->remote != NULL && atomic_load(op->remote->word) != op->remote->epoch) return AT_ESTALE;
    at_fab_slot *slot = at_fab_slot_take(end->fab);
    if (slot == NULL) return AT_EAGAIN;
    int rc = at_fab_post_slot(end, op, slot, op->cursor, op->extent - op->tail - op->cursor);
    if (rc == AT_OK) return (int64_t)slot->steps;
    at_fab_slot_free(end->fab, slot);
    if (rc == AT_EAGAIN) at_fab_kick(end->fab); /* tried again by the loop, or by the thread if that does not come */
    return rc == AT_ERAIL ? 0 : rc; /* broken: it waits until the connection is open again */
}

/* After a refill, which takes the peer for not stalled any more: of what is to be posted again nothing was tried, and where nothing is posted
 * no completion will ask. */
void at_fab_still_stalled(at_peer *peer, const at_fab_list *repost) {
    if (repost->head != NULL && peer->posted == 0 && !peer->paused) at_stall(peer, 1);
}

void at_fab_flush_posts(at_peer *peer) {
    at_fab_end *end = peer->impl;
    at_fab *fab = end->fab;
    at_fab_still_stalled(peer, &end->repost);
    if (end->ep == NULL || fab->driver->flush == NULL || fab->gathering) return;
    (void)pthread_mutex_lock(&fab->lock);
    int rc = fab->driver->flush(end);
    (void)pthread_mutex_unlock(&fab->lock);
    if (rc != 0) at_fab_end_break(end, rc);
}

static void repost_some(at_fab_end *end) {
    at_peer *peer = end->peer;
    while (end->repost.head != NULL && peer->posted < AT_FAB_WINDOW && at_fab_has_room(end)) {
        at_fab_slot *slot = end->repost.head;
        at_op *op = at_op_find(peer->lane, slot->cookie);
        at_fab_list_remove(&end->repost, slot);
        if (op == NULL || op->over || atomic_load(&op->withdrawn)) {
            at_fab_slot_free(end->fab, slot);
            continue;
        }
        if (op->remote != NULL && atomic_load(op->remote->word) != op->remote->epoch) {
            at_fab_slot_free(end->fab, slot);
            at_op_stop(op, AT_ESTALE);
            continue;
        }
        int rc = at_fab_post_slot(end, op, slot, slot->first, slot->steps);
        if (rc == AT_OK) {
            op->posted++;
            peer->posted++;
            continue;
        }
        if (rc == AT_EMEMORY) {
            at_fab_slot_free(end->fab, slot);
            at_op_stop(op, rc);
            continue;
        }
        slot->previous = NULL; /* back to the front */
        slot->next = end->repost.head;
        if (end->repost.head != NULL) end->repost.head->previous = slot;
        else end->repost.tail = slot;
        end->repost.head = slot;
        if (rc == AT_EAGAIN) at_stall(peer, 1);
        return;
    }
}

void at_fab_repost(at_fab_end *end) {
    if (end->repost.head == NULL) return;
    repost_some(end);
    at_fab_flush_posts(end->peer);
}
