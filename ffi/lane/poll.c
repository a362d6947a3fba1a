/* One turn of the loop: what rings is heard, rails make progress, and events are handed out. */
#ifdef __linux__
#include <sys/epoll.h>
#endif
#include "lane.h"

#include <sched.h>

#define LAST_PARTS_NS UINT64_C(100000) /* longest wait for an operation that was about to end */

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
        (void)sched_yield(); /* on a crowded machine, to the thread that moves them */
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
