/* Connections, as this lane has them: made, found, broken, and what was under way by one that broke. What follows from that is for those above:
 * the thread that makes progress tells the other side, and posts again. */

#include "fabric.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define REFUSALS 8u /* so many posts put off with nothing posted, over so long, none of them after a longer pause: it has broken */
#define REFUSED_NS UINT64_C(100000000)
#define REFUSALS_APART_NS UINT64_C(500000000)

at_fab_conn *at_fab_conn_of(at_lane *lane, int64_t id) {
    at_peer *peer = at_peer_find(lane, id);
    return peer != NULL && peer->port == &at_fab_port ? peer->impl : NULL;
}

static int place(at_fab *fab, at_fab_conn *conn) {
    uint32_t i = 0;
    while (i < fab->conn_count && fab->conns[i] != NULL) i++;
    if (i == AT_FAB_MOST_PEERS) return AT_EBUSY;
    if (at_grow((void ***)&fab->conns, &fab->conn_room, i) != 0) return AT_ENOMEM;
    fab->conns[i] = conn;
    conn->mark = i;
    if (i == fab->conn_count) fab->conn_count++;
    return AT_OK;
}

/* As large as all grants; pages of it come into being where grants are used. Not by calloc: once one of them has been freed, the next
 * comes from the heap and is zeroed, half a megabyte for each peer. */
at_control *at_fab_words_new(void) {
    void *words = mmap(NULL, sizeof(at_control), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return words != MAP_FAILED ? words : NULL;
}

void at_fab_words_free(at_control *words) {
    if (words != NULL) (void)munmap(words, sizeof *words);
}

int64_t at_fab_peer(at_lane *lane, at_fab *fab) {
    at_control *words = at_fab_words_new();
    int64_t result = words != NULL ? at_fab_conn_add(lane, fab, NULL, words) : AT_ENOMEM;
    if (result < 0) at_fab_words_free(words);
    return result;
}

int64_t at_fab_conn_add(at_lane *lane, at_fab *fab, at_fab_multirail *multirail, at_control *words) {
    at_fab_conn *conn = calloc(1, sizeof *conn);
    int64_t result = conn != NULL ? AT_OK : AT_ENOMEM;
    at_lock(lane);
    if (result == AT_OK && lane->shut) result = AT_ESHUT;
    if (result == AT_OK && multirail != NULL && (multirail->peer == NULL || multirail->count == AT_FAB_MOST_RAILS)) result = AT_EBUSY;
    if (result == AT_OK) {
        conn->fab = fab;
        conn->words = words;
        conn->to = UINT64_MAX; /* nowhere */
        conn->unique = ++fab->uniques;
        result = place(fab, conn);
    }
    if (result == AT_OK) {
        conn->peer = at_peer_add(lane, &at_fab_port, conn, words);
        if (conn->peer == NULL) {
            fab->conns[conn->mark] = NULL;
            result = AT_ENOMEM;
        } else {
            conn->peer->paused = 1;
            conn->peer->device = at_fab_is(fab, AT_FAB_DEVICE);
            conn->peer->pins = at_fab_is(fab, AT_FAB_LOCAL_MR);
            result = conn->peer->id;
            if ((conn->multirail = multirail) != NULL) {
                conn->place = multirail->count;
                multirail->members[multirail->count++] = conn;
                multirail->users++;
                multirail->peer->device &= conn->peer->device;
                multirail->peer->pins |= conn->peer->pins;
            }
        }
    }
    at_unlock(lane);
    if (result < 0) free(conn);
    return result;
}

/* ---- breaking ---- */

/* What was posted on an endpoint that is closed now: the provider reads its memory no more. */
static void unconfirm(at_fab_conn *conn, at_fab_wr *wr) {
    at_fab *fab = conn->fab;
    at_op *op = wr->op;
    at_fab_list_remove(&conn->posted, wr);
    conn->posted_bytes -= wr->bytes;
    conn->out--;
    fab->posted--;
    wr->op = NULL;
    at_fab_wr *note = at_fab_wr_take(fab); /* remembers what is to be found out; the wr itself stays the provider's for a while */
    at_fab_wr_retire(fab, wr);
    int over = op->peer->status;
    if (over == AT_OK && conn->multirail != NULL && !at_fab_tells(fab)) over = AT_ERAIL; /* neither side will know whether it was counted */
    if (atomic_load(&op->withdrawn) || over != AT_OK || note == NULL) {
        if (note != NULL) at_fab_wr_free(fab, note);
        at_op_complete(op, 0, 0, 0, op->status != AT_OK ? op->status : over != AT_OK ? over : AT_ERAIL);
        return;
    }
    *note = (at_fab_wr){.conn = conn, .cookie = wr->cookie, .first = wr->first, .steps = wr->steps, .bytes = wr->bytes,
                          .counts = wr->counts, .serial = wr->serial, .desc = note->desc, .state = AT_WR_UNCONFIRMED};
    at_fab_list_add(&conn->unconfirmed, note);
    at_op_unpost(op);
}

#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define TO(state) (1u << AT_CONN_##state)

void at_fab_stepped(at_fab_conn *conn) {
    static const unsigned may[] = { /* each also stay, or be closed */
        [AT_CONN_CLOSED] = TO(MADE), [AT_CONN_MADE] = TO(EARLY) | TO(JOINED) | TO(BEGUN), [AT_CONN_EARLY] = TO(UP),
        [AT_CONN_JOINED] = TO(UP), [AT_CONN_BEGUN] = TO(UP), [AT_CONN_UP] = 0,
    };
    int joined = conn->joined, begun = conn->begun, heard = conn->heard, now = AT_CONN_CLOSED, known = 1;
    if (conn->ep != NULL) {
        now = joined && begun ? (heard ? AT_CONN_UP : AT_CONN_BEGUN) : joined ? AT_CONN_JOINED : heard ? AT_CONN_EARLY : AT_CONN_MADE;
        known = begun ? joined : !(joined && heard);
    }
    if (known && (now == conn->state || now == AT_CONN_CLOSED || (may[conn->state] >> now & 1u))) {
        conn->state = now;
        return;
    }
    (void)fprintf(stderr, "a connection of generation %u steps from state %d to %d, joined %d, begun %d, heard %d\n", conn->generation, conn->state,
                  now, joined, begun, heard);
    abort();
}
#endif

/* Close its endpoint: afterwards nothing of it touches memory, and no control message is under way. */
void at_fab_conn_close(at_fab_conn *conn) {
    at_fab *fab = conn->fab;
    if (conn->ep != NULL) {
        (void)pthread_mutex_lock(&fab->lock);
        fab->driver->close(conn);
        (void)pthread_mutex_unlock(&fab->lock);
        conn->closed_as = ++fab->closings;
    }
    for (at_fab_wr *wr; (wr = conn->ctrls.head) != NULL;) {
        at_fab_list_remove(&conn->ctrls, wr);
        at_fab_wr_retire(fab, wr);
    }
    conn->telling = 0;
    at_fab_stepped(conn);
}

void at_fab_owe(at_fab_multirail *multirail) {
    for (uint32_t i = 0; i < multirail->count; i++) {
        at_fab_conn *conn = multirail->members[i];
        if (conn == NULL || conn->ep != NULL || conn->generation == 0) continue;
        conn->owes = 1;
        if (conn->closed_as > conn->fab->read_up_to) at_fab_hurry(conn->fab); /* what is left of it has to be read */
    }
}

void at_fab_conn_break(at_fab_conn *conn, int error) {
    at_peer *peer = conn->peer;
    if (conn->ep == NULL) return;
    peer->users++;
    if (error != 0) conn->troubled = 1;
    at_fab_conn_close(conn);
    peer->paused = 1;
    at_stall(peer, 0);
    for (at_fab_wr *wr; (wr = conn->repost.head) != NULL;) { /* posted again and broken again: still to be found out */
        at_fab_list_remove(&conn->repost, wr);
        wr->state = AT_WR_UNCONFIRMED;
        wr->serial = 0; /* it was not posted since that was settled last */
        at_fab_list_add(&conn->unconfirmed, wr);
    }
    while (conn->posted.head != NULL) unconfirm(conn, conn->posted.head);
    if (conn->multirail != NULL && peer->status == AT_OK) at_fab_owe(conn->multirail); /* told once its number is final: see at_fab_drain */
    if (peer->status == AT_OK && error != 0) at_event_push(peer->lane, AT_EV_RAIL, (uint64_t)peer->id, AT_ERAIL, (uint64_t)error);
    at_peer_release(peer);
}

/* libfabric's tcp reports no error when a connection breaks while nothing is posted. The next post makes another one, and is put off
 * meanwhile: for ever where the other side accepts no connection any more. */
int at_fab_refused(at_fab_conn *conn) {
    if (!conn->alone || !conn->heard || conn->out != 0 || conn->telling) return 0;
    uint64_t now = at_now();
    if (now - conn->refused_last > REFUSALS_APART_NS) {
        conn->refused_first = now;
        conn->refusals = 0;
    }
    conn->refused_last = now;
    if (++conn->refusals < REFUSALS || now - conn->refused_first < REFUSED_NS) return 0;
    conn->refused_last = 0; /* the next connection begins anew */
    at_fab_conn_break(conn, ECONNRESET);
    return 1;
}

int at_fab_break(at_lane *lane, int64_t peer) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, peer);
    if (conn != NULL) at_fab_conn_break(conn, ECONNRESET);
    at_unlock(lane);
    return conn != NULL ? AT_OK : AT_EUNKNOWN;
}

int at_fab_mute(at_lane *lane, int64_t peer) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, peer);
    if (conn != NULL) conn->mute = 1;
    at_unlock(lane);
    return conn != NULL ? AT_OK : AT_EUNKNOWN;
}

/* ---- what was under way ---- */

/* Withdrawn operations that only wait to be found out are over: their memory is not read any more. Of a peer that has ended, all are. */
void at_fab_conn_unconfirmed(at_peer *peer, at_fab_list *list) {
    for (at_fab_wr *wr = list->head, *next; wr != NULL; wr = next) {
        next = wr->next;
        at_op *op = at_op_find(peer->lane, wr->cookie);
        int over = op == NULL || op->over;
        if (!over && peer->status == AT_OK) continue;
        at_fab_list_remove(list, wr);
        at_fab_wr_free(wr->conn->fab, wr);
        if (!over) at_op_stop(op, peer->status);
    }
}

/* The other side says how many of our work requests with immediates it has ever counted: by their order it is known which. Those
 * that it has not counted will be posted with the numbers that follow. */
void at_fab_reconcile(at_fab_conn *conn, uint64_t arrived) {
    at_peer *peer = at_fab_owner(conn);
    at_fab_list *repost = conn->multirail != NULL ? &conn->multirail->repost : &conn->repost;
    conn->serial = arrived;
    for (at_fab_wr *wr; (wr = conn->unconfirmed.head) != NULL;) {
        at_fab_list_remove(&conn->unconfirmed, wr);
        at_op *op = at_op_find(peer->lane, wr->cookie);
        if (op == NULL || op->over) {
            at_fab_wr_free(conn->fab, wr);
        } else if (wr->serial != 0 && wr->serial <= arrived) {
            op->posted++; /* at_op_complete takes it off again */
            peer->posted++;
            uint64_t steps = wr->steps, bytes = wr->bytes, counts = wr->counts;
            at_fab_wr_free(conn->fab, wr);
            at_op_complete(op, steps, bytes, counts, AT_OK);
        } else {
            wr->state = AT_WR_REPOST;
            at_fab_list_add(repost, wr);
        }
    }
}

void at_fab_notes_free(at_fab_list *list) {
    for (at_fab_wr *wr; (wr = list->head) != NULL;) {
        at_fab_list_remove(list, wr);
        at_fab_wr_free(wr->conn->fab, wr);
    }
}
