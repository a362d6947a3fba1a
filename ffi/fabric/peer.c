/* A connection as the lane sees it, a peer: it comes up, is refilled, fenced, destroyed. */

#include "fabric.h"

#include <errno.h>
#include <stdlib.h>

/* ---- coming up ---- */

/* Two connections that are made from both sides at once crossed badly in libfabric 1.17 (the address sanitizer found it using freed
 * memory): one side begins, and the other when that one's first control message has come. */
void at_fab_conn_begin(at_fab_conn *conn) {
    conn->begun = 1;
    conn->peer->paused = 0;
    at_fab_conn_refill(conn);
}

void at_fab_up(at_fab_conn *conn) {
    at_fab *fab = conn->fab;
    if (fab->driver->settle != NULL && conn->ep != NULL) {
        (void)pthread_mutex_lock(&fab->lock);
        fab->driver->settle(conn);
        (void)pthread_mutex_unlock(&fab->lock);
    }
    at_event_push(conn->peer->lane, AT_EV_UP, (uint64_t)conn->peer->id, AT_OK, 0);
    if (!conn->begun) at_fab_conn_begin(conn);
    else if (conn->multirail != NULL) at_fab_conn_refill(conn); /* which posts nothing by a connection that has not been heard of */
    if (conn->multirail != NULL) at_fab_owe_failed(conn->multirail);
}

void at_fab_conn_refill(at_fab_conn *conn) {
    at_peer *peer = conn->peer;
    peer->users++;
    if (peer->stalled) at_stall(peer, 0);
    at_fab_repost(conn);
    at_refill(peer);
    if (conn->multirail != NULL) at_fab_multirail_refill(conn->multirail);
    at_fab_tell(conn);
    at_peer_release(peer);
}

/* ---- the port ---- */

/* The port's fence: of a peer that has ended, or one whose operation was withdrawn and does not drain. */
static void fab_fence(at_peer *peer) {
    at_fab_conn *conn = peer->impl;
    if (at_fab_is(conn->fab, AT_FAB_PRIVATE)) at_fab_conn_break(conn, ECANCELED);
    at_fab_conn_unconfirmed(at_fab_owner(conn), &conn->unconfirmed);
    at_fab_conn_unconfirmed(at_fab_owner(conn), &conn->repost);
}

static void fab_expel(at_peer *peer) {
    at_fab_conn *conn = peer->impl;
    if (at_fab_is(conn->fab, AT_FAB_PRIVATE)) at_fab_conn_break(conn, ETIMEDOUT);
}

static void fab_drain(at_peer *peer) { (void)peer; } /* arrivals are handed over as they are read */

static void fab_forget(at_peer *peer) {
    at_fab_conn *conn = peer->impl;
    at_fab_notes_free(&conn->unconfirmed);
    at_fab_notes_free(&conn->repost);
}

static void fab_destroy(at_peer *peer) {
    at_fab_conn *conn = peer->impl;
    at_fab *fab = conn->fab;
    fab_forget(peer);
    at_fab_conn_close(conn);
    while (conn->posted.head != NULL) { /* of a lane that is being freed, on a shared endpoint */
        at_fab_wr *wr = conn->posted.head;
        at_fab_list_remove(&conn->posted, wr);
        at_fab_wr_retire(fab, wr);
        fab->posted--;
    }
    fab->conns[conn->mark] = NULL;
    if (conn->multirail != NULL) at_fab_multirail_leave(conn);
    else at_fab_words_free(conn->words);
    free(conn->hold);
    free(conn->over);
    free(conn);
}

const at_port at_fab_port = {
    .name = "fabric",
    .window = AT_FAB_WINDOW,
    .cut = at_fab_cut,
    .post = at_fab_post,
    .flush = at_fab_flush_posts,
    .drain = fab_drain,
    .active = at_fab_active,
    .revoke = at_fab_revoke,
    .expel = fab_expel,
    .fence = fab_fence,
    .forget = fab_forget,
    .ping = at_fab_ping,
    .pong = at_fab_pong,
    .answer = at_fab_answer,
    .destroy = fab_destroy,
};
