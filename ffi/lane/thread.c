/* The native thread of a lane: large copies in chunks, signs of life, and watched words, while the loop does something else.
 *
 * It holds no Python object and never needs the interpreter's lock. It sleeps in its own epoll on two eventfds: one that
 * this lane writes when it queues work, one that peers write to ask whether we are alive. Doorbells of ordinary arrivals are
 * not among them: those belong to the loop, and the thread must not wake for each. It starts with the first peer or the first
 * large copy; an engine that never needs it has none.
 *
 * One core does not fill the memory bus. Where the process may run on more than one, a second thread, the helper, moves the
 * parts of large copies that the first has not claimed; it starts with the first of them and otherwise sleeps. */
#ifdef __linux__
#define _GNU_SOURCE
#include <sys/epoll.h>
#include <sys/eventfd.h>
#endif
#include "copiers.h"
#include "lane.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define PULSE_NS UINT64_C(200000)       /* pulses that come faster than this wait: they are no honest peer's */
#define ROUND_BYTES ((uint64_t)4 << 20) /* one operation is served this long before others are looked at */

#ifdef __linux__
static void answer_pings(at_lane *lane) {
    lane->stats.pulses_answered++;
    for (uint32_t i = 0; i < lane->peer_count; i++)
        if (lane->peers[i] != NULL) lane->peers[i]->port->answer(lane->peers[i], 0);
    lane->pulse_heard = 1;
    lane->pulse_answered = at_now();
    at_event_signal(lane);
}

/* A flood of pulses costs us a nap, not a core. With the lock, which it drops. */
static void pulse(at_lane *lane) {
    if (at_now() - lane->pulse_answered < PULSE_NS) {
        at_unlock(lane);
        struct timespec nap = {0, (long)PULSE_NS};
        (void)nanosleep(&nap, NULL);
        at_lock(lane);
    }
    answer_pings(lane);
}

/* Sleep until somebody rings, or for `pause` ns when words are watched (0: none are). */
static int wait_for_news(at_lane *lane, struct epoll_event *ready, int most, uint64_t pause) {
    if (pause == 0) return epoll_wait(lane->thread_epoll_fd, ready, most, -1);
    struct pollfd fd = {.fd = lane->thread_epoll_fd, .events = POLLIN};
    struct timespec span = {(time_t)(pause / 1000000000u), (long)(pause % 1000000000u)};
    return ppoll(&fd, 1, &span, NULL) > 0 ? epoll_wait(lane->thread_epoll_fd, ready, most, 0) : 0;
}

/* Moves what two threads are faster for, and sleeps otherwise. */
static void *helper_main(void *argument) {
    at_lane *lane = argument;
    at_lock(lane);
    while (!lane->thread_stop) {
        if (at_queued_for_two(lane)) at_move_queued(lane, ROUND_BYTES, AT_MOVER_HELPER);
        else (void)pthread_cond_wait(&lane->help, &lane->lock);
    }
    at_thread_left(lane);
    at_unlock(lane);
    return NULL;
}

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

static int may_use_two_cores(void) {
    cpu_set_t cpus;
    return sched_getaffinity(0, sizeof cpus, &cpus) == 0 && CPU_COUNT(&cpus) > 1;
}

static void call_helper(at_lane *lane) {
    if (!at_queued_for_two(lane)) return;
    if (!lane->helper_started) lane->helper_started = may_use_two_cores() && at_thread_new(lane, &lane->helper, helper_main, lane, "aiotransfer+", 0) == 0 ? 1 : -1;
    if (lane->helper_started == 1) (void)pthread_cond_signal(&lane->help);
}

static void *thread_main(void *argument) {
    at_lane *lane = argument;
    struct epoll_event ready[4];
    at_lock(lane);
    while (!lane->thread_stop) {
        lane->thread_work = 0; /* with the lock, after the queue was seen empty: the next kick must ring */
        uint64_t pause = at_watch_look(lane);
        at_unlock(lane);
        int n = wait_for_news(lane, ready, 4, pause);
        at_lock(lane);
        for (int i = 0; i < n; i++)
            if (ready[i].data.fd == lane->pulse_fd) pulse(lane);
        while (!lane->thread_stop && !(lane->config.flags & AT_LANE_LOOP) && at_queued_work(lane, 1)) {
            uint64_t before = lane->stats.thread_chunks;
            call_helper(lane);
            at_move_queued(lane, ROUND_BYTES, AT_MOVER_THREAD);
            (void)at_watch_look(lane);
            if (epoll_wait(lane->thread_epoll_fd, ready, 4, 0) > 0) answer_pings(lane); /* long queues: stay alive */
            if (lane->stats.thread_chunks == before) { /* only counts that a full table refused: wait for the other side */
                at_unlock(lane);
                struct timespec pause = {0, 1000000};
                (void)nanosleep(&pause, NULL);
                at_lock(lane);
            }
        }
    }
    at_thread_left(lane);
    at_unlock(lane);
    return NULL;
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
    int rc = at_thread_new(lane, &lane->thread, thread_main, lane, "aiotransfer", 0);
    if (rc != 0) {
        lane->oserror = rc;
        return AT_EIO;
    }
    lane->thread_started = 1;
#endif
    return AT_OK;
}

int at_lane_pin(at_lane *lane, const int32_t *cpus, uint32_t count) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
#ifdef __linux__
    at_lock(lane);
    at_cpus_add(&lane->cpus, cpus, count);
    if (lane->thread_started) at_cpus_give(&lane->cpus, lane->thread);
    if (lane->helper_started == 1) at_cpus_give(&lane->cpus, lane->helper);
    at_copiers_pin(lane);
    at_unlock(lane);
#else
    (void)cpus, (void)count;
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
    at_copiers_ask(lane);
}

void at_thread_join(at_lane *lane) {
#ifdef __linux__
    if (lane->thread_started) (void)pthread_join(lane->thread, NULL);
    if (lane->helper_started == 1) (void)pthread_join(lane->helper, NULL);
    lane->thread_started = lane->helper_started = 0;
#endif
    at_copiers_join(lane);
    close_descriptors(lane);
}
