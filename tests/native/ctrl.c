/* A peer that takes back every grant there can be, several times, in control messages: each is confirmed once nothing is posted under it, once.
 * Includes ctrl.c; what it sends is caught here instead of going anywhere. */
#include "fabric/ctrl.c"

#include <stdio.h>

static uint8_t confirmations[AT_GRANTS];
static uint32_t wrong;
static at_fab_slot *sent;

static int catch_letter(at_fab_end *end, at_fab_slot *slot) {
    (void)end;
    sent = slot;
    for (uint32_t i = slot->ctrl.revoked; i < slot->ctrl.revoked + slot->ctrl.over; i++) {
        confirmations[slot->ctrl.pairs[i].slot]++;
        wrong += slot->ctrl.pairs[i].epoch != 7;
    }
    return 0;
}

/* Everything that was written arrives, and what is said then arrives too. */
static void deliver(at_fab_end *end) {
    while (sent != NULL) {
        at_fab_slot *slot = sent;
        sent = NULL;
        at_fab_list_remove(&end->ctrls, slot);
        at_fab_slot_free(end->fab, slot);
        end->telling = 0;
        at_fab_tell(end);
    }
}

static void take_back_all(at_fab *fab, at_fab_end *end) {
    at_fab_slot *slot = at_fab_slot_take(fab);
    for (uint32_t first = 0; first < AT_GRANTS; first += AT_FAB_PAIRS) {
        slot->end = end;
        slot->ctrl = (at_fab_ctrl){.mark = end->mark, .generation = end->generation, .revoked = AT_FAB_PAIRS};
        for (uint32_t i = 0; i < AT_FAB_PAIRS; i++) {
            slot->ctrl.pairs[i].slot = AT_GRANTS - 1 - (first + i);
            slot->ctrl.pairs[i].epoch = 7;
        }
        if (at_fab_ctrl_from(fab, slot) == end) at_fab_read(end, &slot->ctrl);
        at_fab_tell(end);
    }
    at_fab_slot_free(fab, slot);
}

static uint32_t counted(uint8_t times) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < AT_GRANTS; i++) n += confirmations[i] == times;
    return n;
}

int main(void) {
    at_lane_config config = {.max_ops = 16, .max_bytes = 1 << 20, .early_values = 16, .flags = AT_LANE_NO_THREAD};
    at_lane *lane = at_lane_new(1, &config);
    at_fab_driver driver = {.send = catch_letter};
    at_fab fab = {.rail = {.lane = lane}, .driver = &driver, .fd = -1, .kick_fd = -1};
    (void)pthread_mutex_init(&fab.lock, NULL);
    at_fab_end end = {.fab = &fab, .ep = &fab, .begun = 1, .heard = 1, .joined = 1, .words = at_fab_words_new()};
    at_fab_end *ends[] = {&end};
    fab.ends = ends;
    fab.end_count = 1;
    at_lock(lane);
    end.peer = at_peer_add(lane, &at_fab_port, &end, end.words);
    at_remote remote = {.slot = 9, .epoch = 7};
    at_op op = {.peer = end.peer, .remote = &remote, .posted = 1, .running = 1};
    at_fab_slot *posted = at_fab_slot_take(&fab);
    posted->op = &op;
    at_fab_list_add(&end.posted, posted);

    for (int round = 0; round < 3; round++) take_back_all(&fab, &end); /* the first answer is under way: the rest has to wait for it */
    deliver(&end);
    wrong += counted(0) != 1 || confirmations[9] != 0; /* something is posted under that one */
    at_fab_list_remove(&end.posted, posted);
    at_fab_retired(&end);
    deliver(&end);
    wrong += confirmations[9] != 1 || end.over_count != 0;
    wrong += counted(1) + counted(2) != AT_GRANTS || counted(2) > AT_FAB_PAIRS; /* those of the first answer were named again */
    at_unlock(lane);
    printf("%u wrong: %u once, %u twice, %u owed\n", wrong, counted(1), counted(2), end.over_count);
    return wrong != 0;
}
