/* One of several connections has broken: both sides fence it and tell each other, in letters by one of the others, what they have counted
 * by it. What was not among that goes out again, by whichever is up. No event loop has a hand in this.
 *
 * The number that a side tells is final: its endpoint is closed, and everything that had arrived has been handed out. It is told again
 * whenever another connection breaks or comes up, since the letter may have been lost; told twice it changes nothing, and told late, of a
 * generation that is over, neither. Where no connection is left the engines ask each other by their control connection (at_fab_part). */

#include "fabric.h"

#include <errno.h>

/* Closed, and its number is final. */
static int is_ready(const at_fab_end *end) {
    return end->owes && end->ep == NULL && end->closed_as <= end->fab->read_up_to && end->their_peer != 0 && !end->retired;
}

uint32_t at_fab_owed_parts(const at_fab_end *carrier) {
    const at_fab_bundle *bundle = carrier->bundle;
    uint32_t n = 0;
    for (uint32_t i = 0; bundle != NULL && i < bundle->count; i++) n += bundle->members[i] != NULL && is_ready(bundle->members[i]);
    return n;
}

void at_fab_write_parts(at_fab_end *carrier, at_fab_letter *letter) {
    const at_fab_bundle *bundle = carrier->bundle;
    for (uint32_t i = 0; bundle != NULL && i < bundle->count && letter->parts < AT_FAB_PARTS; i++) {
        at_fab_end *end = bundle->members[i];
        if (end == NULL || !is_ready(end)) continue;
        letter->part[letter->parts].peer = end->their_peer;
        letter->part[letter->parts].generation = end->generation;
        letter->part[letter->parts++].arrived = end->arrived;
    }
}

void at_fab_parts_sent(at_fab_end *carrier, const at_fab_letter *letter) {
    const at_fab_bundle *bundle = carrier->bundle;
    for (uint32_t i = 0; i < letter->parts; i++)
        for (uint32_t k = 0; k < bundle->count; k++)
            if (bundle->members[k] != NULL && bundle->members[k]->their_peer == letter->part[i].peer) bundle->members[k]->owes = 0;
}

void at_fab_read_parts(at_fab_end *carrier, const at_fab_letter *letter) {
    at_lane *lane = carrier->peer->lane;
    if (carrier->bundle == NULL || letter->parts > AT_FAB_PARTS) return;
    for (uint32_t i = 0; i < letter->parts; i++) {
        at_fab_end *end = at_fab_end_of(lane, letter->part[i].peer);
        if (end == NULL || end == carrier || end->bundle != carrier->bundle || end->retired) continue;
        if (end->generation > letter->part[i].generation) continue; /* of a connection before this one, which is settled */
        at_peer *peer = end->peer;
        peer->users++;
        if (end->ep != NULL) at_fab_end_break(end, 0); /* the other side has it opened again */
        at_fab_settle_with(end, letter->part[i].arrived);
        at_peer_release(peer);
    }
}

void at_fab_owe_parts(at_fab_bundle *bundle) {
    for (uint32_t i = 0; i < bundle->count; i++) {
        at_fab_end *end = bundle->members[i];
        if (end == NULL || end->ep != NULL || end->generation == 0) continue;
        end->owes = 1;
        if (end->closed_as <= end->fab->read_up_to) continue;
        at_lane *lane = end->peer->lane; /* somebody has to read what is left of it: the loop, or the thread if that does not come */
        lane->again = 1;
        at_event_signal(lane);
        end->fab->eager = 1;
        at_fab_kick(end->fab);
    }
    at_fab_tell_parts(bundle);
}

void at_fab_tell_parts(at_fab_bundle *bundle) {
    for (uint32_t i = 0; i < bundle->count; i++) {
        at_fab_end *end = bundle->members[i];
        if (end == NULL || end->ep == NULL || !end->heard || end->telling) continue;
        at_fab_tell(end);
        if (end->telling) return;
    }
}
