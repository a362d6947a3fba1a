/* The end of a lane, also of one whose engine was forgotten: first nothing native touches memory any more, then memory goes.
 *
 *   at_lane_stop  Nothing new begins, what is under way is withdrawn, peers are shut out, the lane's threads leave. Its wait is bounded and
 *                 it may be called again. It frees nothing, so other threads may be inside any other call (daemon threads at exit).
 *   at_lane_end   Threads are joined, peers and rails are destroyed, descriptors are closed. No other thread is in a call of this lane.
 *   at_lane_free  The lane itself. Until then it answers late calls, of a coroutine that is taken apart for example: there is nothing. */
#include "copiers.h"
#include "lane.h"
#include "stage.h"

#include <stdlib.h>
#include <time.h>

#define MOST_NS (UINT64_C(1) << 62)
#define SECOND UINT64_C(1000000000)

static at_control nothing; /* what lanes that have ended look at: every grant is over */

static void nap(void) {
    struct timespec span = {0, 100000};
    (void)nanosleep(&span, NULL);
}

/* A thread that a page holds up may have the lock for ever. */
static int lock_by(at_lane *lane, uint64_t until) {
    while (pthread_mutex_trylock(&lane->lock) != 0) {
        if (at_now() >= until) return 0;
        nap();
    }
    return 1;
}

/* With the lock. Every grant is over, and peers that were given none begin nothing either. */
static void shut_out(at_lane *lane) {
    lane->shut = 1;
    for (uint32_t slot = 0; slot < lane->grant_top; slot++) {
        uint64_t epoch = atomic_load(&lane->control->epoch[slot]);
        if (epoch & 1u) atomic_store(&lane->control->epoch[slot], epoch + 1);
    }
    for (uint32_t i = 0; i < lane->peer_count; i++) {
        at_peer *peer = lane->peers[i];
        if (peer == NULL) continue;
        if (peer->port->bar != NULL) peer->port->bar(peer);
        if (peer->port->window == 0) at_peer_end(peer, AT_ESHUT);
    }
}

static int peers_inside(at_lane *lane) {
    int count = 0;
    for (uint32_t i = 0; i < lane->peer_count; i++) {
        at_peer *peer = lane->peers[i];
        if (peer != NULL && peer->port->inside != NULL && peer->port->inside(peer)) count++;
    }
    return count;
}

static int rails_stop(at_rail *first, uint64_t until) {
    int quiet = 1;
    for (at_rail *rail = first; rail != NULL; rail = rail->next)
        if (rail->stop != NULL && !rail->stop(rail, until)) quiet = 0;
    return quiet;
}

static int is_busy(at_lane *lane) {
    return lane->threads != 0 || lane->waiters != 0 || at_is_moving(lane) || lane->moving_other;
}

int at_lane_stop(at_lane *lane, uint64_t timeout_ns, int *inside) {
    *inside = 0;
    if (at_is_forked(lane)) return AT_EFORK;
    uint64_t until = at_now() + (timeout_ns < MOST_NS ? timeout_ns : MOST_NS);
    if (lane->over) return AT_OK;
    if (!lock_by(lane, until)) return AT_EAGAIN;
    shut_out(lane);
    at_thread_ask(lane);
    at_copiers_ask(lane);
    at_rail *rails = lane->rails;
    at_unlock(lane);
    if (!rails_stop(rails, until) || !lock_by(lane, until)) return AT_EAGAIN;
    for (uint32_t i = 0; i < lane->peer_count; i++) /* what they had posted is fenced: only now, as a fence waits for no thread */
        if (lane->peers[i] != NULL) at_peer_end(lane->peers[i], AT_ESHUT);
    struct timespec end = {(time_t)(until / SECOND), (long)(until % SECOND)};
    while (is_busy(lane) && at_now() < until) (void)pthread_cond_timedwait(&lane->ended, &lane->lock, &end);
    int quiet = !is_busy(lane);
    while (quiet && (*inside = peers_inside(lane)) != 0 && at_now() < until) {
        at_unlock(lane);
        nap();
        at_lock(lane);
    }
    at_unlock(lane);
    return quiet ? AT_OK : AT_EAGAIN;
}

/* Late calls find no operation and no remote region, whose peers are gone. */
static void forget_all(at_lane *lane) {
    for (uint32_t i = 0; i < lane->op_count; i++) {
        at_op *op = lane->ops[i];
        if (op == NULL) continue;
        at_stage_free(op->stage);
        free(op->table);
        free(op->batch);
        free(op);
        lane->ops[i] = NULL;
    }
    for (uint32_t i = 0; i < lane->remote_count; i++) {
        at_remote *remote = lane->remotes[i];
        free(remote->parts);
        *remote = (at_remote){.generation = remote->generation + (remote->generation & 1u)};
    }
    for (uint32_t i = 0; i < lane->watch_count; i++) lane->watches[i].word = NULL;
    lane->queue_count = 0;
}

void at_lane_end(at_lane *lane) {
    if (at_is_forked(lane) || lane->over) return;
    at_rail *left = NULL; /* those that have to be destroyed once their peers are gone; the others may be gone already */
    for (at_rail *rail = lane->rails, *next; rail != NULL; rail = next) {
        next = rail->next;
        if (rail->destroy != NULL) rail->next = left, left = rail;
        rail->leave(rail);
    }
    lane->rails = NULL;
    at_copiers_join(lane);
    at_thread_join(lane);
    at_lock(lane);
    for (uint32_t i = 0; i < lane->peer_count; i++) {
        at_peer *peer = lane->peers[i];
        if (peer == NULL) continue;
        lane->peers[i] = NULL;
        peer->port->destroy(peer);
        free(peer);
    }
    lane->lingering = 0;
    forget_all(lane);
    at_unlock(lane);
    for (at_rail *next; left != NULL; left = next) {
        next = left->next;
        left->destroy(left);
    }
    at_events_close(lane);
    lane->control = &nothing;
    at_control_release(lane->control_ref);
    lane->control_ref = NULL;
    lane->over = 1;
}

void at_lane_free(at_lane *lane) {
    if (lane == NULL || at_is_forked(lane)) return; /* of a parent: its threads and locks are left alone */
    int inside;
    while (at_lane_stop(lane, SECOND, &inside) != AT_OK) {}
    at_lane_end(lane);
    at_lane_destroy(lane);
}
