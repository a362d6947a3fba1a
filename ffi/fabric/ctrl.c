/* Control messages: signs of life, revocations and their confirmations, written and answered by the thread that makes progress, without the loop.
 *
 * One control message at a time is under way in each direction, and says all that is to be said when it is written. What a lost one said is
 * said again once the connection is open again: grants that are taken back stay AT_HOLD_TELL or AT_HOLD_TOLD until they are confirmed. */

#include "fabric.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int at_fab_receive(at_fab_conn *conn) {
    at_fab *fab = conn->fab;
    at_fab_wr *wr = at_fab_wr_take(fab);
    if (wr == NULL) return AT_ENOMEM;
    wr->kind = AT_WR_CTRL_IN;
    wr->state = AT_WR_POSTED;
    wr->conn = fab->shared != NULL ? NULL : conn; /* those of a shared endpoint belong to no connection */
    (void)pthread_mutex_lock(&fab->lock);
    int rc = fab->driver->receive(conn, wr);
    (void)pthread_mutex_unlock(&fab->lock);
    if (rc != 0) {
        at_fab_wr_free(fab, wr);
        fab->rail.lane->oserror = rc;
        return AT_EIO;
    }
    if (wr->conn != NULL) at_fab_list_add(&conn->ctrls, wr);
    return AT_OK;
}

/* ---- what a control message tells of connections that have broken: see failover.c ---- */

/* Closed, and its number is final. */
static int is_ready(const at_fab_conn *conn) {
    return conn->owes && conn->ep == NULL && conn->closed_as <= conn->fab->read_up_to && conn->their_peer != 0 && !conn->retired;
}

static uint32_t owed_parts(const at_fab_conn *carrier) {
    const at_fab_multirail *multirail = carrier->multirail;
    uint32_t n = 0;
    for (uint32_t i = 0; multirail != NULL && i < multirail->count; i++) n += multirail->members[i] != NULL && is_ready(multirail->members[i]);
    return n;
}

static void write_parts(at_fab_conn *carrier, at_fab_ctrl *ctrl) {
    const at_fab_multirail *multirail = carrier->multirail;
    for (uint32_t i = 0; multirail != NULL && i < multirail->count && ctrl->failed_count < AT_FAB_FAILED; i++) {
        at_fab_conn *conn = multirail->members[i];
        if (conn == NULL || !is_ready(conn)) continue;
        ctrl->failed[ctrl->failed_count].peer = conn->their_peer;
        ctrl->failed[ctrl->failed_count].generation = conn->generation;
        ctrl->failed[ctrl->failed_count++].arrived = conn->arrived;
    }
}

static void parts_sent(at_fab_conn *carrier, const at_fab_ctrl *ctrl) {
    const at_fab_multirail *multirail = carrier->multirail;
    for (uint32_t i = 0; i < ctrl->failed_count; i++)
        for (uint32_t k = 0; k < multirail->count; k++)
            if (multirail->members[k] != NULL && multirail->members[k]->their_peer == ctrl->failed[i].peer) multirail->members[k]->owes = 0;
}

/* ---- what we say ---- */

/* Whether anything of ours is still posted that this grant of theirs allowed. */
static int in_use(const at_fab_conn *conn, uint32_t grant, uint64_t epoch) {
    for (const at_fab_wr *wr = conn->posted.head; wr != NULL; wr = wr->next)
        if (wr->op->remote != NULL && wr->op->remote->slot == grant && wr->op->remote->epoch == epoch) return 1;
    return 0;
}

static void pair_up(at_fab_ctrl *ctrl, uint32_t slot, uint64_t epoch) {
    uint32_t i = ctrl->revoked + ctrl->over;
    ctrl->pairs[i].slot = slot;
    ctrl->pairs[i].epoch = epoch;
}

/* A confirmation is not owed any more: it is under way, or its grant's slot has another grant since. */
static void owed_no_more(at_fab_conn *conn, uint32_t slot) {
    uint64_t bit = UINT64_C(1) << (slot % 64);
    conn->over_count -= (conn->over[slot / 64] & bit) != 0;
    conn->over[slot / 64] &= ~bit;
}

/* Those that nothing is posted under any more, as many as there is room for. What is posted is bounded by the window, so few are passed
 * over, also when the other side has named many. */
static void confirm(at_fab_conn *conn, at_fab_ctrl *ctrl) {
    uint32_t left = conn->over_count;
    for (uint32_t word = 0; left != 0 && ctrl->revoked + ctrl->over < AT_FAB_PAIRS; word++) {
        for (uint64_t bits = conn->over[word]; bits != 0; bits &= bits - 1) {
            uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(bits);
            uint64_t after = atomic_load(&conn->words->epoch[slot]); /* the epoch that was taken back, and 1 */
            left--;
            if (after & 1u) {
                owed_no_more(conn, slot);
            } else if (ctrl->revoked + ctrl->over < AT_FAB_PAIRS && !in_use(conn, slot, after - 1)) {
                pair_up(ctrl, slot, after - 1);
                ctrl->over++;
            }
        }
    }
}

static void write_ctrl(at_fab_conn *conn, at_fab_ctrl *ctrl) {
    at_lane *lane = conn->peer->lane;
    memset(ctrl, 0, sizeof *ctrl);
    ctrl->mark = conn->their_mark;
    ctrl->generation = conn->generation;
    ctrl->ping = conn->ping;
    ctrl->pong_native = conn->asked;
    ctrl->pong_loop = conn->pong_loop;
    for (uint32_t i = 0; i < conn->hold_room && ctrl->revoked < conn->to_tell && ctrl->revoked < AT_FAB_PAIRS; i++) {
        if (conn->hold[i] != AT_HOLD_TELL) continue;
        pair_up(ctrl, i, atomic_load(&lane->control->epoch[i]) - 1);
        ctrl->revoked++;
    }
    confirm(conn, ctrl);
    write_parts(conn, ctrl);
}

/* Note that a control message is under way: what it says need not be said again, unless the connection breaks. */
static void ctrl_sent(at_fab_conn *conn, const at_fab_ctrl *ctrl) {
    conn->telling = 1;
    conn->news = 0;
    for (uint32_t i = 0; i < ctrl->revoked; i++) conn->hold[ctrl->pairs[i].slot] = AT_HOLD_TOLD;
    conn->to_tell -= ctrl->revoked;
    for (uint32_t i = 0; i < ctrl->over; i++) owed_no_more(conn, ctrl->pairs[ctrl->revoked + i].slot);
    parts_sent(conn, ctrl);
}

void at_fab_tell(at_fab_conn *conn) {
    at_fab *fab = conn->fab;
    if (conn->telling || conn->ep == NULL || !conn->begun || conn->mute) return;
    if (!conn->news && conn->to_tell == 0 && conn->over_count == 0 && owed_parts(conn) == 0) return;
    at_fab_wr *wr = at_fab_wr_take(fab);
    if (wr == NULL) return;
    write_ctrl(conn, &wr->ctrl);
    if (!conn->news && wr->ctrl.revoked + wr->ctrl.over + wr->ctrl.failed_count == 0) { /* only confirmations that have to wait */
        at_fab_wr_free(fab, wr);
        return;
    }
    wr->kind = AT_WR_CTRL_OUT; /* first: its completion may be read as soon as it is sent */
    (void)pthread_mutex_lock(&fab->lock);
    int rc = fab->driver->send(conn, wr);
    (void)pthread_mutex_unlock(&fab->lock);
    if (rc == 0) {
        wr->state = AT_WR_POSTED;
        wr->conn = conn;
        at_fab_list_add(&conn->ctrls, wr);
        ctrl_sent(conn, &wr->ctrl);
        return;
    }
    at_fab_wr_free(fab, wr);
    if (rc == EAGAIN) {
        if (at_fab_refused(conn)) return;
        fab->eager = 1;
        at_stall(conn->peer, 1);
        at_fab_kick(fab); /* the thread sees to it if the loop does not */
    } else {
        at_fab_conn_break(conn, rc);
    }
}

/* ---- what the other side says ---- */

static int under(const at_op *op, uint32_t slot, uint64_t epoch) {
    return op->remote != NULL && op->remote->slot == slot && op->remote->epoch == epoch && !op->over && !atomic_load(&op->withdrawn);
}

static void stop_noted(at_fab_conn *conn, const at_fab_list *list, uint32_t slot, uint64_t epoch) {
    for (const at_fab_wr *note = list->head; note != NULL; note = note->next) {
        at_op *op = at_op_find(conn->peer->lane, note->cookie);
        if (op != NULL && under(op, slot, epoch)) at_op_stop(op, AT_ESTALE);
    }
}

void at_fab_taken_back(at_fab_conn *conn, uint32_t slot, uint64_t epoch) {
    if (slot >= AT_GRANTS || (epoch & 1u) == 0) return;
    _Atomic uint64_t *word = &conn->words->epoch[slot];
    uint64_t known = atomic_load(word);
    if (known <= epoch) atomic_store(word, epoch + 1);
    if (known < epoch) return; /* nothing of ours was ever begun under it */
    for (at_fab_wr *posted = conn->posted.head; posted != NULL; posted = posted->next)
        if (under(posted->op, slot, epoch)) at_op_stop(posted->op, AT_ESTALE); /* ends when its last work request retires */
    if (known > epoch) return; /* the rest is stopped already: what is said again costs no walk through the queue */
    at_peer *peer = at_fab_owner(conn);
    for (int risk = 0; risk < AT_RISKS; risk++) {
        for (at_op *op = peer->lines[risk].head; op != NULL;) { /* the queue changes with each that is stopped */
            int stop = under(op, slot, epoch);
            if (stop) at_op_stop(op, AT_ESTALE);
            op = stop ? peer->lines[risk].head : op->next;
        }
    }
    stop_noted(conn, &conn->unconfirmed, slot, epoch);
    stop_noted(conn, &conn->repost, slot, epoch);
    if (conn->multirail == NULL) return;
    stop_noted(conn, &conn->multirail->repost, slot, epoch);
    for (uint32_t i = 0; i < conn->multirail->count; i++) /* what broke with another connection */
        if (conn->multirail->members[i] != NULL && conn->multirail->members[i] != conn) stop_noted(conn, &conn->multirail->members[i]->unconfirmed, slot, epoch);
}

/* To be confirmed once nothing of it is posted. A bit for each grant there can be: a peer cannot make us hold or compare more. */
static void owe(at_fab_conn *conn, uint32_t slot) {
    if (conn->over == NULL && (conn->over = calloc(AT_GRANTS / 64, sizeof *conn->over)) == NULL) return; /* the owner will fence us */
    uint64_t bit = UINT64_C(1) << (slot % 64);
    conn->over_count += (conn->over[slot / 64] & bit) == 0;
    conn->over[slot / 64] |= bit;
}

static void confirmed(at_fab_conn *conn, uint32_t slot, uint64_t epoch) {
    at_lane *lane = conn->peer->lane;
    if (slot >= conn->hold_room || conn->hold[slot] < AT_HOLD_TELL || atomic_load(&lane->control->epoch[slot]) != epoch + 1) return;
    if (conn->hold[slot] == AT_HOLD_TELL) conn->to_tell--;
    conn->hold[slot] = AT_HOLD_NONE;
    at_event_push(lane, AT_EV_GRANT, slot, AT_OK, 0);
}

at_fab_conn *at_fab_ctrl_from(at_fab *fab, const at_fab_wr *wr) {
    const at_fab_ctrl *ctrl = &wr->ctrl;
    at_fab_conn *conn = wr->conn;
    if (conn == NULL) conn = ctrl->mark < fab->conn_count ? fab->conns[ctrl->mark] : NULL;
    if (conn != NULL && ctrl->mark == conn->mark && ctrl->generation == conn->generation && ctrl->revoked <= AT_FAB_PAIRS &&
        ctrl->over <= AT_FAB_PAIRS - ctrl->revoked)
        return conn;
    fab->rail.lane->stats.unknown_completions++;
    return NULL;
}

void at_fab_read(at_fab_conn *conn, const at_fab_ctrl *ctrl) {
    at_lane *lane = conn->peer->lane;
    if (ctrl->ping > conn->asked) {
        conn->asked = ctrl->ping;
        conn->news = 1;
        lane->stats.pulses_answered++;
        lane->pulse_heard = 1;
        at_event_signal(lane);
    }
    if (ctrl->pong_native > conn->answered_native) conn->answered_native = ctrl->pong_native;
    if (ctrl->pong_loop > conn->answered_loop) conn->answered_loop = ctrl->pong_loop;
    for (uint32_t i = 0; i < ctrl->revoked; i++) {
        if (ctrl->pairs[i].slot >= AT_GRANTS || (ctrl->pairs[i].epoch & 1u) == 0) continue;
        at_fab_taken_back(conn, ctrl->pairs[i].slot, ctrl->pairs[i].epoch);
        owe(conn, ctrl->pairs[i].slot);
    }
    for (uint32_t i = ctrl->revoked; i < ctrl->revoked + ctrl->over; i++) confirmed(conn, ctrl->pairs[i].slot, ctrl->pairs[i].epoch);
}

void at_fab_retired(at_fab_conn *conn) {
    if (conn->over_count != 0) at_fab_tell(conn);
}

void at_fab_say_again(at_fab_conn *conn) {
    conn->news = 1;
    for (uint32_t i = 0; i < conn->hold_room; i++) {
        if (conn->hold[i] != AT_HOLD_TOLD) continue;
        conn->hold[i] = AT_HOLD_TELL;
        conn->to_tell++;
    }
}

int at_fab_revoked(at_lane *lane, int64_t peer, uint32_t slot, uint64_t epoch) {
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, peer);
    if (conn != NULL) {
        at_fab_taken_back(conn, slot, epoch);
        at_fab_tell(conn);
    }
    at_unlock(lane);
    return conn != NULL ? AT_OK : AT_EUNKNOWN;
}

/* ---- the port ---- */

void at_fab_revoke(at_peer *peer, uint32_t slot) {
    at_fab_conn *conn = peer->impl;
    if (slot >= conn->hold_room || conn->hold[slot] != AT_HOLD_LENT) return;
    conn->hold[slot] = AT_HOLD_TELL;
    conn->to_tell++;
    at_fab_tell(conn);
}

int at_fab_active(at_peer *peer, uint32_t slot) {
    const at_fab_conn *conn = peer->impl;
    int may_still = conn->ep != NULL || conn->closed_as > conn->fab->read_up_to; /* land, or be counted */
    return may_still && slot < conn->hold_room && conn->hold[slot] != AT_HOLD_NONE;
}

void at_fab_ping(at_peer *peer, uint64_t seq) {
    at_fab_conn *conn = peer->impl;
    conn->ping = seq;
    conn->news = 1;
    at_fab_tell(conn);
}

void at_fab_pong(at_peer *peer, uint64_t *native, uint64_t *loop) {
    const at_fab_conn *conn = peer->impl;
    *native = conn->answered_native + conn->signs; /* another number means that it is there */
    *loop = conn->answered_loop;
}

void at_fab_answer(at_peer *peer, int from_loop) {
    at_fab_conn *conn = peer->impl;
    if (!from_loop || conn->pong_loop == conn->asked) return;
    conn->pong_loop = conn->asked;
    conn->news = 1;
    at_fab_tell(conn);
}
