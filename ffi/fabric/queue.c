/* Progress: the completion queue, read by the loop, or by a thread that stands in for it.
 *
 * The thread that holds fab->progress_lock reads until nothing is left, posts what that has made room for, reads once more when it has posted
 * anything, and arms the queue last: only then may a thread sleep on its descriptor. One turn is bounded; if it was not enough, the
 * loop is told to come again. The loop itself leaves off when the first events are there: what they bring about, an answer to a peer
 * that waits, is worth more than the system calls of one more look, which it takes afterwards. */
#define _GNU_SOURCE

#include "fabric.h"

#include <poll.h>
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define BATCHES 64              /* read in one go */
#define ROUNDS 64               /* of reading and posting in one turn */
#define TURN_NS UINT64_C(300000)
#define BURST_NS UINT64_C(100000) /* between two turns that posts of one burst make: each costs some system calls */
#define AWAY_NS UINT64_C(1000000) /* the loop has not come round for so long: the thread stands in */
#define DOZE_NS UINT64_C(500000)  /* what the loop gets to come by itself when the queue has something */
#define NAP_LEAST UINT64_C(20000) /* without a descriptor: between two looks, right after something came */
#define NAP_MOST UINT64_C(1000000)

/* ---- handing out ---- */

static at_fab_conn *sender(at_fab *fab, const at_fab_entry *entry) {
    at_fab_conn *conn = entry->mark < fab->conn_count ? fab->conns[entry->mark] : NULL;
    return conn != NULL && conn->unique == entry->unique ? conn : NULL;
}

static void arrival(at_fab *fab, const at_fab_entry *entry) {
    uint64_t data = entry->data;
    at_fab_conn *conn = NULL;
    uint64_t n = 1;
    if (at_fab_is(fab, AT_FAB_MARKS)) {
        uint64_t mark = data >> 44;
        n = (data >> 32 & (AT_FAB_MOST_COUNT - 1)) + 1;
        conn = mark < fab->conn_count ? fab->conns[mark] : NULL;
    } else if (at_fab_is(fab, AT_FAB_SENDERS)) {
        conn = sender(fab, entry);
    } else { /* nothing says whose it is: the bounds on early values are those of the rail then */
        for (uint32_t i = 0; conn == NULL && i < fab->conn_count; i++) conn = fab->conns[i];
    }
    if (conn == NULL) {
        fab->rail.lane->stats.unknown_completions++;
        return;
    }
    conn->arrived++;
    if (at_fab_is(fab, AT_FAB_MARKS) || at_fab_is(fab, AT_FAB_SENDERS)) conn->signs++;
    at_imm_arrive(at_fab_owner(conn), (uint32_t)data, n);
}

static void work_done(at_fab_conn *conn, at_fab_wr *wr, int status) {
    at_fab *fab = conn->fab;
    at_peer *peer = conn->peer;
    at_op *op = wr->op;
    uint64_t steps = wr->steps, bytes = wr->bytes, counts = wr->counts;
    at_fab_list_remove(&conn->posted, wr);
    conn->posted_bytes -= bytes;
    conn->out--;
    fab->posted--;
    if (wr->bounce != NULL && status == AT_OK) status = at_fab_landed(wr);
    at_fab_wr_free(fab, wr);
    peer->users++;
    conn->signs += status == AT_OK; /* delivered: the other side has said so */
    if (status == AT_OK) at_op_complete(op, steps, bytes, counts, AT_OK);
    else at_op_complete(op, 0, 0, 0, op->status != AT_OK ? op->status : status);
    if (conn->repost.head != NULL) {
        at_fab_repost(conn);
        if (conn->repost.head == NULL) at_refill(peer); /* what had to wait behind it */
    }
    if (conn->multirail != NULL && conn->multirail->repost.head != NULL) at_fab_multirail_refill(conn->multirail);
    at_fab_retired(conn);
    at_peer_release(peer);
}

static void ctrl_in(at_fab *fab, at_fab_wr *wr, int good) {
    at_fab_conn *conn = wr->conn;
    if (conn != NULL) at_fab_list_remove(&conn->ctrls, wr);
    const at_fab_ctrl ctrl = wr->ctrl;
    at_fab_conn *from = good ? at_fab_ctrl_from(fab, wr) : NULL;
    if (from != NULL) {
        int first = !from->heard;
        from->heard = 1;
        if (from->joined && first) at_fab_up(from); /* else it is as soon as the offer that the control message overtook is taken */
        at_fab_stepped(from);
        at_fab_read(from, &ctrl);
        at_fab_read_failed(from, &ctrl);
        at_fab_tell(from);
    }
    at_fab_wr_free(fab, wr);
    if (conn == NULL && fab->driver->receive != NULL && fab->shared != NULL) { /* whichever connection: the receive is the shared endpoint's */
        for (uint32_t i = 0; conn == NULL && i < fab->conn_count; i++) conn = fab->conns[i];
    }
    if (good && conn != NULL && conn->ep != NULL && fab->driver->receive != NULL) (void)at_fab_receive(conn);
}

static void completed(at_fab *fab, at_fab_wr *wr, int error) {
    at_fab_conn *conn = wr->conn;
    if (wr->state == AT_WR_ORPHAN) {
        at_fab_wr_free(fab, wr);
    } else if (wr->state != AT_WR_POSTED) {
        if (wr->state != AT_WR_LIMBO) fab->rail.lane->stats.unknown_completions++;
    } else if (wr->kind == AT_WR_CTRL_IN) {
        ctrl_in(fab, wr, error == 0);
    } else if (error != 0 && at_fab_is(fab, AT_FAB_PRIVATE)) {
        at_fab_conn_break(conn, error); /* after any error: what else is posted there may never complete */
    } else if (wr->kind == AT_WR_CTRL_OUT) {
        at_fab_list_remove(&conn->ctrls, wr);
        at_fab_wr_free(fab, wr);
        conn->telling = 0;
        at_fab_tell(conn);
    } else {
        if (error != 0) fab->rail.lane->oserror = error;
        work_done(conn, wr, error != 0 ? AT_ERAIL : AT_OK);
    }
}

/* A completion that stands for those before it, which did not ask for one of their own. */
static void completed_up_to(at_fab *fab, at_fab_wr *wr) {
    at_fab_conn *conn = wr->conn;
    at_peer *peer = conn->peer;
    peer->users++;
    while (wr->state == AT_WR_POSTED && wr->conn == conn && conn->posted.head != NULL && conn->posted.head != wr) work_done(conn, conn->posted.head, AT_OK);
    completed(fab, wr, 0);
    at_peer_release(peer);
}

/* One batch: how many, or 0. */
static int read_batch(at_fab *fab) {
    at_fab_entry entries[BATCH];
    (void)pthread_mutex_lock(&fab->lock);
    int n = fab->driver->read(fab, entries, BATCH);
    (void)pthread_mutex_unlock(&fab->lock);
    if (n == 0) return 0;
    at_lane *lane = fab->rail.lane;
    at_lock(lane);
    fab->gathering = fab->driver->flush != NULL;
    for (int i = 0; i < n; i++) {
        at_fab_wr *wr = entries[i].wr;
        if (entries[i].arrival) {
            arrival(fab, &entries[i]);
            if (wr != NULL) at_fab_wr_free(fab, wr);
        } else if (wr == NULL) {
            at_fab_conn *conn = entries[i].error != 0 ? sender(fab, &entries[i]) : NULL;
            if (conn != NULL) at_fab_conn_break(conn, entries[i].error);
        } else if (entries[i].error == 0 && wr->kind == AT_WR_WORK && wr->state == AT_WR_POSTED) {
            if (at_fab_is(fab, AT_FAB_SENDERS)) completed_up_to(fab, wr);
            else completed(fab, wr, 0);
        } else {
            completed(fab, wr, entries[i].error);
        }
    }
    if (fab->gathering) {
        fab->gathering = 0;
        for (uint32_t i = 0; i < fab->conn_count; i++)
            if (fab->conns[i] != NULL) at_fab_flush_posts(fab->conns[i]->peer);
    }
    if (fab->driver->handed_out != NULL) fab->driver->handed_out(fab);
    at_unlock(lane);
    return n;
}

/* Everything that is there, or very much of it. Slots that were in limbo before are free once all was read: nothing names them any more. */
int at_fab_drain(at_fab *fab) {
    at_lane *lane = fab->rail.lane;
    at_lock(lane);
    at_fab_wr *limbo = fab->limbo;
    uint64_t closings = fab->closings;
    fab->limbo = NULL;
    at_unlock(lane);
    int count = 0, last = 1;
    for (int batch = 0; batch < BATCHES && last != 0; batch++) count += last = read_batch(fab);
    if (limbo == NULL && closings == fab->read_up_to) return count;
    at_lock(lane);
    if (last == 0 && fab->read_up_to != closings) {
        fab->read_up_to = closings;
        for (uint32_t i = 0; i < fab->conn_count; i++) /* what was counted by those that broke is final now */
            if (fab->conns[i] != NULL && fab->conns[i]->owes) at_fab_tell_failed(fab->conns[i]->multirail);
    }
    for (at_fab_wr *next; limbo != NULL; limbo = next) {
        next = limbo->next;
        if (last == 0) {
            at_fab_wr_free(fab, limbo);
        } else {
            limbo->next = fab->limbo;
            fab->limbo = limbo;
        }
    }
    at_unlock(lane);
    return count;
}

void at_fab_drain_now(at_rail *rail) {
    at_fab *fab = (at_fab *)rail;
    (void)pthread_mutex_lock(&fab->progress_lock);
    if (!atomic_load(&fab->stop)) (void)at_fab_drain(fab);
    (void)pthread_mutex_unlock(&fab->progress_lock);
}

int at_fab_flush(at_lane *lane, int64_t peer) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, peer);
    at_fab *fab = conn != NULL ? conn->fab : NULL;
    at_unlock(lane);
    if (fab == NULL) return AT_EUNKNOWN;
    at_fab_drain_now(&fab->rail);
    return AT_OK;
}

/* With the lock: post for those that were refused, or are owed a turn since others had filled the rail. Anything to drain? */
static int post_waiting(at_fab *fab) {
    at_lane *lane = fab->rail.lane;
    int posted = 0;
    int all = fab->saturated && fab->posted < fab->facts.most_posted;
    if (lane->stalled == 0 && !all && !fab->eager) return 0;
    fab->eager = 0;
    if (all) fab->saturated = 0;
    for (uint32_t i = 0; i < fab->conn_count; i++) {
        at_fab_conn *conn = fab->conns[i];
        if (conn == NULL || (!all && !conn->peer->stalled && !at_fab_owner(conn)->stalled)) continue;
        uint32_t before = conn->out;
        int told = conn->telling;
        at_fab_conn_refill(conn);
        posted |= conn->out != before || conn->telling != told;
    }
    return posted;
}

/* Whether there are events for the loop, which will come again. */
static int leaves_off(at_fab *fab) {
    at_lane *lane = fab->rail.lane;
    if (lane->queue_count == 0) return 0;
    lane->more = 1;
    atomic_store(&fab->left, 1);
    return 1;
}

/* With the turn. 1: the queue is armed, any thread may sleep on it. 0: there is more to do. */
static int progress(at_fab *fab, int turn) {
    uint64_t until = at_now() + TURN_NS;
    for (int i = 0; i < ROUNDS; i++) {
        int busy = at_fab_drain(fab);
        at_lock(fab->rail.lane);
        busy |= post_waiting(fab);
        int left = turn == AT_TURN_FIRST && leaves_off(fab);
        at_unlock(fab->rail.lane);
        if (left) return 1;
        if (busy) {
            if (at_now() > until) return 0;
            continue;
        }
        if (fab->fd < 0) {
            atomic_store(&fab->left, 0);
            return 1;
        }
        if (fab->driver->look != NULL) fab->driver->look(fab);
        (void)pthread_mutex_lock(&fab->lock);
        int armed = fab->driver->arm(fab);
        (void)pthread_mutex_unlock(&fab->lock);
        if (armed) {
            atomic_store(&fab->left, 0);
            return 1;
        }
    }
    return 0;
}

/* Give the turn back. Returns whether the queue is armed and no thread was turned away meanwhile. */
static int turn_over(at_fab *fab, int armed) {
    (void)pthread_mutex_unlock(&fab->progress_lock);     /* order: turn over 1 */
    return armed && !atomic_exchange(&fab->missed, 0); /* order: turn over 2 */
}

static int is_dedicated(const at_fab *fab) { return fab->started && (fab->fd < 0 || (fab->rail.lane->config.flags & AT_LANE_THREAD)); }

/* Posted right after a turn, and the loop comes anyway; or while others are under way: then it is told to, before it sleeps. Where
 * everything moves by itself, a turn is worth its system calls only once posts may have to wait for room. */
static int is_burst(at_fab *fab) {
    at_lane *lane = fab->rail.lane;
    int recent = at_now() - atomic_load(&fab->turned) < BURST_NS;
    if (fab->driver->by_itself) { /* but so often that no thread has to stand in for one that posts without a pause */
        at_lock(lane);
        int room = fab->posted < AT_FAB_WINDOW / 2;
        at_unlock(lane);
        return recent || (room && at_now() - atomic_load(&fab->turned) < AWAY_NS / 2);
    }
    if (!recent) return 0;
    if (atomic_load(&fab->left)) return 1;
    at_lock(lane);
    int burst = fab->posted > 1;
    if (burst) {
        lane->again = 1; /* should it be inside a poll and past this rail */
        at_event_signal(lane);
    }
    at_unlock(lane);
    return burst;
}

void at_fab_progress(at_rail *rail, int turn) {
    at_fab *fab = (at_fab *)rail;
    int from_loop = turn != AT_TURN_POST;
    if (is_dedicated(fab)) {
        if (!from_loop) at_fab_kick(fab);
        return;
    }
    if (from_loop) {
        atomic_store(&fab->last, at_now());
        (void)pthread_mutex_lock(&fab->progress_lock);
        atomic_store(&fab->missed, 0);
    } else if (is_burst(fab)) {
        return;
    } else {
        atomic_store_explicit(&fab->missed, 1, memory_order_relaxed); /* order: turn wanted 1 */
        atomic_thread_fence(memory_order_seq_cst);                    /* order: turn wanted 2 */
        if (pthread_mutex_trylock(&fab->progress_lock) != 0) return;  /* order: turn wanted 3 */
        atomic_store(&fab->missed, 0);
    }
    if (atomic_load(&fab->stop)) { /* its library may be at its own end already */
        (void)pthread_mutex_unlock(&fab->progress_lock);
        return;
    }
    int armed = turn_over(fab, progress(fab, turn));
    uint64_t now = at_now();
    atomic_store(&fab->turned, now);
    atomic_store(&fab->last, now); /* also for posts: while they take turns, no thread has to stand in */
    if (armed) return;
    at_lock(rail->lane);
    rail->lane->again = 1;
    at_event_signal(rail->lane);
    at_unlock(rail->lane);
}

/* ---- the thread ---- */

static void nap(uint64_t ns) {
    struct timespec span = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    (void)nanosleep(&span, NULL);
}

/* Sleep until the queue has something, or another thread kicks. Returns whether it was the queue. */
static int sleep_on_queue(at_fab *fab, int ms) {
    struct pollfd fds[3] = {{.fd = fab->kick_fd, .events = POLLIN}, {.fd = fab->fd, .events = POLLIN}, {.fd = fab->news_fd, .events = POLLIN}};
    int n = poll(fds, 3, ms); /* those that there are not are passed over */
    uint64_t kicks;
    if (n > 0 && fds[0].revents != 0 && read(fab->kick_fd, &kicks, sizeof kicks) < 0) return 0;
    return n > 0 && (fds[1].revents | fds[2].revents) != 0;
}

static int turn(at_fab *fab) {
    (void)pthread_mutex_lock(&fab->progress_lock);
    atomic_store(&fab->missed, 0);
    return turn_over(fab, progress(fab, AT_TURN_POST));
}

/* Whether there is something to do of which the queue's descriptor need not tell. */
static int is_stalled(at_fab *fab) {
    at_lock(fab->rail.lane);
    int stalled = fab->rail.lane->stalled != 0 || fab->eager || fab->left;
    at_unlock(fab->rail.lane);
    return stalled;
}

static void stand_in(at_fab *fab) {
    while (!atomic_load(&fab->stop)) {
        uint64_t last = atomic_load(&fab->last), now = at_now();
        if (now - last < AWAY_NS) {
            nap(AWAY_NS);
            continue;
        }
        if (!sleep_on_queue(fab, is_stalled(fab) ? 1 : -1) && !is_stalled(fab)) continue;
        nap(DOZE_NS);
        last = atomic_load(&fab->last);
        if (at_now() - last < AWAY_NS) continue; /* the loop came by itself */
        while (!atomic_load(&fab->stop) && atomic_load(&fab->last) == last)
            if (turn(fab) && !sleep_on_queue(fab, is_stalled(fab) ? 1 : 2)) break;
    }
}

static void do_all(at_fab *fab) {
    uint64_t pause = NAP_LEAST;
    while (!atomic_load(&fab->stop)) {
        (void)pthread_mutex_lock(&fab->progress_lock);
        int came = at_fab_drain(fab);
        if (!turn_over(fab, progress(fab, AT_TURN_POST))) continue;
        if (fab->fd >= 0) {
            (void)sleep_on_queue(fab, is_stalled(fab) ? 1 : -1);
            continue;
        }
        pause = came != 0 ? NAP_LEAST : pause + pause / 2 < NAP_MOST ? pause + pause / 2 : NAP_MOST;
        nap(pause);
    }
}

static void *thread_main(void *argument) {
    at_fab *fab = argument;
    if (is_dedicated(fab)) do_all(fab);
    else stand_in(fab);
    atomic_store(&fab->running, 0);
    return NULL;
}

int at_fab_thread_start(at_fab *fab) {
    at_lane *lane = fab->rail.lane;
    int error = 0;
    at_lock(lane);
    if (!fab->started && !(lane->config.flags & AT_LANE_NO_THREAD) && !lane->shut) {
        sigset_t all, before;
        sigfillset(&all);
        fab->started = 1;
        atomic_store(&fab->running, 1);
        atomic_store(&fab->last, at_now());
        pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to Python's main thread */
        error = pthread_create(&fab->thread, NULL, thread_main, fab);
        if (error != 0) atomic_store(&fab->started, 0);
        if (error != 0) atomic_store(&fab->running, 0);
        else (void)pthread_setname_np(fab->thread, "aiotransfer~");
        if (error == 0) at_cpus_give(&fab->cpus, fab->thread);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (error != 0) lane->oserror = error;
    at_unlock(lane);
    return error == 0 ? AT_OK : AT_EIO;
}

int at_fab_pin(at_lane *lane, at_fab *fab, const int32_t *cpus, uint32_t count) {
    int rc = at_lane_pin(lane, cpus, count);
    if (rc != AT_OK) return rc;
    at_lock(lane);
    at_cpus_add(&fab->cpus, cpus, count);
    if (fab->started) at_cpus_give(&fab->cpus, fab->thread);
    at_unlock(lane);
    return AT_OK;
}

/* Its thread has left, and so has every other that made progress; none begins again. */
int at_fab_stop(at_rail *rail, uint64_t until) {
    at_fab *fab = (at_fab *)rail;
    atomic_store(&fab->stop, 1);
    at_fab_kick(fab);
    while (atomic_load(&fab->running) || pthread_mutex_trylock(&fab->progress_lock) != 0) {
        if (at_now() >= until) return 0;
        nap(NAP_LEAST);
    }
    (void)pthread_mutex_unlock(&fab->progress_lock);
    return 1;
}

void at_fab_thread_stop(at_fab *fab) {
    at_lock(fab->rail.lane);
    int started = fab->started;
    fab->started = 0;
    at_unlock(fab->rail.lane);
    if (!started) return;
    atomic_store(&fab->stop, 1);
    at_fab_ring(fab);
    (void)pthread_join(fab->thread, NULL);
}
