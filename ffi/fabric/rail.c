/* A rail of any driver: what is common to opening and closing one. */
#include "fabric.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static __thread char why[512];

const char *at_fab_why(void) { return why; }

void at_fab_say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(why, sizeof why, format, arguments);
    va_end(arguments);
}

static void fab_free(at_fab *fab) {
    if (fab->driver->quit != NULL) fab->driver->quit(fab);
    at_fab_memory_close(fab);
    at_fab_wrs_close(fab);
    if (fab->kick_fd >= 0) close(fab->kick_fd);
    (void)pthread_mutex_destroy(&fab->progress_lock);
    (void)pthread_mutex_destroy(&fab->lock);
    free(fab->conns);
    fab->driver->free(fab);
}

static void leave(at_rail *rail) {
    at_fab *fab = (at_fab *)rail;
    at_fab_thread_stop(fab);
    if (fab->fd >= 0) at_unwatch_fd(rail->lane, fab->fd);
    if (fab->news_fd >= 0) at_unwatch_fd(rail->lane, fab->news_fd);
}

static void destroy(at_rail *rail) { fab_free((at_fab *)rail); }

int at_fab_prepare(at_fab *fab, at_lane *lane, const at_fab_driver *driver) {
    fab->driver = driver;
    (void)pthread_mutex_init(&fab->progress_lock, NULL);
    (void)pthread_mutex_init(&fab->lock, NULL);
    fab->fd = -1;
    fab->news_fd = -1;
    fab->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    fab->rail = (at_rail){.lane = lane, .name = "fabric", .progress = at_fab_progress, .stop = at_fab_stop, .leave = leave, .destroy = destroy,
                          .drain = at_fab_drain_now, .grant_over = at_fab_grant_over, .region_over = at_fab_region_over};
    if (fab->kick_fd >= 0) return AT_OK;
    at_fab_say("no descriptor to wake its thread by: %s", strerror(EMFILE));
    return AT_EIO;
}

int at_fab_begin(at_fab *fab, const char *name) {
    at_lane *lane = fab->rail.lane;
    at_lock(lane);
    int rc = lane->shut ? AT_ESHUT : at_fab_register_host(fab, fab->signal_target, sizeof fab->signal_target, AT_USE_LOCAL | AT_USE_REMOTE_WRITE, &fab->signal_target_mr);
    if (rc == AT_EIO) at_fab_say("%s: no memory region: %s", name, fab->driver->text(lane->oserror));
    if (rc == AT_OK) {
        fab->signal_target_desc = at_fab_is(fab, AT_FAB_LOCAL_MR) ? fab->driver->desc(fab->signal_target_mr.mr) : NULL;
        int watched = fab->fd < 0 || at_watch_fd(lane, fab->fd, AT_TAG(AT_TAG_RAIL, 0), 0) == 0;
        if (fab->news_fd >= 0 && at_watch_fd(lane, fab->news_fd, AT_TAG(AT_TAG_RAIL, 0), 0) != 0) watched = 0;
        if (!watched) {
            at_fab_say("the descriptors of the completion queue and the device cannot be watched");
            rc = AT_EIO;
        }
    }
    if (rc == AT_OK) at_rail_add(lane, &fab->rail);
    at_unlock(lane);
    return rc;
}

void at_fab_undo(at_fab *fab, int oserror) {
    at_lane *lane = fab->rail.lane;
    at_lock(lane);
    if (oserror != 0) lane->oserror = oserror;
    at_unlock(lane);
    fab_free(fab);
}
