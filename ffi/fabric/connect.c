/* Connecting, as the engines agree on it by their control connection: offers made and taken, connections given up, and what was counted by
 * one that broke. */

#include "fabric.h"

#include <string.h>

static int open_endpoint(at_fab_conn *conn) {
    at_fab *fab = conn->fab;
    if (fab->shared != NULL) {
        conn->ep = fab->shared;
        return AT_OK;
    }
    (void)pthread_mutex_lock(&fab->lock);
    int rc = fab->driver->open(conn);
    (void)pthread_mutex_unlock(&fab->lock);
    if (rc != 0) {
        fab->rail.lane->oserror = rc;
        return AT_EIO;
    }
    conn->troubled = 0;
    return AT_OK;
}

static int describe(at_fab_conn *conn, at_fab_offer *out) {
    at_fab *fab = conn->fab;
    memset(out, 0, sizeof *out);
    (void)pthread_mutex_lock(&fab->lock);
    int rc = fab->driver->name(conn, out);
    (void)pthread_mutex_unlock(&fab->lock);
    if (rc != 0) {
        fab->rail.lane->oserror = rc;
        return AT_EIO;
    }
    out->mark = conn->mark;
    out->signal_target = fab->signal_target_mr.base;
    out->signal_target_key = fab->signal_target_mr.key;
    out->arrived = conn->arrived_before;
    out->generation = conn->generation;
    out->marks = at_fab_is(fab, AT_FAB_MARKS) ? 1 : 0;
    return AT_OK;
}

/* With the turn and the lock: the endpoint of this generation. */
static int make(at_fab_conn *conn, uint32_t generation, at_fab_offer *out) {
    if (conn->ep == NULL && conn->generation == UINT32_MAX) return AT_EPROTO; /* the other side has named the last one there is */
    /* What was said of one of several is said of a generation, and may come late: none is opened twice. */
    if (conn->multirail != NULL && conn->ep == NULL && generation <= conn->generation) generation = conn->generation + 1;
    if (generation > conn->generation) {
        conn->generation = generation;
        conn->joined = conn->begun = conn->heard = 0;
        conn->arrived_before = conn->arrived;
    } else if (conn->ep != NULL) {
        return describe(conn, out); /* asked again, or both sides have asked */
    }
    int rc = open_endpoint(conn);
    for (uint32_t i = 0; rc == AT_OK && conn->fab->driver->receive != NULL && i < AT_FAB_RECEIVES; i++) rc = at_fab_receive(conn);
    if (rc == AT_OK && conn->fab->driver->handed_out != NULL) conn->fab->driver->handed_out(conn->fab); /* receives for one more */
    if (rc == AT_OK) rc = describe(conn, out);
    if (rc != AT_OK) at_fab_conn_close(conn);
    at_fab_stepped(conn);
    return rc;
}

/* The fabric of a peer's end (member: of one that belongs to a multirail peer), with its turn taken, which the caller gives back; NULL: there is
 * none. What has arrived is counted by then: the caller may end the endpoint, and drains once more what that brings out. */
static at_fab *take_turn(at_lane *lane, int64_t id, int member) {
    at_lock(lane);
    const at_fab_conn *conn = at_fab_conn_of(lane, id);
    at_fab *fab = conn != NULL && (!member || conn->multirail != NULL) ? conn->fab : NULL;
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
    at_fab_conn *conn = at_fab_conn_of(lane, id);
    if (conn != NULL && generation > conn->generation) at_fab_conn_break(conn, 0);
    at_unlock(lane);
    (void)at_fab_drain(fab);
    at_lock(lane);
    conn = at_fab_conn_of(lane, id);
    rc = conn == NULL || conn->peer->status != AT_OK || conn->retired ? AT_EPEER : make(conn, generation, out);
    at_unlock(lane);
    (void)pthread_mutex_unlock(&fab->progress_lock);
    return rc == AT_OK ? at_fab_thread_start(fab) : rc;
}

int at_fab_offer_take(at_lane *lane, int64_t id, const at_fab_offer *theirs, int first) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, id);
    rc = conn == NULL || conn->peer->status != AT_OK ? AT_EPEER : AT_OK;
    if (rc == AT_OK && (theirs->mark >= AT_FAB_MOST_PEERS || theirs->address_bytes > sizeof theirs->address)) rc = AT_EPROTO;
    if (rc == AT_OK && (theirs->marks != 0) != (at_fab_is(conn->fab, AT_FAB_MARKS) != 0)) rc = AT_EPROTO;
    if (rc == AT_OK && (theirs->generation != conn->generation || conn->ep == NULL)) rc = AT_EAGAIN; /* of a connection that is over */
    if (rc == AT_OK && !conn->joined) {
        at_fab *fab = conn->fab;
        (void)pthread_mutex_lock(&fab->lock);
        int failed = fab->driver->join(conn, theirs);
        (void)pthread_mutex_unlock(&fab->lock);
        if (failed != 0) {
            lane->oserror = failed;
            rc = AT_EIO;
        } else {
            at_peer *peer = conn->peer;
            conn->their_mark = theirs->mark;
            conn->signal_target = theirs->signal_target;
            conn->signal_target_key = theirs->signal_target_key;
            conn->joined = 1;
            peer->users++;
            at_fab_reconcile(conn, theirs->arrived);
            if (conn->multirail != NULL) at_fab_multirail_refill(conn->multirail);
            at_fab_say_again(conn);
            if (first) at_fab_conn_begin(conn);
            if (conn->heard) at_fab_up(conn);
            at_fab_stepped(conn);
            at_peer_release(peer);
        }
    }
    at_unlock(lane);
    return rc;
}

uint32_t at_fab_generation(at_lane *lane, int64_t id, int *up) {
    at_lock(lane);
    const at_fab_conn *conn = at_fab_conn_of(lane, id);
    uint32_t generation = conn != NULL ? conn->generation : 0;
    *up = conn == NULL || conn->ep == NULL || !conn->joined ? 0 : conn->heard ? 1 : -1;
    at_unlock(lane);
    return generation;
}

int at_fab_retire(at_lane *lane, int64_t id, uint64_t *arrived) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, id);
    at_fab *fab = conn != NULL ? conn->fab : NULL;
    int possible = fab != NULL && at_fab_is(fab, AT_FAB_PRIVATE) && at_fab_tells(fab);
    at_unlock(lane);
    if (fab == NULL) return AT_EUNKNOWN;
    if (!possible) return AT_ERAIL;
    (void)pthread_mutex_lock(&fab->progress_lock);
    (void)at_fab_drain(fab);
    at_lock(lane);
    if ((conn = at_fab_conn_of(lane, id)) != NULL) {
        at_fab_conn_break(conn, 0);
        conn->retired = 1;
    }
    at_unlock(lane);
    (void)at_fab_drain(fab);
    at_lock(lane);
    if ((conn = at_fab_conn_of(lane, id)) != NULL) *arrived = conn->arrived;
    at_unlock(lane);
    (void)pthread_mutex_unlock(&fab->progress_lock);
    return conn != NULL ? AT_OK : AT_EUNKNOWN;
}

int at_fab_settle(at_lane *lane, int64_t id, uint64_t arrived) {
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, id);
    int rc = conn == NULL || !conn->retired ? AT_EUNKNOWN : AT_OK;
    if (rc == AT_OK) {
        conn->peer->users++;
        at_fab_reconcile(conn, arrived);
        if (conn->multirail != NULL) at_fab_multirail_refill(conn->multirail);
        at_peer_release(conn->peer);
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
    at_fab_conn *conn = at_fab_conn_of(lane, id);
    rc = conn == NULL ? AT_EUNKNOWN : conn->generation > generation ? AT_EAGAIN : AT_OK;
    if (rc == AT_OK) at_fab_conn_break(conn, 0);
    at_unlock(lane);
    (void)at_fab_drain(fab);
    at_lock(lane);
    if ((conn = at_fab_conn_of(lane, id)) == NULL) rc = AT_EUNKNOWN;
    if (rc == AT_OK) *arrived = conn->arrived;
    at_unlock(lane);
    (void)pthread_mutex_unlock(&fab->progress_lock);
    return rc;
}

int at_fab_member_reconcile(at_lane *lane, int64_t id, uint32_t generation, uint64_t arrived) {
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, id);
    int rc = conn == NULL || conn->multirail == NULL ? AT_EUNKNOWN : conn->ep != NULL || conn->generation > generation ? AT_EAGAIN : AT_OK;
    if (rc == AT_OK) {
        at_peer *peer = conn->peer;
        peer->users++;
        at_fab_reconcile(conn, arrived);
        at_fab_multirail_refill(conn->multirail);
        at_peer_release(peer);
    }
    at_unlock(lane);
    return rc;
}
