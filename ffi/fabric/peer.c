/* A connection as the lane sees it, a peer: it comes up, is refilled, fenced, destroyed. */

#include "fabric.h"

#include <errno.h>
#include <stdlib.h>

/* ---- coming up ---- */

/* Two connections that are made from both sides at once crossed badly in libfabric 1.17 (the address sanitizer found it using freed
 * memory): one side begins, and the other when that one's first control message has come. */
void at_fab_end_begin(at_fab_end *end) {
    end->begun = 1;
    end->peer->paused = 0;
    at_fab_end_refill(end);
}

void at_fab_up(at_fab_end *end) {
    at_fab *fab = end->fab;
    if (fab->driver->settle != NULL && end->ep != NULL) {
        (void)pthread_mutex_lock(&fab->lock);
        fab->driver->settle(end);
        (void)pthread_mutex_unlock(&fab->lock);
    }
    at_event_push(end->peer->lane, AT_EV_UP, (uint64_t)end->peer->id, AT_OK, 0);
    if (!end->begun) at_fab_end_begin(end);
    else if (end->multirail != NULL) at_fab_end_refill(end); /* which posts nothing by a connection that has not been heard of */
    if (end->multirail != NULL) at_fab_owe_failed(end->multirail);
}

void at_fab_end_refill(at_fab_end *end) {
    at_peer *peer = end->peer;
    peer->users++;
    if (peer->stalled) at_stall(peer, 0);
    at_fab_repost(end);
    at_refill(peer);
    if (end->multirail != NULL) at_fab_multirail_refill(end->multirail);
    at_fab_tell(end);
    at_peer_release(peer);
}

/* ---- the port ---- */

/* The port's fence: of a peer that has ended, or one whose operation was withdrawn and does not drain. */
static void fab_fence(at_peer *peer) {
    at_fab_end *end = peer->impl;
    if (at_fab_is(end->fab, AT_FAB_PRIVATE)) at_fab_end_break(end, ECANCELED);
    at_fab_end_unconfirmed(at_fab_owner(end), &end->unconfirmed);
    at_fab_end_unconfirmed(at_fab_owner(end), &end->repost);
}

static void fab_expel(at_peer *peer) {
    at_fab_end *end = peer->impl;
    if (at_fab_is(end->fab, AT_FAB_PRIVATE)) at_fab_end_break(end, ETIMEDOUT);
}

static void fab_drain(at_peer *peer) { (void)peer; } /* arrivals are handed over as they are read */

static void fab_forget(at_peer *peer) {
    at_fab_end *end = peer->impl;
    at_fab_notes_free(&end->unconfirmed);
    at_fab_notes_free(&end->repost);
}

static void fab_destroy(at_peer *peer) {
    at_fab_end *end = peer->impl;
    at_fab *fab = end->fab;
    fab_forget(peer);
    at_fab_end_close(end);
    while (end->posted.head != NULL) { /* of a lane that is being freed, on a shared endpoint */
        at_fab_slot *slot = end->posted.head;
        at_fab_list_remove(&end->posted, slot);
        at_fab_slot_retire(fab, slot);
        fab->posted--;
    }
    fab->ends[end->mark] = NULL;
    if (end->multirail != NULL) at_fab_multirail_leave(end);
    else at_fab_words_free(end->words);
    free(end->hold);
    free(end->over);
    free(end);
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
