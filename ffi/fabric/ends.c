/* The ends of connections: made, found, broken, and what was under way by one that broke. What follows from that is for those above:
 * the thread that makes progress tells the other side, and posts again. */

#include "fabric.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define REFUSALS 8u /* so many posts put off with nothing posted, over so long, none of them after a longer pause: it has broken */
#define REFUSED_NS UINT64_C(100000000)
#define REFUSALS_APART_NS UINT64_C(500000000)

at_fab_end *at_fab_end_of(at_lane *lane, int64_t id) {
    at_peer *peer = at_peer_find(lane, id);
    return peer != NULL && peer->port == &at_fab_port ? peer->impl : NULL;
}

static int place(at_fab *fab, at_fab_end *end) {
    uint32_t i = 0;
    while (i < fab->end_count && fab->ends[i] != NULL) i++;
    if (i == AT_FAB_MOST_PEERS) return AT_EBUSY;
    if (at_grow((void ***)&fab->ends, &fab->end_room, i) != 0) return AT_ENOMEM;
    fab->ends[i] = end;
    end->mark = i;
    if (i == fab->end_count) fab->end_count++;
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
    int64_t result = words != NULL ? at_fab_end_add(lane, fab, NULL, words) : AT_ENOMEM;
    if (result < 0) at_fab_words_free(words);
    return result;
}

int64_t at_fab_end_add(at_lane *lane, at_fab *fab, at_fab_multirail *multirail, at_control *words) {
    at_fab_end *end = calloc(1, sizeof *end);
    int64_t result = end != NULL ? AT_OK : AT_ENOMEM;
    at_lock(lane);
    if (result == AT_OK && lane->shut) result = AT_ESHUT;
    if (result == AT_OK && multirail != NULL && (multirail->peer == NULL || multirail->count == AT_FAB_MOST_RAILS)) result = AT_EBUSY;
    if (result == AT_OK) {
        end->fab = fab;
        end->words = words;
        end->to = UINT64_MAX; /* nowhere */
        end->unique = ++fab->uniques;
        result = place(fab, end);
    }
    if (result == AT_OK) {
        end->peer = at_peer_add(lane, &at_fab_port, end, words);
        if (end->peer == NULL) {
            fab->ends[end->mark] = NULL;
            result = AT_ENOMEM;
        } else {
            end->peer->paused = 1;
            end->peer->device = at_fab_is(fab, AT_FAB_DEVICE);
            end->peer->pins = at_fab_is(fab, AT_FAB_LOCAL_MR);
            result = end->peer->id;
            if ((end->multirail = multirail) != NULL) {
                end->place = multirail->count;
                multirail->members[multirail->count++] = end;
                multirail->users++;
                multirail->peer->device &= end->peer->device;
                multirail->peer->pins |= end->peer->pins;
            }
        }
    }
    at_unlock(lane);
    if (result < 0) free(end);
    return result;
}

/* ---- breaking ---- */

/* What was posted on an endpoint that is closed now: the provider reads its memory no more. */
static void unconfirm(at_fab_end *end, at_fab_slot *slot) {
    at_fab *fab = end->fab;
    at_op *op = slot->op;
    at_fab_list_remove(&end->posted, slot);
    end->posted_bytes -= slot->bytes;
    end->out--;
    fab->posted--;
    slot->op = NULL;
    at_fab_slot *note = at_fab_slot_take(fab); /* remembers what is to be found out; the slot itself stays the provider's for a while */
    at_fab_slot_retire(fab, slot);
    int over = op->peer->status;
    if (over == AT_OK && end->multirail != NULL && !at_fab_tells(fab)) over = AT_ERAIL; /* neither side will know whether it was counted */
    if (atomic_load(&op->withdrawn) || over != AT_OK || note == NULL) {
        if (note != NULL) at_fab_slot_free(fab, note);
        at_op_complete(op, 0, 0, 0, op->status != AT_OK ? op->status : over != AT_OK ? over : AT_ERAIL);
        return;
    }
    *note = (at_fab_slot){.end = end, .cookie = slot->cookie, .first = slot->first, .steps = slot->steps, .bytes = slot->bytes,
                          .counts = slot->counts, .serial = slot->serial, .desc = note->desc, .state = AT_SLOT_UNCONFIRMED};
    at_fab_list_add(&end->unconfirmed, note);
    at_op_unpost(op);
}

#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define TO(state) (1u << AT_CONN_##state)

void at_fab_stepped(at_fab_end *end) {
    static const unsigned may[] = { /* each also stay, or be closed */
        [AT_CONN_CLOSED] = TO(MADE), [AT_CONN_MADE] = TO(EARLY) | TO(JOINED) | TO(BEGUN), [AT_CONN_EARLY] = TO(UP),
        [AT_CONN_JOINED] = TO(UP), [AT_CONN_BEGUN] = TO(UP), [AT_CONN_UP] = 0,
    };
    int joined = end->joined, begun = end->begun, heard = end->heard, now = AT_CONN_CLOSED, known = 1;
    if (end->ep != NULL) {
        now = joined && begun ? (heard ? AT_CONN_UP : AT_CONN_BEGUN) : joined ? AT_CONN_JOINED : heard ? AT_CONN_EARLY : AT_CONN_MADE;
        known = begun ? joined : !(joined && heard);
    }
    if (known && (now == end->state || now == AT_CONN_CLOSED || (may[end->state] >> now & 1u))) {
        end->state = now;
        return;
    }
    (void)fprintf(stderr, "a connection of generation %u steps from state %d to %d, joined %d, begun %d, heard %d\n", end->generation, end->state,
                  now, joined, begun, heard);
    abort();
}
#endif

/* Close its endpoint: afterwards nothing of it touches memory, and no control message is under way. */
void at_fab_end_close(at_fab_end *end) {
    at_fab *fab = end->fab;
    if (end->ep != NULL) {
        (void)pthread_mutex_lock(&fab->lock);
        fab->driver->close(end);
        (void)pthread_mutex_unlock(&fab->lock);
        end->closed_as = ++fab->closings;
    }
    for (at_fab_slot *slot; (slot = end->ctrls.head) != NULL;) {
        at_fab_list_remove(&end->ctrls, slot);
        at_fab_slot_retire(fab, slot);
    }
    end->telling = 0;
    at_fab_stepped(end);
}

void at_fab_owe(at_fab_multirail *multirail) {
    for (uint32_t i = 0; i < multirail->count; i++) {
        at_fab_end *end = multirail->members[i];
        if (end == NULL || end->ep != NULL || end->generation == 0) continue;
        end->owes = 1;
        if (end->closed_as > end->fab->read_up_to) at_fab_hurry(end->fab); /* what is left of it has to be read */
    }
}

void at_fab_end_break(at_fab_end *end, int error) {
    at_peer *peer = end->peer;
    if (end->ep == NULL) return;
    peer->users++;
    if (error != 0) end->troubled = 1;
    at_fab_end_close(end);
    peer->paused = 1;
    at_stall(peer, 0);
    for (at_fab_slot *slot; (slot = end->repost.head) != NULL;) { /* posted again and broken again: still to be found out */
        at_fab_list_remove(&end->repost, slot);
        slot->state = AT_SLOT_UNCONFIRMED;
        slot->serial = 0; /* it was not posted since that was settled last */
        at_fab_list_add(&end->unconfirmed, slot);
    }
    while (end->posted.head != NULL) unconfirm(end, end->posted.head);
    if (end->multirail != NULL && peer->status == AT_OK) at_fab_owe(end->multirail); /* told once its number is final: see at_fab_drain */
    if (peer->status == AT_OK && error != 0) at_event_push(peer->lane, AT_EV_RAIL, (uint64_t)peer->id, AT_ERAIL, (uint64_t)error);
    at_peer_release(peer);
}

/* libfabric's tcp reports no error when a connection breaks while nothing is posted. The next post makes another one, and is put off
 * meanwhile: for ever where the other side accepts no connection any more. */
int at_fab_refused(at_fab_end *end) {
    if (!end->alone || !end->heard || end->out != 0 || end->telling) return 0;
    uint64_t now = at_now();
    if (now - end->refused_last > REFUSALS_APART_NS) {
        end->refused_first = now;
        end->refusals = 0;
    }
    end->refused_last = now;
    if (++end->refusals < REFUSALS || now - end->refused_first < REFUSED_NS) return 0;
    end->refused_last = 0; /* the next connection begins anew */
    at_fab_end_break(end, ECONNRESET);
    return 1;
}

int at_fab_break(at_lane *lane, int64_t peer) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_lock(lane);
    at_fab_end *end = at_fab_end_of(lane, peer);
    if (end != NULL) at_fab_end_break(end, ECONNRESET);
    at_unlock(lane);
    return end != NULL ? AT_OK : AT_EUNKNOWN;
}

int at_fab_mute(at_lane *lane, int64_t peer) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_lock(lane);
    at_fab_end *end = at_fab_end_of(lane, peer);
    if (end != NULL) end->mute = 1;
    at_unlock(lane);
    return end != NULL ? AT_OK : AT_EUNKNOWN;
}

/* ---- what was under way ---- */

/* Withdrawn operations that only wait to be found out are over: their memory is not read any more. Of a peer that has ended, all are. */
void at_fab_end_unconfirmed(at_peer *peer, at_fab_list *list) {
    for (at_fab_slot *slot = list->head, *next; slot != NULL; slot = next) {
        next = slot->next;
        at_op *op = at_op_find(peer->lane, slot->cookie);
        int over = op == NULL || op->over;
        if (!over && peer->status == AT_OK) continue;
        at_fab_list_remove(list, slot);
        at_fab_slot_free(slot->end->fab, slot);
        if (!over) at_op_stop(op, peer->status);
    }
}

/* The other side says how many of our work requests with immediates it has ever counted: by their order it is known which. Those
 * that it has not counted will be posted with the numbers that follow. */
void at_fab_reconcile(at_fab_end *end, uint64_t arrived) {
    at_peer *peer = at_fab_owner(end);
    at_fab_list *repost = end->multirail != NULL ? &end->multirail->repost : &end->repost;
    end->serial = arrived;
    for (at_fab_slot *slot; (slot = end->unconfirmed.head) != NULL;) {
        at_fab_list_remove(&end->unconfirmed, slot);
        at_op *op = at_op_find(peer->lane, slot->cookie);
        if (op == NULL || op->over) {
            at_fab_slot_free(end->fab, slot);
        } else if (slot->serial != 0 && slot->serial <= arrived) {
            op->posted++; /* at_op_complete takes it off again */
            peer->posted++;
            uint64_t steps = slot->steps, bytes = slot->bytes, counts = slot->counts;
            at_fab_slot_free(end->fab, slot);
            at_op_complete(op, steps, bytes, counts, AT_OK);
        } else {
            slot->state = AT_SLOT_REPOST;
            at_fab_list_add(repost, slot);
        }
    }
}

void at_fab_notes_free(at_fab_list *list) {
    for (at_fab_slot *slot; (slot = list->head) != NULL;) {
        at_fab_list_remove(list, slot);
        at_fab_slot_free(slot->end->fab, slot);
    }
}
