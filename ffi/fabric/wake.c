/* Waking the threads that look at a rail: its own, and the loop's. */
#define _GNU_SOURCE

#include "fabric.h"

#include <unistd.h>

void at_fab_ring(at_fab *fab) {
    uint64_t one = 1;
    ssize_t written = write(fab->kick_fd, &one, sizeof one); /* full: it is awake */
    (void)written;
}

void at_fab_kick(at_fab *fab) {
    if (fab->started) at_fab_ring(fab);
}

void at_fab_hurry(at_fab *fab) {
    at_lane *lane = fab->rail.lane;
    lane->again = 1;
    at_event_signal(lane);
    fab->eager = 1;
    at_fab_kick(fab);
}
