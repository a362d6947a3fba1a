/* A rail: what is the same of every kind, around what its hand opens. */
#include "fabric.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

static void leave(at_rail *rail) {
    at_fab *fab = (at_fab *)rail;
    at_fab_thread_stop(fab);
    if (fab->fd >= 0) at_unwatch_fd(rail->lane, fab->fd);
}

static void destroy(at_rail *rail) { at_fab_free((at_fab *)rail); }

void at_fab_init(at_fab *fab, at_lane *lane, const at_hand *hand) {
    (void)pthread_mutex_init(&fab->turn, NULL);
    fab->hand = hand;
    fab->fd = -1;
    fab->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    fab->rail = (at_rail){.lane = lane, .name = hand->name, .progress = at_fab_progress, .leave = leave, .destroy = destroy, .drain = at_fab_drain_now,
                          .grant_over = at_fab_grant_over, .region_over = at_fab_region_over};
}

void at_fab_free(at_fab *fab) {
    fab->hand->silence(fab);
    at_fab_memory_close(fab);
    at_fab_slots_close(fab);
    fab->hand->close(fab);
    if (fab->kick_fd >= 0) close(fab->kick_fd);
    (void)pthread_mutex_destroy(&fab->turn);
    free(fab->ends);
    free(fab);
}

int at_fab_ready(at_fab *fab) {
    at_lane *lane = fab->rail.lane;
    at_lock(lane);
    int rc = lane->shut ? AT_ESHUT : at_fab_register_host(fab, fab->mailbox, sizeof fab->mailbox, AT_RIGHT_WRITE | AT_RIGHT_LOCAL, &fab->mailbox_mr);
    if (rc == AT_OK && fab->fd >= 0 && at_watch_fd(lane, fab->fd, AT_TAG(AT_TAG_RAIL, 0), 0) != 0) {
        lane->oserror = errno;
        rc = AT_EIO;
    }
    if (rc == AT_OK) at_rail_add(lane, &fab->rail);
    at_unlock(lane);
    return rc;
}
