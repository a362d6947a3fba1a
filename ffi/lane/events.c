/* Events for the loop: a growing queue in C, handed out in flat arrays.
 *
 * The loop watches one descriptor, a private epoll that holds the lane's own eventfd, every peer's doorbell and every
 * peer's pidfd, all edge-triggered. Nobody ever reads a doorbell: the peer holds the same open file and could have emptied
 * it or switched its flags, and a read could then block the loop. With edges, asking the private epoll is enough: each write
 * to an eventfd is a new edge, whatever its count. Doorbells are written a 0 (see at_shm_ring), so they are watched for writability
 * too: an edge is told only with a state that is looked for, and a count of 0 is not readable. */
#ifdef __linux__
#define _GNU_SOURCE
#include <sys/epoll.h>
#include <sys/eventfd.h>
#endif
#include "lane.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#define EVENT_SLACK 128u
#define LAST_PARTS_NS UINT64_C(100000) /* longest wait for an operation that was about to end */

int at_events_open(at_lane *lane) {
#ifdef __linux__
    lane->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    lane->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (lane->epoll_fd < 0 || lane->wake_fd < 0 || at_events_reserve(lane) != AT_OK) return -1;
    return at_watch_fd(lane, lane->wake_fd, AT_TAG(AT_TAG_WAKE, 0), 1);
#else
    return at_events_reserve(lane);
#endif
}

void at_events_close(at_lane *lane) {
    if (lane->epoll_fd >= 0) close(lane->epoll_fd);
    if (lane->wake_fd >= 0) close(lane->wake_fd);
    lane->epoll_fd = lane->wake_fd = -1;
}

int at_watch_fd(at_lane *lane, int fd, uint64_t tag, int edge) {
#ifdef __linux__
    uint32_t bell = tag >> 32 == AT_TAG_DOORBELL ? (uint32_t)EPOLLOUT : 0u;
    struct epoll_event event = {.events = EPOLLIN | bell | (edge ? (uint32_t)EPOLLET : 0u), .data.u64 = tag};
    return epoll_ctl(lane->epoll_fd, EPOLL_CTL_ADD, fd, &event);
#else
    (void)lane, (void)fd, (void)tag, (void)edge;
    errno = ENOSYS;
    return -1;
#endif
}

void at_unwatch_fd(at_lane *lane, int fd) {
#ifdef __linux__
    /* Closing is not enough: the peer holds the same open file, and the entry would outlive our descriptor. */
    struct epoll_event event = {0};
    if (fd >= 0) (void)epoll_ctl(lane->epoll_fd, EPOLL_CTL_DEL, fd, &event);
#else
    (void)lane, (void)fd;
#endif
}

int at_lane_fd(at_lane *lane) { return lane->epoll_fd; }
at_events *at_lane_events(at_lane *lane) { return &lane->out; }

void at_event_signal(at_lane *lane) {
    if (lane->signalled) return;
    lane->signalled = 1;
#ifdef __linux__
    uint64_t one = 1;
    ssize_t written = write(lane->wake_fd, &one, sizeof one); /* fails only when it is as full as it can be: readable */
    (void)written;
#endif
}

static int grow(at_lane *lane) {
    uint32_t next = lane->queue_capacity ? lane->queue_capacity * 2 : 256;
    at_event *more = malloc(next * sizeof *more);
    if (more == NULL) return AT_ENOMEM;
    for (uint32_t i = 0; i < lane->queue_count; i++)
        more[i] = lane->queue[(lane->queue_head + i) & (lane->queue_capacity - 1)];
    free(lane->queue);
    lane->queue = more;
    lane->queue_capacity = next;
    lane->queue_head = 0;
    return AT_OK;
}

/* Each operation ends in one event at most; the others (counters, peers, regions, words) have the slack. */
int at_events_reserve(at_lane *lane) {
    while (lane->queue_count + lane->stats.pending_ops + EVENT_SLACK > lane->queue_capacity)
        if (grow(lane) != AT_OK) return AT_ENOMEM;
    return AT_OK;
}

void at_event_push(at_lane *lane, int kind, uint64_t id, int status, uint64_t count) {
    /* An event may not be lost, whoever waits for it would wait for ever: room is reserved before an operation is admitted. */
    if (lane->queue_count == lane->queue_capacity && grow(lane) != AT_OK) abort();
    uint32_t at = (lane->queue_head + lane->queue_count) & (lane->queue_capacity - 1);
    lane->queue[at] = (at_event){.id = id, .count = count, .status = status, .kind = kind};
    lane->queue_count++;
    at_event_signal(lane);
}

#ifdef __linux__
static void heard(at_lane *lane, uint64_t tag) {
    uint32_t index = (uint32_t)tag;
    at_peer *peer = index < lane->peer_count ? lane->peers[index] : NULL;
    if (peer == NULL) return;
    if (tag >> 32 == AT_TAG_DEATH) peer->dead = 1;
    if (peer->freed) return;
    if (tag >> 32 == AT_TAG_DOORBELL) {
        lane->stats.doorbells_heard++;
        if (peer->port->rung != NULL) peer->port->rung(peer);
        peer->port->drain(peer);
    } else if (tag >> 32 == AT_TAG_DEATH) {
        at_event_push(lane, AT_EV_PEER, (uint64_t)peer->id, AT_EPEER, 0);
    }
}
#endif

void at_turn(at_lane *lane) {
    lane->turn_start = at_now();
    lane->turn_bytes = 0;
    lane->turn_ops = 0;
    lane->turn_due = 0;
}

/* progress="loop": queued copies are made in the loop's own turns, for about one turn's time in each. */
static void move_here(at_lane *lane) {
    lane->moving_here = 1;
    do at_move_queued(lane, AT_CHUNK, AT_MOVER_CALLER);
    while (at_queued_work(lane, 0) && at_now() - lane->turn_start < lane->config.turn_ns);
    at_here_over(lane);
}

/* The loop was woken a little early, so as not to lose the time that takes. An idle loop loses nothing by waiting here, and a
 * busy one comes too late to have to. */
static void wait_for_the_last_parts(at_lane *lane) {
    uint64_t until = lane->turn_start + LAST_PARTS_NS;
    while (lane->soon != 0 && lane->queue_count == 0 && at_now() < until) {
        at_unlock(lane);
        (void)sched_yield(); /* on a crowded machine, to whoever moves them */
        at_lock(lane);
    }
}

static int poll_for(at_lane *lane, int turn) {
    int owner = at_check_owner(lane);
    if (owner != AT_OK && owner != AT_ESHUT) return owner;
#ifdef __linux__
    struct epoll_event ready[64];
    int n = epoll_wait(lane->epoll_fd, ready, 64, 0);
#endif
    at_lock(lane);
    lane->signalled = 1; /* what is pushed from here on is handed out below: it needs no wake-up of its own */
    if (lane->rails != NULL) { /* asynchronous ports retire without the lock */
        at_rail *rails = lane->rails;
        lane->more = 0;
        at_unlock(lane);
        at_rails_progress(rails, turn);
        at_lock(lane);
    }
    at_turn(lane);
    lane->stats.polls++;
#ifdef __linux__
    for (int i = 0; i < n; i++)
        if (ready[i].data.u64 >> 32 != AT_TAG_WAKE && ready[i].data.u64 >> 32 != AT_TAG_RAIL) heard(lane, ready[i].data.u64);
    if (lane->pulse_heard) {
        lane->pulse_heard = 0;
        for (uint32_t i = 0; i < lane->peer_count; i++)
            if (lane->peers[i] != NULL) lane->peers[i]->port->answer(lane->peers[i], 1);
    }
#endif
    if (lane->config.flags & AT_LANE_LOOP) move_here(lane);
    if (lane->lingering != 0) at_peers_reap(lane);
    if (lane->soon != 0) wait_for_the_last_parts(lane);
    uint32_t count = lane->queue_count < AT_EVENTS ? lane->queue_count : AT_EVENTS;
    for (uint32_t i = 0; i < count; i++) {
        const at_event *event = &lane->queue[(lane->queue_head + i) & (lane->queue_capacity - 1)];
        lane->out.id[i] = event->id;
        lane->out.count[i] = event->count;
        lane->out.status[i] = event->status;
        lane->out.kind[i] = event->kind;
    }
    if (count != 0) lane->queue_head = (lane->queue_head + count) & (lane->queue_capacity - 1);
    lane->queue_count -= count;
    lane->signalled = 0;
    if (lane->queue_count != 0 || lane->again || ((lane->config.flags & AT_LANE_LOOP) && at_queued_work(lane, 0))) at_event_signal(lane);
    lane->again = 0;
    lane->out.more = lane->more;
    at_unlock(lane);
    return (int)count;
}

int at_poll(at_lane *lane) { return poll_for(lane, AT_TURN_LOOP); }
int at_poll_first(at_lane *lane) { return poll_for(lane, AT_TURN_FIRST); }
