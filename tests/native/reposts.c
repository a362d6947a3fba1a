/* What is to be posted again after a connection broke, and is refused when it is open again: it stays asked for, whatever else is submitted
 * meanwhile, or it would wait until its deadline. Includes queue.c; the driver is the one below. */
#include "fabric/queue.c"

#include <errno.h>
#include <stdio.h>

static int answer; /* of the driver: 0: it takes a post, EAGAIN: later */
static uint32_t taken, refusals;

static int take(at_fab_conn *conn, at_fab_wr *wr, const at_fab_vector *v, int read, int counts, uint64_t data) {
    (void)conn, (void)wr, (void)v, (void)read, (void)counts, (void)data;
    if (answer == 0) taken++;
    else refusals++;
    return answer;
}

static int send_ctrl(at_fab_conn *conn, at_fab_wr *wr) {
    (void)conn, (void)wr;
    return 0;
}

static void shut(at_fab_conn *conn) { conn->ep = NULL; }

static uint32_t look(int multirail_too) {
    at_lane_config config = {.max_ops = 16, .max_bytes = 1 << 20, .early_values = 16, .flags = AT_LANE_NO_THREAD};
    at_lane *lane = at_lane_new(1, &config);
    at_fab_driver driver = {.post = take, .send = send_ctrl, .close = shut};
    at_fab fab = {.rail = {.lane = lane}, .driver = &driver, .fd = -1, .kick_fd = -1};
    fab.facts.most_posted = 64;
    fab.facts.most_bytes = 1 << 20;
    fab.facts.flags = AT_FAB_ORDERED | AT_FAB_MARKS;
    (void)pthread_mutex_init(&fab.lock, NULL);
    at_fab_conn conn = {.fab = &fab, .ep = &fab, .begun = 1, .heard = 1, .joined = 1, .words = at_fab_words_new()};
    at_fab_conn *conns[] = {&conn};
    at_fab_multirail multirail = {.words = at_fab_words_new(), .members = {&conn}, .count = 1, .users = 2};
    fab.conns = conns;
    fab.conn_count = 1;
    uint32_t wrong = 0;
    taken = refusals = 0;
    answer = 0;

    at_lock(lane);
    conn.peer = at_peer_add(lane, &at_fab_port, &conn, conn.words);
    if (multirail_too) {
        multirail.peer = at_peer_add(lane, &at_fab_multirail_port, &multirail, multirail.words);
        conn.multirail = &multirail;
    }
    at_peer *owner = at_fab_owner(&conn);
    at_unlock(lane);
    wrong += at_signal(lane, owner->id, 5) < 0 || taken != 1;

    at_lock(lane);
    at_fab_conn_break(&conn, ECONNRESET);
    wrong += conn.unconfirmed.head == NULL;
    conn.ep = &fab; /* it is open again */
    conn.peer->paused = 0;
    answer = EAGAIN;
    at_fab_reconcile(&conn, 0); /* nothing of it had arrived */
    at_fab_conn_refill(&conn);
    wrong += refusals == 0 || !owner->stalled;
    at_refill(owner); /* as others do that make room */
    wrong += !owner->stalled || lane->stalled == 0;
    at_unlock(lane);
    wrong += at_signal(lane, owner->id, 6) < 0; /* it waits behind what is to be posted again */

    at_lock(lane);
    wrong += !owner->stalled || taken != 1;
    answer = 0;
    (void)post_waiting(&fab); /* as every turn does */
    wrong += taken != 3 || owner->stalled != 0 || lane->stalled != 0;
    at_unlock(lane);
    printf("%s: %u wrong, %u taken, %u refused\n", multirail_too ? "multirail" : "connection", wrong, taken, refusals);
    return wrong;
}

int main(void) { return look(0) + look(1) != 0; }
