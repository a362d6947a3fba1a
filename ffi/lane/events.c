/* Events for the loop: a growing queue in C, handed out in flat arrays.
 *
 * The loop watches one descriptor, a private epoll that holds the lane's own eventfd, every peer's doorbell and every
 * peer's pidfd, all edge-triggered. A doorbell is never read: the peer holds the same open file and could have emptied
 * it or switched its flags, and a read could then block the loop. With edges, asking the private epoll is enough: each write
 * to an eventfd is a new edge, with any count. Doorbells are written a 0 (see at_shm_ring), so they are watched for writability
 * too: an edge is told only with a state that is looked for, and a count of 0 is not readable. */
#ifdef __linux__
#define _GNU_SOURCE
#include <sys/epoll.h>
#include <sys/eventfd.h>
#endif
#include "lane.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define EVENT_SLACK 128u

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
    /* An event may not be lost, or its waiter would wait for ever: room is reserved before an operation is admitted. */
    if (lane->queue_count == lane->queue_capacity && grow(lane) != AT_OK) abort();
    uint32_t at = (lane->queue_head + lane->queue_count) & (lane->queue_capacity - 1);
    lane->queue[at] = (at_event){.id = id, .count = count, .status = status, .kind = kind};
    lane->queue_count++;
    at_event_signal(lane);
}
