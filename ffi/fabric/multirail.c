/* Multirail peers: several connections to one peer, taken as one. What is posted goes to whichever has the least under way; what broke with one
 * is counted by both sides and goes out by the others. */

#include "fabric.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SMALL UINT64_C(4096) /* what a work request weighs beside its bytes */

static at_fab_multirail *multirail_of(at_lane *lane, int64_t id) {
    at_peer *peer = at_peer_find(lane, id);
    return peer != NULL && peer->port == &at_fab_multirail_port ? peer->impl : NULL;
}

/* ---- made, and destroyed with its last connection ---- */

int64_t at_fab_multirail_new(at_lane *lane) {
    at_fab_multirail *multirail = calloc(1, sizeof *multirail);
    at_control *words = at_fab_words_new();
    int64_t result = multirail != NULL && words != NULL ? AT_OK : AT_ENOMEM;
    at_lock(lane);
    if (result == AT_OK && lane->shut) result = AT_ESHUT;
    if (result == AT_OK) {
        multirail->words = words;
        multirail->users = 1;
        multirail->peer = at_peer_add(lane, &at_fab_multirail_port, multirail, words);
        if (multirail->peer != NULL) multirail->peer->device = 1; /* as far as all of them are */
        result = multirail->peer != NULL ? multirail->peer->id : AT_ENOMEM;
    }
    at_unlock(lane);
    if (result < 0) {
        at_fab_words_free(words);
        free(multirail);
    }
    return result;
}

int64_t at_fab_multirail_add(at_lane *lane, int64_t id, at_fab *fab) {
    at_lock(lane);
    at_fab_multirail *multirail = multirail_of(lane, id);
    at_unlock(lane);
    return multirail != NULL ? at_fab_conn_add(lane, fab, multirail, multirail->words) : AT_EUNKNOWN;
}

static void release(at_fab_multirail *multirail) {
    if (--multirail->users != 0) return;
    at_fab_words_free(multirail->words);
    free(multirail);
}

void at_fab_multirail_leave(at_fab_conn *conn) {
    conn->multirail->members[conn->place] = NULL;
    release(conn->multirail);
}

/* ---- posting ---- */

/* The connection that the next work request goes by, none of `refused`; NULL: all are full, silent or broken. */
static at_fab_conn *pick(at_fab_multirail *multirail, const int32_t *refused) {
    uint64_t load[AT_FAB_MOST_RAILS];
    int32_t open[AT_FAB_MOST_RAILS];
    for (uint32_t i = 0; i < multirail->count; i++) {
        at_fab_conn *conn = multirail->members[i];
        open[i] = !refused[i] && conn != NULL && conn->peer->status == AT_OK && at_fab_has_room(conn);
        load[i] = open[i] ? conn->posted_bytes + SMALL * conn->out : 0;
    }
    int32_t best = multirail->count != 0 ? at_share_pick(load, open, multirail->count, multirail->next_rail) : -1;
    return best >= 0 ? multirail->members[best] : NULL;
}

/* Post it by one of them: the work request, or NULL and *rc. AT_OK: a completion, or a connection that comes up, will ask again. */
static at_fab_wr *post_somewhere(at_fab_multirail *multirail, at_op *op, uint64_t first, uint64_t most, int *rc) {
    int32_t refused[AT_FAB_MOST_RAILS] = {0};
    *rc = multirail->retired ? AT_ERAIL : AT_OK;
    if (multirail->retired) return NULL;
    for (at_fab_conn *conn; (conn = pick(multirail, refused)) != NULL;) {
        at_fab_wr *wr = at_fab_wr_take(conn->fab);
        int done = wr != NULL ? at_fab_post_wr(conn, op, wr, first, most) : AT_EAGAIN;
        if (done == AT_OK) {
            multirail->next_rail = (conn->place + 1) % multirail->count;
            return wr;
        }
        if (wr != NULL) at_fab_wr_free(conn->fab, wr);
        if (done != AT_EAGAIN && done != AT_ERAIL) {
            *rc = done;
            return NULL;
        }
        refused[conn->place] = 1;
        if (done == AT_EAGAIN) {
            *rc = AT_EAGAIN;
            at_fab_kick(conn->fab); /* tried again by the loop, or by the thread if that does not come */
        }
    }
    return NULL;
}

static void cut(at_peer *peer, at_op *op) {
    const at_fab_multirail *multirail = peer->impl;
    uint64_t most = UINT64_MAX;
    uint32_t rails = 0;
    for (uint32_t i = 0; i < multirail->count; i++) {
        if (multirail->members[i] == NULL) continue;
        uint64_t takes = multirail->members[i]->fab->facts.most_bytes;
        if (takes < most) most = takes;
        rails++;
    }
    if (op->kind & AT_OP_PAGES) op->piece = most;
    else op->piece = at_share_piece(op->nbytes, rails, most < AT_FAB_PIECE ? most : AT_FAB_PIECE);
    uint64_t pieces = op->nbytes == 0 ? 1 : (op->nbytes - 1) / op->piece + 1;
    op->extent = pieces * op->units;
    if (pieces > 1 && op->imm >= 0) { /* no order between rails: each unit counts by a write of no bytes, once all of them have landed */
        op->tail = op->units;
        op->extent += op->units;
    }
}

static void repost_some(at_fab_multirail *multirail) {
    at_peer *peer = multirail->peer;
    for (at_fab_wr *note; !multirail->retired && (note = multirail->repost.head) != NULL;) {
        at_op *op = at_op_find(peer->lane, note->cookie);
        int over = op == NULL || op->over || atomic_load(&op->withdrawn), rc = AT_OK;
        int stale = !over && op->remote != NULL && atomic_load(op->remote->word) != op->remote->epoch;
        uint64_t first = note->first, steps = note->steps;
        if (!over && !stale) {
            at_fab_wr *wr = post_somewhere(multirail, op, first, steps, &rc);
            if (wr == NULL) {
                if (rc == AT_EAGAIN) at_stall(peer, 1);
                if (rc == AT_OK || rc == AT_EAGAIN) return;
                stale = 1;
            } else {
                op->posted++;
                peer->posted++;
                if (wr->steps < steps) { /* another rail takes less at once */
                    note->first = first + wr->steps;
                    note->steps = steps - wr->steps;
                    continue;
                }
            }
        }
        at_fab_list_remove(&multirail->repost, note);
        at_fab_wr_free(note->conn->fab, note);
        if (stale) at_op_stop(op, rc != AT_OK ? rc : AT_ESTALE);
    }
}

static void flush(at_peer *peer) {
    at_fab_multirail *multirail = peer->impl;
    int room = 0;
    for (uint32_t i = 0; i < multirail->count; i++) {
        at_fab_conn *conn = multirail->members[i];
        if (conn == NULL) continue;
        at_fab_flush_posts(conn->peer);
        room |= at_fab_has_room(conn);
    }
    if (room) at_fab_still_stalled(peer, &multirail->repost); /* else one that comes up will ask */
}

void at_fab_multirail_refill(at_fab_multirail *multirail) {
    at_peer *peer = multirail->peer;
    if (peer == NULL || multirail->retired) return;
    peer->users++;
    at_stall(peer, 0);
    if (multirail->repost.head != NULL) {
        repost_some(multirail);
        flush(peer);
    }
    if (multirail->repost.head == NULL) at_refill(peer);
    at_peer_release(peer);
}

static int64_t post(at_peer *peer, at_op *op) {
    at_fab_multirail *multirail = peer->impl;
    if (multirail->repost.head != NULL || multirail->retired) return 0;
    if (op->remote != NULL && atomic_load(op->remote->word) != op->remote->epoch) return AT_ESTALE;
    int rc;
    at_fab_wr *wr = post_somewhere(multirail, op, op->cursor, op->extent - op->tail - op->cursor, &rc);
    return wr != NULL ? (int64_t)wr->steps : rc;
}

/* ---- memory ---- */

int at_fab_multirail_joins(at_lane *lane, int64_t id, int64_t theirs) {
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, id);
    if (conn != NULL) conn->their_peer = theirs;
    at_unlock(lane);
    return conn != NULL ? AT_OK : AT_EUNKNOWN;
}

int64_t at_fab_multirail_import_keys(at_lane *lane, int64_t id, uint32_t n, const int64_t *peers, const uint64_t *addresses, const uint64_t *keys,
                             uint64_t nbytes, int access, uint32_t slot, uint64_t epoch) {
    at_remote_part *parts = calloc(AT_FAB_MOST_RAILS, sizeof *parts);
    if (parts == NULL) return AT_ENOMEM;
    at_lock(lane);
    at_fab_multirail *multirail = multirail_of(lane, id);
    int rc = multirail == NULL || multirail->peer->status != AT_OK ? AT_EPEER : slot >= AT_GRANTS || (epoch & 1u) == 0 ? AT_EPROTO : AT_OK;
    uint32_t known = 0;
    for (uint32_t i = 0; rc == AT_OK && i < n; i++) {
        const at_fab_conn *conn = at_fab_conn_of(lane, peers[i]);
        if (conn == NULL || conn->multirail != multirail) continue;
        parts[conn->place] = (at_remote_part){addresses[i], keys[i]};
        known |= 1u << conn->place;
    }
    for (uint32_t i = 0; rc == AT_OK && i < multirail->count; i++)
        if (multirail->members[i] != NULL && !(known & 1u << i)) rc = AT_EPROTO;
    if (rc == AT_OK) {
        _Atomic uint64_t *word = &multirail->words->epoch[slot]; /* epochs of a slot only rise: a control message may have come before this */
        uint64_t before = atomic_load(word);
        if (before < epoch) atomic_store(word, epoch);
        else if (before > epoch) rc = AT_ESTALE;
    }
    at_unlock(lane);
    int64_t remote = rc == AT_OK ? at_remote_add(lane, id, NULL, parts[0].va, nbytes, access, slot, epoch) : rc;
    at_lock(lane);
    at_remote *imported = remote >= 0 ? at_remote_use(lane, remote) : NULL;
    if (imported != NULL) {
        imported->parts = parts;
        parts = NULL;
    }
    at_unlock(lane);
    free(parts);
    return remote;
}

/* ---- given up ---- */

int at_fab_multirail_retire(at_lane *lane, int64_t id) {
    at_lock(lane);
    at_fab_multirail *multirail = multirail_of(lane, id);
    if (multirail != NULL) multirail->retired = 1;
    for (uint32_t i = 0; multirail != NULL && i < multirail->count; i++)
        if (multirail->members[i] != NULL) multirail->members[i]->retired = 1; /* none of them is opened again */
    at_unlock(lane);
    return multirail != NULL ? AT_OK : AT_EUNKNOWN;
}

/* ---- the rest of the port ---- */

static void drain(at_peer *peer) { (void)peer; } /* its connections hand over what they read */

static int active(at_peer *peer, uint32_t slot) {
    (void)peer;
    (void)slot;
    return 0; /* each of its connections answers for itself */
}

static int is_withdrawn(const at_fab_conn *conn) {
    for (const at_fab_wr *wr = conn->posted.head; wr != NULL; wr = wr->next)
        if (atomic_load(&wr->op->withdrawn)) return 1;
    return 0;
}

static void fence(at_peer *peer) {
    at_fab_multirail *multirail = peer->impl;
    for (uint32_t i = 0; i < multirail->count; i++) {
        at_fab_conn *conn = multirail->members[i];
        if (conn == NULL) continue;
        if (peer->status != AT_OK) at_peer_end(conn->peer, peer->status);
        else if (at_fab_is(conn->fab, AT_FAB_PRIVATE) && is_withdrawn(conn)) at_fab_conn_break(conn, ECANCELED);
        at_fab_conn_unconfirmed(peer, &conn->unconfirmed);
    }
    at_fab_conn_unconfirmed(peer, &multirail->repost);
}

static void forget(at_peer *peer) {
    at_fab_multirail *multirail = peer->impl;
    for (uint32_t i = 0; i < multirail->count; i++)
        if (multirail->members[i] != NULL) at_fab_notes_free(&multirail->members[i]->unconfirmed);
    at_fab_notes_free(&multirail->repost);
}

static void ping(at_peer *peer, uint64_t seq) {
    at_fab_multirail *multirail = peer->impl;
    for (uint32_t i = 0; i < multirail->count; i++)
        if (multirail->members[i] != NULL) at_fab_ping(multirail->members[i]->peer, seq);
}

/* Sums: another number means that it is there. */
static void pong(at_peer *peer, uint64_t *native, uint64_t *loop) {
    at_fab_multirail *multirail = peer->impl;
    *native = *loop = 0;
    for (uint32_t i = 0; i < multirail->count; i++) {
        uint64_t one_native, one_loop;
        if (multirail->members[i] == NULL) continue;
        at_fab_pong(multirail->members[i]->peer, &one_native, &one_loop);
        *native += one_native;
        *loop += one_loop;
    }
}

static void answer(at_peer *peer, int from_loop) {
    (void)peer;
    (void)from_loop;
}

static void destroy(at_peer *peer) {
    at_fab_multirail *multirail = peer->impl;
    forget(peer);
    multirail->peer = NULL;
    release(multirail);
}

const at_port at_fab_multirail_port = {
    .name = "rails",
    .window = AT_FAB_WINDOW * AT_FAB_MOST_RAILS,
    .cut = cut,
    .post = post,
    .flush = flush,
    .drain = drain,
    .active = active,
    .fence = fence,
    .forget = forget,
    .ping = ping,
    .pong = pong,
    .answer = answer,
    .destroy = destroy,
};
