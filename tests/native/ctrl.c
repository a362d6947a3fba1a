/* A peer that takes back every grant there can be, several times, in control messages: each is confirmed once nothing is posted under it, once.
 * Includes ctrl.c; what it sends is caught here instead of going anywhere. */
#include "fabric/ctrl.c"

#include <stdio.h>

static uint8_t confirmations[AT_GRANTS];
static uint32_t wrong;
static at_fab_wr *sent;

static int catch_ctrl(at_fab_conn *conn, at_fab_wr *wr) {
    (void)conn;
    sent = wr;
    for (uint32_t i = wr->ctrl.revoked; i < wr->ctrl.revoked + wr->ctrl.over; i++) {
        confirmations[wr->ctrl.pairs[i].slot]++;
        wrong += wr->ctrl.pairs[i].epoch != 7;
    }
    return 0;
}

/* Everything that was written arrives, and what is said then arrives too. */
static void deliver(at_fab_conn *conn) {
    while (sent != NULL) {
        at_fab_wr *wr = sent;
        sent = NULL;
        at_fab_list_remove(&conn->ctrls, wr);
        at_fab_wr_free(conn->fab, wr);
        conn->telling = 0;
        at_fab_tell(conn);
    }
}

static void take_back_all(at_fab *fab, at_fab_conn *conn) {
    at_fab_wr *wr = at_fab_wr_take(fab);
    for (uint32_t first = 0; first < AT_GRANTS; first += AT_FAB_PAIRS) {
        wr->conn = conn;
        wr->ctrl = (at_fab_ctrl){.mark = conn->mark, .generation = conn->generation, .revoked = AT_FAB_PAIRS};
        for (uint32_t i = 0; i < AT_FAB_PAIRS; i++) {
            wr->ctrl.pairs[i].slot = AT_GRANTS - 1 - (first + i);
            wr->ctrl.pairs[i].epoch = 7;
        }
        if (at_fab_ctrl_from(fab, wr) == conn) at_fab_read(conn, &wr->ctrl);
        at_fab_tell(conn);
    }
    at_fab_wr_free(fab, wr);
}

static uint32_t counted(uint8_t times) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < AT_GRANTS; i++) n += confirmations[i] == times;
    return n;
}

int main(void) {
    at_lane_config config = {.max_ops = 16, .max_bytes = 1 << 20, .early_values = 16, .flags = AT_LANE_NO_THREAD};
    at_lane *lane = at_lane_new(1, &config);
    at_fab_driver driver = {.send = catch_ctrl};
    at_fab fab = {.rail = {.lane = lane}, .driver = &driver, .fd = -1, .kick_fd = -1};
    (void)pthread_mutex_init(&fab.lock, NULL);
    at_fab_conn conn = {.fab = &fab, .ep = &fab, .begun = 1, .heard = 1, .joined = 1, .words = at_fab_words_new()};
    at_fab_conn *conns[] = {&conn};
    fab.conns = conns;
    fab.conn_count = 1;
    at_lock(lane);
    conn.peer = at_peer_add(lane, &at_fab_port, &conn, conn.words);
    at_remote remote = {.slot = 9, .epoch = 7};
    at_op op = {.peer = conn.peer, .remote = &remote, .posted = 1, .running = 1};
    at_fab_wr *posted = at_fab_wr_take(&fab);
    posted->op = &op;
    at_fab_list_add(&conn.posted, posted);

    for (int round = 0; round < 3; round++) take_back_all(&fab, &conn); /* the first answer is under way: the rest has to wait for it */
    deliver(&conn);
    wrong += counted(0) != 1 || confirmations[9] != 0; /* something is posted under that one */
    at_fab_list_remove(&conn.posted, posted);
    at_fab_retired(&conn);
    deliver(&conn);
    wrong += confirmations[9] != 1 || conn.over_count != 0;
    wrong += counted(1) + counted(2) != AT_GRANTS || counted(2) > AT_FAB_PAIRS; /* those of the first answer were named again */
    at_unlock(lane);
    printf("%u wrong: %u once, %u twice, %u owed\n", wrong, counted(1), counted(2), conn.over_count);
    return wrong != 0;
}
