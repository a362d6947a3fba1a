/* The native threads of a lane: started, woken, told to leave. What they do stands in mover.c and jobs.c.
 *
 * The thread holds no Python object and never needs the interpreter's lock. It sleeps in its own epoll on two eventfds: one that
 * this lane writes when it queues work, one that peers write to ask whether we are alive. Doorbells of ordinary arrivals are
 * not among them: those belong to the loop, and the thread must not wake for each. It starts with the first peer or the first
 * large copy; an engine that never needs it has none. */
#ifdef __linux__
#define _GNU_SOURCE
#include <sys/epoll.h>
#include <sys/eventfd.h>
#endif
#include "lane.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#ifdef __linux__
void at_cpus_add(at_cpus *cpus, const int32_t *more, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        if (more[i] >= 0 && more[i] < AT_MOST_CPUS) cpus->bits[more[i] / 64] |= UINT64_C(1) << (more[i] % 64);
}

void at_cpus_give(const at_cpus *cpus, pthread_t thread) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int i = 0; i < AT_MOST_CPUS; i++)
        if (cpus->bits[i / 64] >> (i % 64) & 1) CPU_SET((size_t)i, &set);
    if (CPU_COUNT(&set) != 0) (void)pthread_setaffinity_np(thread, sizeof set, &set); /* a cpuset may have changed: then it stays where it is */
}

static int watch(at_lane *lane, int fd) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.fd = fd}; /* pulses are written a 0: see events.c */
    return epoll_ctl(lane->thread_epoll_fd, EPOLL_CTL_ADD, fd, &event);
}
#endif

int at_thread_new(at_lane *lane, pthread_t *thread, void *(*body)(void *), void *argument, const char *name, size_t stack) {
    pthread_attr_t attributes;
    (void)pthread_attr_init(&attributes);
    if (stack != 0) (void)pthread_attr_setstacksize(&attributes, stack);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to Python's main thread */
    int rc = pthread_create(thread, &attributes, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    (void)pthread_attr_destroy(&attributes);
    if (rc != 0) return rc;
#ifdef __linux__
    (void)pthread_setname_np(*thread, name);
    at_cpus_give(&lane->cpus, *thread);
#else
    (void)name;
#endif
    lane->threads++;
    return 0;
}

void at_thread_left(at_lane *lane) {
    if (--lane->threads == 0) (void)pthread_cond_broadcast(&lane->ended);
}

static void close_descriptors(at_lane *lane) {
    if (lane->thread_epoll_fd >= 0) close(lane->thread_epoll_fd);
    if (lane->thread_wake_fd >= 0) close(lane->thread_wake_fd);
    if (lane->pulse_fd >= 0) close(lane->pulse_fd);
    lane->thread_epoll_fd = lane->thread_wake_fd = lane->pulse_fd = -1;
}

int at_thread_start(at_lane *lane) {
    if (lane->thread_started || (lane->config.flags & AT_LANE_NO_THREAD)) return AT_OK;
    if (lane->thread_stop) return AT_ESHUT;
#ifdef __linux__
    if (lane->thread_epoll_fd < 0) {
        lane->thread_epoll_fd = epoll_create1(EPOLL_CLOEXEC);
        lane->thread_wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        lane->pulse_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (lane->thread_epoll_fd < 0 || lane->thread_wake_fd < 0 || lane->pulse_fd < 0 ||
            watch(lane, lane->thread_wake_fd) != 0 || watch(lane, lane->pulse_fd) != 0) {
            lane->oserror = errno;
            close_descriptors(lane); /* all or none: it is tried again when there are more */
            return AT_EIO;
        }
    }
    int rc = at_thread_new(lane, &lane->thread, lane->thread_main, lane, "aiotransfer", 0);
    if (rc != 0) {
        lane->oserror = rc;
        return AT_EIO;
    }
    lane->thread_started = 1;
#endif
    return AT_OK;
}

void at_thread_kick(at_lane *lane) {
    if (at_thread_start(lane) != AT_OK || !lane->thread_started || lane->thread_work) return;
    lane->thread_work = 1;
#ifdef __linux__
    uint64_t one = 1;
    ssize_t written = write(lane->thread_wake_fd, &one, sizeof one);
    (void)written;
#endif
}

void at_thread_ask(at_lane *lane) {
    lane->thread_stop = 1;
#ifdef __linux__
    uint64_t one = 1;
    ssize_t written = lane->thread_started ? write(lane->thread_wake_fd, &one, sizeof one) : 0;
    (void)written;
#endif
    (void)pthread_cond_broadcast(&lane->help);
}

void at_thread_join(at_lane *lane) {
#ifdef __linux__
    if (lane->thread_started) (void)pthread_join(lane->thread, NULL);
    if (lane->helper_started == 1) (void)pthread_join(lane->helper, NULL);
    lane->thread_started = lane->helper_started = 0;
#endif
    close_descriptors(lane);
}
