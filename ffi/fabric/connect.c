/* Connecting, as the engines agree on it by their control connection: offers made and taken, connections given up, and what was counted by
 * one that broke. */

#include "fabric.h"

#include <string.h>

static int open_endpoint(at_fab_end *end) {
    at_fab *fab = end->fab;
    if (fab->shared != NULL) {
        end->ep = fab->shared;
        return AT_OK;
    }
    (void)pthread_mutex_lock(&fab->lock);
    int rc = fab->driver->open(end);
    (void)pthread_mutex_unlock(&fab->lock);
    if (rc != 0) {
        fab->rail.lane->oserror = rc;
        return AT_EIO;
    }
    end->troubled = 0;
    return AT_OK;
}

static int describe(at_fab_end *end, at_fab_offer *out) {
    at_fab *fab = end->fab;
    memset(out, 0, sizeof *out);
    (void)pthread_mutex_lock(&fab->lock);
    int rc = fab->driver->name(end, out);
    (void)pthread_mutex_unlock(&fab->lock);
    if (rc != 0) {
        fab->rail.lane->oserror = rc;
        return AT_EIO;
    }
    out->mark = end->mark;
    out->signal_target = fab->signal_target_mr.base;
    out->signal_target_key = fab->signal_target_mr.key;
    out->arrived = end->arrived_before;
    out->generation = end->generation;
    out->marks = at_fab_is(fab, AT_FAB_MARKS) ? 1 : 0;
    return AT_OK;
}

/* With the turn and the lock: the endpoint of this generation. */
static int make(at_fab_end *end, uint32_t generation, at_fab_offer *out) {
    if (end->ep == NULL && end->generation == UINT32_MAX) return AT_EPROTO; /* the other side has named the last one there is */
    /* What was said of one of several is said of a generation, and may come late: none is opened twice. */
    if (end->multirail != NULL && end->ep == NULL && generation <= end->generation) generation = end->generation + 1;
    if (generation > end->generation) {
        end->generation = generation;
        end->joined = end->begun = end->heard = 0;
        end->arrived_before = end->arrived;
    } else if (end->ep != NULL) {
        return describe(end, out); /* asked again, or both sides have asked */
    }
    int rc = open_endpoint(end);
    for (uint32_t i = 0; rc == AT_OK && end->fab->driver->receive != NULL && i < AT_FAB_RECEIVES; i++) rc = at_fab_receive(end);
    if (rc == AT_OK && end->fab->driver->handed_out != NULL) end->fab->driver->handed_out(end->fab); /* receives for one more */
    if (rc == AT_OK) rc = describe(end, out);
    if (rc != AT_OK) at_fab_end_close(end);
    at_fab_stepped(end);
    return rc;
}

/* The fabric of a peer's end (member: of one that belongs to a multirail peer), with its turn taken, which the caller gives back; NULL: there is
 * none. What has arrived is counted by then: the caller may end the endpoint, and drains once more what that brings out. */
static at_fab *take_turn(at_lane *lane, int64_t id, int member) {
    at_lock(lane);
    const at_fab_end *end = at_fab_end_of(lane, id);
    at_fab *fab = end != NULL && (!member || end->multirail != NULL) ? end->fab : NULL;
    at_unlock(lane);
    if (fab == NULL) return NULL;
    (void)pthread_mutex_lock(&fab->progress_lock);
    (void)at_fab_drain(fab);
    return fab;
}

int at_fab_offer_make(at_lane *lane, int64_t id, uint32_t generation, at_fab_offer *out) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_fab *fab = take_turn(lane, id, 0);
    if (fab == NULL) return AT_EUNKNOWN;
    at_lock(lane);
    at_fab_end *end = at_fab_end_of(lane, id);
    if (end != NULL && generation > end->generation) at_fab_end_break(end, 0);
    at_unlock(lane);
    (void)at_fab_drain(fab);
    at_lock(lane);
    end = at_fab_end_of(lane, id);
    rc = end == NULL || end->peer->status != AT_OK || end->retired ? AT_EPEER : make(end, generation, out);
    at_unlock(lane);
    (void)pthread_mutex_unlock(&fab->progress_lock);
    return rc == AT_OK ? at_fab_thread_start(fab) : rc;
}

int at_fab_offer_take(at_lane *lane, int64_t id, const at_fab_offer *theirs, int first) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_lock(lane);
    at_fab_end *end = at_fab_end_of(lane, id);
    rc = end == NULL || end->peer->status != AT_OK ? AT_EPEER : AT_OK;
    if (rc == AT_OK && (theirs->mark >= AT_FAB_MOST_PEERS || theirs->address_bytes > sizeof theirs->address)) rc = AT_EPROTO;
    if (rc == AT_OK && (theirs->marks != 0) != (at_fab_is(end->fab, AT_FAB_MARKS) != 0)) rc = AT_EPROTO;
    if (rc == AT_OK && (theirs->generation != end->generation || end->ep == NULL)) rc = AT_EAGAIN; /* of a connection that is over */
    if (rc == AT_OK && !end->joined) {
        at_fab *fab = end->fab;
        (void)pthread_mutex_lock(&fab->lock);
        int failed = fab->driver->join(end, theirs);
        (void)pthread_mutex_unlock(&fab->lock);
        if (failed != 0) {
            lane->oserror = failed;
            rc = AT_EIO;
        } else {
            at_peer *peer = end->peer;
            end->their_mark = theirs->mark;
            end->signal_target = theirs->signal_target;
            end->signal_target_key = theirs->signal_target_key;
            end->joined = 1;
            peer->users++;
            at_fab_reconcile(end, theirs->arrived);
            if (end->multirail != NULL) at_fab_multirail_refill(end->multirail);
            at_fab_say_again(end);
            if (first) at_fab_end_begin(end);
            if (end->heard) at_fab_up(end);
            at_fab_stepped(end);
            at_peer_release(peer);
        }
    }
    at_unlock(lane);
    return rc;
}

uint32_t at_fab_generation(at_lane *lane, int64_t id, int *up) {
    at_lock(lane);
    const at_fab_end *end = at_fab_end_of(lane, id);
    uint32_t generation = end != NULL ? end->generation : 0;
    *up = end == NULL || end->ep == NULL || !end->joined ? 0 : end->heard ? 1 : -1;
    at_unlock(lane);
    return generation;
}

int at_fab_retire(at_lane *lane, int64_t id, uint64_t *arrived) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_lock(lane);
    at_fab_end *end = at_fab_end_of(lane, id);
    at_fab *fab = end != NULL ? end->fab : NULL;
    int possible = fab != NULL && at_fab_is(fab, AT_FAB_PRIVATE) && at_fab_tells(fab);
    at_unlock(lane);
    if (fab == NULL) return AT_EUNKNOWN;
    if (!possible) return AT_ERAIL;
    (void)pthread_mutex_lock(&fab->progress_lock);
    (void)at_fab_drain(fab);
    at_lock(lane);
    if ((end = at_fab_end_of(lane, id)) != NULL) {
        at_fab_end_break(end, 0);
        end->retired = 1;
    }
    at_unlock(lane);
    (void)at_fab_drain(fab);
    at_lock(lane);
    if ((end = at_fab_end_of(lane, id)) != NULL) *arrived = end->arrived;
    at_unlock(lane);
    (void)pthread_mutex_unlock(&fab->progress_lock);
    return end != NULL ? AT_OK : AT_EUNKNOWN;
}

int at_fab_settle(at_lane *lane, int64_t id, uint64_t arrived) {
    at_lock(lane);
    at_fab_end *end = at_fab_end_of(lane, id);
    int rc = end == NULL || !end->retired ? AT_EUNKNOWN : AT_OK;
    if (rc == AT_OK) {
        end->peer->users++;
        at_fab_reconcile(end, arrived);
        if (end->multirail != NULL) at_fab_multirail_refill(end->multirail);
        at_peer_release(end->peer);
    }
    at_unlock(lane);
    return rc;
}

/* ---- one of several has broken, and no connection is left to tell it by ---- */

int at_fab_member_failed(at_lane *lane, int64_t id, uint32_t generation, uint64_t *arrived) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_fab *fab = take_turn(lane, id, 1);
    if (fab == NULL) return AT_EUNKNOWN;
    at_lock(lane);
    at_fab_end *end = at_fab_end_of(lane, id);
    rc = end == NULL ? AT_EUNKNOWN : end->generation > generation ? AT_EAGAIN : AT_OK;
    if (rc == AT_OK) at_fab_end_break(end, 0);
    at_unlock(lane);
    (void)at_fab_drain(fab);
    at_lock(lane);
    if ((end = at_fab_end_of(lane, id)) == NULL) rc = AT_EUNKNOWN;
    if (rc == AT_OK) *arrived = end->arrived;
    at_unlock(lane);
    (void)pthread_mutex_unlock(&fab->progress_lock);
    return rc;
}

int at_fab_member_reconcile(at_lane *lane, int64_t id, uint32_t generation, uint64_t arrived) {
    at_lock(lane);
    at_fab_end *end = at_fab_end_of(lane, id);
    int rc = end == NULL || end->multirail == NULL ? AT_EUNKNOWN : end->ep != NULL || end->generation > generation ? AT_EAGAIN : AT_OK;
    if (rc == AT_OK) {
        at_peer *peer = end->peer;
        peer->users++;
        at_fab_reconcile(end, arrived);
        at_fab_multirail_refill(end->multirail);
        at_peer_release(peer);
    }
    at_unlock(lane);
    return rc;
}
