/* The ends of connections: made, opened, broken, opened again, destroyed. */

#include "fabric.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

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

int64_t at_fab_end_add(at_lane *lane, at_fab *fab, at_fab_bundle *bundle, at_control *words) {
    at_fab_end *end = calloc(1, sizeof *end);
    int64_t result = end != NULL ? AT_OK : AT_ENOMEM;
    at_lock(lane);
    if (result == AT_OK && lane->shut) result = AT_ESHUT;
    if (result == AT_OK && bundle != NULL && (bundle->peer == NULL || bundle->count == AT_FAB_MOST_RAILS)) result = AT_EBUSY;
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
            if ((end->bundle = bundle) != NULL) {
                end->place = bundle->count;
                bundle->members[bundle->count++] = end;
                bundle->users++;
                bundle->peer->device &= end->peer->device;
                bundle->peer->pins |= end->peer->pins;
            }
        }
    }
    at_unlock(lane);
    if (result < 0) free(end);
    return result;
}

/* ---- breaking ---- */

/* What was posted on an endpoint that is closed now: nobody reads its memory any more. */
static void unsettle(at_fab_end *end, at_fab_slot *slot) {
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
    if (over == AT_OK && end->bundle != NULL && !at_fab_tells(fab)) over = AT_ERAIL; /* nobody will know whether it was counted */
    if (atomic_load(&op->withdrawn) || over != AT_OK || note == NULL) {
        if (note != NULL) at_fab_slot_free(fab, note);
        at_op_complete(op, 0, 0, 0, op->status != AT_OK ? op->status : over != AT_OK ? over : AT_ERAIL);
        return;
    }
    *note = (at_fab_slot){.end = end, .cookie = slot->cookie, .first = slot->first, .steps = slot->steps, .bytes = slot->bytes,
                          .counts = slot->counts, .serial = slot->serial, .desc = note->desc, .state = AT_SLOT_UNSETTLED};
    at_fab_list_add(&end->unsettled, note);
    at_op_unpost(op);
}

static void drop_letters(at_fab_end *end) {
    for (at_fab_slot *slot; (slot = end->letters.head) != NULL;) {
        at_fab_list_remove(&end->letters, slot);
        at_fab_slot_retire(end->fab, slot);
    }
    end->telling = 0;
}

static void close_endpoint(at_fab_end *end) {
    at_fab *fab = end->fab;
    if (end->ep == NULL) return;
    (void)pthread_mutex_lock(&fab->lock);
    fab->driver->close(end);
    (void)pthread_mutex_unlock(&fab->lock);
    end->closed_as = ++fab->closings;
}

void at_fab_end_break(at_fab_end *end, int error) {
    at_peer *peer = end->peer;
    if (end->ep == NULL) return;
    peer->users++;
    if (error != 0) end->troubled = 1;
    close_endpoint(end);
    drop_letters(end);
    peer->paused = 1;
    at_stall(peer, 0);
    for (at_fab_slot *slot; (slot = end->again.head) != NULL;) { /* posted again and broken again: still to be found out */
        at_fab_list_remove(&end->again, slot);
        slot->state = AT_SLOT_UNSETTLED;
        slot->serial = 0; /* it was not posted since that was settled last */
        at_fab_list_add(&end->unsettled, slot);
    }
    while (end->posted.head != NULL) unsettle(end, end->posted.head);
    at_fab_retired(end);
    if (end->bundle != NULL && peer->status == AT_OK) at_fab_owe_parts(end->bundle);
    if (peer->status == AT_OK && error != 0) at_event_push(peer->lane, AT_EV_RAIL, (uint64_t)peer->id, AT_ERAIL, (uint64_t)error);
    at_peer_release(peer);
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

/* Withdrawn operations that only wait to be found out are over: their memory is not read any more. Of a peer that has ended, all are. */
void at_fab_end_unsettled(at_peer *peer, at_fab_list *list) {
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

/* The port's fence: of a peer that has ended, or one whose operation was withdrawn and does not drain. */
static void fab_fence(at_peer *peer) {
    at_fab_end *end = peer->impl;
    if (at_fab_is(end->fab, AT_FAB_PRIVATE)) at_fab_end_break(end, ECANCELED);
    at_fab_end_unsettled(at_fab_owner(end), &end->unsettled);
    at_fab_end_unsettled(at_fab_owner(end), &end->again);
}

static void fab_expel(at_peer *peer) {
    at_fab_end *end = peer->impl;
    if (at_fab_is(end->fab, AT_FAB_PRIVATE)) at_fab_end_break(end, ETIMEDOUT);
}

/* ---- opening ---- */

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
    out->mailbox = fab->mailbox_mr.base;
    out->mailbox_key = fab->mailbox_mr.key;
    out->arrived = end->arrived_before;
    out->generation = end->generation;
    out->marks = at_fab_is(fab, AT_FAB_MARKS) ? 1 : 0;
    return AT_OK;
}

/* With the turn and the lock: the endpoint of this generation. */
static int make(at_fab_end *end, uint32_t generation, at_fab_offer *out) {
    if (end->ep == NULL && end->generation == UINT32_MAX) return AT_EPROTO; /* the other side has named the last one there is */
    /* What was said of one of several is said of a generation, and may come late: none is opened twice. */
    if (end->bundle != NULL && end->ep == NULL && generation <= end->generation) generation = end->generation + 1;
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
    if (rc != AT_OK) {
        close_endpoint(end);
        drop_letters(end);
    }
    return rc;
}

int at_fab_offer_make(at_lane *lane, int64_t id, uint32_t generation, at_fab_offer *out) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_lock(lane);
    at_fab_end *end = at_fab_end_of(lane, id);
    at_fab *fab = end != NULL ? end->fab : NULL;
    at_unlock(lane);
    if (fab == NULL) return AT_EUNKNOWN;
    (void)pthread_mutex_lock(&fab->turn);
    (void)at_fab_drain(fab); /* what has arrived is counted before the endpoint goes, and what that brings out afterwards */
    at_lock(lane);
    end = at_fab_end_of(lane, id);
    if (end != NULL && generation > end->generation) at_fab_end_break(end, 0);
    at_unlock(lane);
    (void)at_fab_drain(fab);
    at_lock(lane);
    end = at_fab_end_of(lane, id);
    rc = end == NULL || end->peer->status != AT_OK || end->retired ? AT_EPEER : make(end, generation, out);
    at_unlock(lane);
    (void)pthread_mutex_unlock(&fab->turn);
    return rc == AT_OK ? at_fab_thread_start(fab) : rc;
}

/* The other side says how many of our work requests with immediates it has ever counted: by their order it is known which. Those
 * that it has not counted will be posted with the numbers that follow. */
void at_fab_settle_with(at_fab_end *end, uint64_t arrived) {
    at_peer *peer = at_fab_owner(end);
    at_fab_list *again = end->bundle != NULL ? &end->bundle->again : &end->again;
    end->serial = arrived;
    for (at_fab_slot *slot; (slot = end->unsettled.head) != NULL;) {
        at_fab_list_remove(&end->unsettled, slot);
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
            slot->state = AT_SLOT_AGAIN;
            at_fab_list_add(again, slot);
        }
    }
    if (end->bundle != NULL) at_fab_bundle_refill(end->bundle);
}

/* Two connections that are made from both sides at once crossed badly in libfabric 1.17 (the address sanitizer found it using freed
 * memory): one side begins, and the other when that one's first letter has come. */
static void begin(at_fab_end *end) {
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
    if (!end->begun) begin(end);
    else if (end->bundle != NULL) at_fab_end_refill(end); /* which posts nothing by a connection that has not been heard of */
    if (end->bundle != NULL) at_fab_owe_parts(end->bundle);
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
            end->mailbox = theirs->mailbox;
            end->mailbox_key = theirs->mailbox_key;
            end->joined = 1;
            peer->users++;
            at_fab_settle_with(end, theirs->arrived);
            at_fab_say_again(end);
            if (first) begin(end);
            if (end->heard) at_fab_up(end);
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
    (void)pthread_mutex_lock(&fab->turn);
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
    (void)pthread_mutex_unlock(&fab->turn);
    return end != NULL ? AT_OK : AT_EUNKNOWN;
}

int at_fab_settle(at_lane *lane, int64_t id, uint64_t arrived) {
    at_lock(lane);
    at_fab_end *end = at_fab_end_of(lane, id);
    int rc = end == NULL || !end->retired ? AT_EUNKNOWN : AT_OK;
    if (rc == AT_OK) {
        end->peer->users++;
        at_fab_settle_with(end, arrived);
        at_peer_release(end->peer);
    }
    at_unlock(lane);
    return rc;
}

void at_fab_end_refill(at_fab_end *end) {
    at_peer *peer = end->peer;
    peer->users++;
    if (peer->stalled) at_stall(peer, 0);
    at_fab_post_again(end);
    at_refill(peer);
    if (end->bundle != NULL) at_fab_bundle_refill(end->bundle);
    at_fab_tell(end);
    at_peer_release(peer);
}

/* ---- the end ---- */

static void fab_drain(at_peer *peer) { (void)peer; } /* arrivals are handed over as they are read */

void at_fab_notes_free(at_fab_list *list) {
    for (at_fab_slot *slot; (slot = list->head) != NULL;) {
        at_fab_list_remove(list, slot);
        at_fab_slot_free(slot->end->fab, slot);
    }
}

static void fab_forget(at_peer *peer) {
    at_fab_end *end = peer->impl;
    at_fab_notes_free(&end->unsettled);
    at_fab_notes_free(&end->again);
}

static void fab_destroy(at_peer *peer) {
    at_fab_end *end = peer->impl;
    at_fab *fab = end->fab;
    fab_forget(peer);
    close_endpoint(end);
    drop_letters(end);
    while (end->posted.head != NULL) { /* of a lane that is being freed, on a shared endpoint */
        at_fab_slot *slot = end->posted.head;
        at_fab_list_remove(&end->posted, slot);
        at_fab_slot_retire(fab, slot);
        fab->posted--;
    }
    fab->ends[end->mark] = NULL;
    if (end->bundle != NULL) at_fab_bundle_leave(end);
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
