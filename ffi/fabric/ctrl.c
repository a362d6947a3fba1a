/* Letters: signs of life, revocations and their confirmations, written and answered by the thread that makes progress, without the loop.
 *
 * One control message at a time is under way in each direction, and says all that is to be said when it is written. What a lost one said is
 * said again once the connection is open again: grants that are taken back stay AT_HOLD_TELL or AT_HOLD_TOLD until they are confirmed. */

#include "fabric.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int at_fab_receive(at_fab_end *end) {
    at_fab *fab = end->fab;
    at_fab_slot *slot = at_fab_slot_take(fab);
    if (slot == NULL) return AT_ENOMEM;
    slot->kind = AT_SLOT_CTRL_IN;
    slot->state = AT_SLOT_POSTED;
    slot->end = fab->shared != NULL ? NULL : end; /* those of a shared endpoint belong to no end */
    (void)pthread_mutex_lock(&fab->lock);
    int rc = fab->driver->receive(end, slot);
    (void)pthread_mutex_unlock(&fab->lock);
    if (rc != 0) {
        at_fab_slot_free(fab, slot);
        fab->rail.lane->oserror = rc;
        return AT_EIO;
    }
    if (slot->end != NULL) at_fab_list_add(&end->ctrls, slot);
    return AT_OK;
}

/* ---- what a control message tells of connections that have broken: see failover.c ---- */

/* Closed, and its number is final. */
static int is_ready(const at_fab_end *end) {
    return end->owes && end->ep == NULL && end->closed_as <= end->fab->read_up_to && end->their_peer != 0 && !end->retired;
}

static uint32_t owed_parts(const at_fab_end *carrier) {
    const at_fab_multirail *multirail = carrier->multirail;
    uint32_t n = 0;
    for (uint32_t i = 0; multirail != NULL && i < multirail->count; i++) n += multirail->members[i] != NULL && is_ready(multirail->members[i]);
    return n;
}

static void write_parts(at_fab_end *carrier, at_fab_ctrl *ctrl) {
    const at_fab_multirail *multirail = carrier->multirail;
    for (uint32_t i = 0; multirail != NULL && i < multirail->count && ctrl->failed_count < AT_FAB_FAILED; i++) {
        at_fab_end *end = multirail->members[i];
        if (end == NULL || !is_ready(end)) continue;
        ctrl->failed[ctrl->failed_count].peer = end->their_peer;
        ctrl->failed[ctrl->failed_count].generation = end->generation;
        ctrl->failed[ctrl->failed_count++].arrived = end->arrived;
    }
}

static void parts_sent(at_fab_end *carrier, const at_fab_ctrl *ctrl) {
    const at_fab_multirail *multirail = carrier->multirail;
    for (uint32_t i = 0; i < ctrl->failed_count; i++)
        for (uint32_t k = 0; k < multirail->count; k++)
            if (multirail->members[k] != NULL && multirail->members[k]->their_peer == ctrl->failed[i].peer) multirail->members[k]->owes = 0;
}

/* ---- what we say ---- */

/* Whether anything of ours is still posted that this grant of theirs allowed. */
static int in_use(const at_fab_end *end, uint32_t grant, uint64_t epoch) {
    for (const at_fab_slot *slot = end->posted.head; slot != NULL; slot = slot->next)
        if (slot->op->remote != NULL && slot->op->remote->slot == grant && slot->op->remote->epoch == epoch) return 1;
    return 0;
}

static void pair_up(at_fab_ctrl *ctrl, uint32_t slot, uint64_t epoch) {
    uint32_t i = ctrl->revoked + ctrl->over;
    ctrl->pairs[i].slot = slot;
    ctrl->pairs[i].epoch = epoch;
}

/* A confirmation is not owed any more: it is under way, or its grant's slot has another grant since. */
static void owed_no_more(at_fab_end *end, uint32_t slot) {
    uint64_t bit = UINT64_C(1) << (slot % 64);
    end->over_count -= (end->over[slot / 64] & bit) != 0;
    end->over[slot / 64] &= ~bit;
}

/* Those that nothing is posted under any more, as many as there is room for. What is posted is bounded by the window, so few are passed
 * over, also when the other side has named many. */
static void confirm(at_fab_end *end, at_fab_ctrl *ctrl) {
    uint32_t left = end->over_count;
    for (uint32_t word = 0; left != 0 && ctrl->revoked + ctrl->over < AT_FAB_PAIRS; word++) {
        for (uint64_t bits = end->over[word]; bits != 0; bits &= bits - 1) {
            uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(bits);
            uint64_t after = atomic_load(&end->words->epoch[slot]); /* the epoch that was taken back, and 1 */
            left--;
            if (after & 1u) {
                owed_no_more(end, slot);
            } else if (ctrl->revoked + ctrl->over < AT_FAB_PAIRS && !in_use(end, slot, after - 1)) {
                pair_up(ctrl, slot, after - 1);
                ctrl->over++;
            }
        }
    }
}

static void write_ctrl(at_fab_end *end, at_fab_ctrl *ctrl) {
    at_lane *lane = end->peer->lane;
    memset(ctrl, 0, sizeof *ctrl);
    ctrl->mark = end->their_mark;
    ctrl->generation = end->generation;
    ctrl->ping = end->ping;
    ctrl->pong_native = end->asked;
    ctrl->pong_loop = end->pong_loop;
    for (uint32_t i = 0; i < end->hold_room && ctrl->revoked < end->to_tell && ctrl->revoked < AT_FAB_PAIRS; i++) {
        if (end->hold[i] != AT_HOLD_TELL) continue;
        pair_up(ctrl, i, atomic_load(&lane->control->epoch[i]) - 1);
        ctrl->revoked++;
    }
    confirm(end, ctrl);
    write_parts(end, ctrl);
}

/* Note that a control message is under way: what it says need not be said again, unless the connection breaks. */
static void ctrl_sent(at_fab_end *end, const at_fab_ctrl *ctrl) {
    end->telling = 1;
    end->news = 0;
    for (uint32_t i = 0; i < ctrl->revoked; i++) end->hold[ctrl->pairs[i].slot] = AT_HOLD_TOLD;
    end->to_tell -= ctrl->revoked;
    for (uint32_t i = 0; i < ctrl->over; i++) owed_no_more(end, ctrl->pairs[ctrl->revoked + i].slot);
    parts_sent(end, ctrl);
}

void at_fab_tell(at_fab_end *end) {
    at_fab *fab = end->fab;
    if (end->telling || end->ep == NULL || !end->begun || end->mute) return;
    if (!end->news && end->to_tell == 0 && end->over_count == 0 && owed_parts(end) == 0) return;
    at_fab_slot *slot = at_fab_slot_take(fab);
    if (slot == NULL) return;
    write_ctrl(end, &slot->ctrl);
    if (!end->news && slot->ctrl.revoked + slot->ctrl.over + slot->ctrl.failed_count == 0) { /* only confirmations that have to wait */
        at_fab_slot_free(fab, slot);
        return;
    }
    slot->kind = AT_SLOT_CTRL_OUT; /* first: its completion may be read as soon as it is sent */
    (void)pthread_mutex_lock(&fab->lock);
    int rc = fab->driver->send(end, slot);
    (void)pthread_mutex_unlock(&fab->lock);
    if (rc == 0) {
        slot->state = AT_SLOT_POSTED;
        slot->end = end;
        at_fab_list_add(&end->ctrls, slot);
        ctrl_sent(end, &slot->ctrl);
        return;
    }
    at_fab_slot_free(fab, slot);
    if (rc == EAGAIN) {
        if (at_fab_refused(end)) return;
        fab->eager = 1;
        at_stall(end->peer, 1);
        at_fab_kick(fab); /* the thread sees to it if the loop does not */
    } else {
        at_fab_end_break(end, rc);
    }
}

/* ---- what the other side says ---- */

static int under(const at_op *op, uint32_t slot, uint64_t epoch) {
    return op->remote != NULL && op->remote->slot == slot && op->remote->epoch == epoch && !op->over && !atomic_load(&op->withdrawn);
}

static void stop_noted(at_fab_end *end, const at_fab_list *list, uint32_t slot, uint64_t epoch) {
    for (const at_fab_slot *note = list->head; note != NULL; note = note->next) {
        at_op *op = at_op_find(end->peer->lane, note->cookie);
        if (op != NULL && under(op, slot, epoch)) at_op_stop(op, AT_ESTALE);
    }
}

void at_fab_taken_back(at_fab_end *end, uint32_t slot, uint64_t epoch) {
    if (slot >= AT_GRANTS || (epoch & 1u) == 0) return;
    _Atomic uint64_t *word = &end->words->epoch[slot];
    uint64_t known = atomic_load(word);
    if (known <= epoch) atomic_store(word, epoch + 1);
    if (known < epoch) return; /* nothing of ours was ever begun under it */
    for (at_fab_slot *posted = end->posted.head; posted != NULL; posted = posted->next)
        if (under(posted->op, slot, epoch)) at_op_stop(posted->op, AT_ESTALE); /* ends when its last work request retires */
    if (known > epoch) return; /* the rest is stopped already: what is said again costs no walk through the queue */
    at_peer *peer = at_fab_owner(end);
    for (int risk = 0; risk < AT_RISKS; risk++) {
        for (at_op *op = peer->lines[risk].head; op != NULL;) { /* the queue changes with each that is stopped */
            int stop = under(op, slot, epoch);
            if (stop) at_op_stop(op, AT_ESTALE);
            op = stop ? peer->lines[risk].head : op->next;
        }
    }
    stop_noted(end, &end->unconfirmed, slot, epoch);
    stop_noted(end, &end->repost, slot, epoch);
    if (end->multirail == NULL) return;
    stop_noted(end, &end->multirail->repost, slot, epoch);
    for (uint32_t i = 0; i < end->multirail->count; i++) /* what broke with another connection */
        if (end->multirail->members[i] != NULL && end->multirail->members[i] != end) stop_noted(end, &end->multirail->members[i]->unconfirmed, slot, epoch);
}

/* To be confirmed once nothing of it is posted. A bit for each grant there can be: a peer cannot make us hold or compare more. */
static void owe(at_fab_end *end, uint32_t slot) {
    if (end->over == NULL && (end->over = calloc(AT_GRANTS / 64, sizeof *end->over)) == NULL) return; /* the owner will fence us */
    uint64_t bit = UINT64_C(1) << (slot % 64);
    end->over_count += (end->over[slot / 64] & bit) == 0;
    end->over[slot / 64] |= bit;
}

static void confirmed(at_fab_end *end, uint32_t slot, uint64_t epoch) {
    at_lane *lane = end->peer->lane;
    if (slot >= end->hold_room || end->hold[slot] < AT_HOLD_TELL || atomic_load(&lane->control->epoch[slot]) != epoch + 1) return;
    if (end->hold[slot] == AT_HOLD_TELL) end->to_tell--;
    end->hold[slot] = AT_HOLD_NONE;
    at_event_push(lane, AT_EV_GRANT, slot, AT_OK, 0);
}

at_fab_end *at_fab_ctrl_from(at_fab *fab, const at_fab_slot *slot) {
    const at_fab_ctrl *ctrl = &slot->ctrl;
    at_fab_end *end = slot->end;
    if (end == NULL) end = ctrl->mark < fab->end_count ? fab->ends[ctrl->mark] : NULL;
    if (end != NULL && ctrl->mark == end->mark && ctrl->generation == end->generation && ctrl->revoked <= AT_FAB_PAIRS &&
        ctrl->over <= AT_FAB_PAIRS - ctrl->revoked)
        return end;
    fab->rail.lane->stats.unknown_completions++;
    return NULL;
}

void at_fab_read(at_fab_end *end, const at_fab_ctrl *ctrl) {
    at_lane *lane = end->peer->lane;
    if (ctrl->ping > end->asked) {
        end->asked = ctrl->ping;
        end->news = 1;
        lane->stats.pulses_answered++;
        lane->pulse_heard = 1;
        at_event_signal(lane);
    }
    if (ctrl->pong_native > end->answered_native) end->answered_native = ctrl->pong_native;
    if (ctrl->pong_loop > end->answered_loop) end->answered_loop = ctrl->pong_loop;
    for (uint32_t i = 0; i < ctrl->revoked; i++) {
        if (ctrl->pairs[i].slot >= AT_GRANTS || (ctrl->pairs[i].epoch & 1u) == 0) continue;
        at_fab_taken_back(end, ctrl->pairs[i].slot, ctrl->pairs[i].epoch);
        owe(end, ctrl->pairs[i].slot);
    }
    for (uint32_t i = ctrl->revoked; i < ctrl->revoked + ctrl->over; i++) confirmed(end, ctrl->pairs[i].slot, ctrl->pairs[i].epoch);
}

void at_fab_retired(at_fab_end *end) {
    if (end->over_count != 0) at_fab_tell(end);
}

void at_fab_say_again(at_fab_end *end) {
    end->news = 1;
    for (uint32_t i = 0; i < end->hold_room; i++) {
        if (end->hold[i] != AT_HOLD_TOLD) continue;
        end->hold[i] = AT_HOLD_TELL;
        end->to_tell++;
    }
}

int at_fab_revoked(at_lane *lane, int64_t peer, uint32_t slot, uint64_t epoch) {
    at_lock(lane);
    at_fab_end *end = at_fab_end_of(lane, peer);
    if (end != NULL) {
        at_fab_taken_back(end, slot, epoch);
        at_fab_tell(end);
    }
    at_unlock(lane);
    return end != NULL ? AT_OK : AT_EUNKNOWN;
}

/* ---- the port ---- */

void at_fab_revoke(at_peer *peer, uint32_t slot) {
    at_fab_end *end = peer->impl;
    if (slot >= end->hold_room || end->hold[slot] != AT_HOLD_LENT) return;
    end->hold[slot] = AT_HOLD_TELL;
    end->to_tell++;
    at_fab_tell(end);
}

int at_fab_active(at_peer *peer, uint32_t slot) {
    const at_fab_end *end = peer->impl;
    int may_still = end->ep != NULL || end->closed_as > end->fab->read_up_to; /* land, or be counted */
    return may_still && slot < end->hold_room && end->hold[slot] != AT_HOLD_NONE;
}

void at_fab_ping(at_peer *peer, uint64_t seq) {
    at_fab_end *end = peer->impl;
    end->ping = seq;
    end->news = 1;
    at_fab_tell(end);
}

void at_fab_pong(at_peer *peer, uint64_t *native, uint64_t *loop) {
    const at_fab_end *end = peer->impl;
    *native = end->answered_native + end->signs; /* another number means that it is there */
    *loop = end->answered_loop;
}

void at_fab_answer(at_peer *peer, int from_loop) {
    at_fab_end *end = peer->impl;
    if (!from_loop || end->pong_loop == end->asked) return;
    end->pong_loop = end->asked;
    end->news = 1;
    at_fab_tell(end);
}
