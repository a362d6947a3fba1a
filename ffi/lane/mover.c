/* What the native thread of a lane does: large copies in chunks, signs of life, and watched words, while the loop does something else.
 *
 * One core does not fill the memory bus. Where the process may run on more than one, a second thread, the helper, moves the
 * parts of large copies that the first has not claimed; it starts with the first of them and otherwise sleeps. */
#ifdef __linux__
#define _GNU_SOURCE
#include "lane.h"
#include "threads.h"

#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <time.h>

#define PULSE_NS UINT64_C(200000)       /* pulses that come faster than this wait: they are no honest peer's */
#define ROUND_BYTES ((uint64_t)4 << 20) /* one operation is served this long before others are looked at */

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

/* Sleep until another thread or process rings, or for `pause` ns when words are watched (0: none are). */
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

static int may_use_two_cores(void) {
    cpu_set_t cpus;
    return sched_getaffinity(0, sizeof cpus, &cpus) == 0 && CPU_COUNT(&cpus) > 1;
}

static void call_helper(at_lane *lane) {
    if (!at_queued_for_two(lane)) return;
    if (!lane->helper_started) lane->helper_started = may_use_two_cores() && at_thread_new(lane, &lane->helper, helper_main, lane, "aiotransfer+", 0) == 0 ? 1 : -1;
    if (lane->helper_started == 1) (void)pthread_cond_signal(&lane->help);
}

void *at_thread_main(void *argument) {
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

#endif
