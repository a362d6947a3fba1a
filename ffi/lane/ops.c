/* Operations that go on after their call: queued, posted, moved, withdrawn, ended. (submit.c decides which do.)
 *
 * Invariants (the property tests of the simulator hold us to them):
 *   - nothing is posted unless every check has passed; a refused call leaves no trace;
 *   - an operation ends exactly once, and only when no work request of it is posted and no thread moves it;
 *   - cursor counts what is posted or claimed, landed what has landed; cursor never moves once `withdrawn` is set;
 *   - a queued operation of a synchronous provider has something unclaimed, or a count that was refused; a refused count has no risk;
 *   - regions, remote regions and peers outlive the operations that use them (use counts). */
#include "copiers.h"
#include "lane.h"
#include "stage.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MOST_SPARE 256u
#define LEAVE_NS UINT64_C(200000000) /* of a shut lane, a thread waits so long for what is being moved */
#define COOKIE_BITS 20 /* of them for the slot; the other 43 say how many operations it has had */
#define COOKIE_MASK ((1u << COOKIE_BITS) - 1u)
#define MOST_LIVES ((UINT64_C(1) << (63 - COOKIE_BITS)) - 1)

/* Generations begin at 1, so that the smallest cookie is above every status: one number can be either, and is never both. */
_Static_assert(AT_FIRST_COOKIE == 1 << COOKIE_BITS, "cookies begin where statuses cannot be");

static int op_slot(at_lane *lane, uint32_t *index) {
    if (lane->op_free_count > 0) {
        *index = lane->op_free[--lane->op_free_count];
        return AT_OK;
    }
    if (lane->op_count > COOKIE_MASK) return AT_EBUSY;
    if (lane->op_count == lane->op_capacity) {
        uint32_t next = lane->op_capacity ? lane->op_capacity * 2 : 64;
        at_op **ops = realloc(lane->ops, next * sizeof *ops);
        if (ops == NULL) return AT_ENOMEM;
        lane->ops = ops;
        uint64_t *generations = realloc(lane->op_generation, next * sizeof *generations);
        if (generations == NULL) return AT_ENOMEM;
        lane->op_generation = generations;
        uint32_t *unused = realloc(lane->op_free, next * sizeof *unused);
        if (unused == NULL) return AT_ENOMEM;
        lane->op_free = unused;
        lane->op_capacity = next;
    }
    *index = lane->op_count++;
    lane->ops[*index] = NULL;
    lane->op_generation[*index] = 0;
    return AT_OK;
}

at_op *at_op_find(at_lane *lane, int64_t cookie) {
    uint32_t index = (uint32_t)cookie & COOKIE_MASK;
    if (cookie < AT_FIRST_COOKIE || index >= lane->op_count) return NULL;
    at_op *op = lane->ops[index];
    return op != NULL && op->cookie == cookie ? op : NULL;
}

/* Take a slot and a cookie for an operation that goes on. */
static int64_t op_admit(at_lane *lane, at_op *op) {
    uint32_t index;
    int rc = op_slot(lane, &index);
    if (rc != AT_OK) return rc;
    op->cookie = (int64_t)(((uint64_t)(++lane->op_generation[index]) << COOKIE_BITS) | index);
    lane->ops[index] = op;
    return op->cookie;
}

static at_op *op_new(at_lane *lane) {
    at_op *op = lane->op_spare;
    if (op == NULL) return malloc(sizeof *op);
    lane->op_spare = op->next;
    lane->op_spare_count--;
    return op;
}

static void op_free(at_lane *lane, at_op *op) {
#ifndef __SANITIZE_ADDRESS__ /* which is to see what is used after its end */
    if (lane->op_spare_count < MOST_SPARE) {
        op->next = lane->op_spare;
        lane->op_spare = op;
        lane->op_spare_count++;
        return;
    }
#endif
    (void)lane;
    free(op);
}

void at_ops_close(at_lane *lane) {
    for (at_op *op; (op = lane->op_spare) != NULL; free(op)) lane->op_spare = op->next;
    free(lane->tables.pages);
    lane->tables = (at_tables){NULL, 0};
    free(lane->kept);
    lane->kept = NULL;
    lane->kept_capacity = 0;
}

static void op_forget(at_lane *lane, at_op *op) {
    uint32_t index = (uint32_t)op->cookie & COOKIE_MASK;
    lane->ops[index] = NULL;
    if (lane->op_generation[index] < MOST_LIVES) lane->op_free[lane->op_free_count++] = index; /* no cookie ever comes again */
    free(op->batch);
    op_free(lane, op);
}

int at_ops_age(at_lane *lane, uint64_t lives) {
    uint32_t index, unused = lane->op_free_count;
    lane->op_free_count = 0; /* so that fresh ones are made */
    while (lane->op_count < AT_AGED && op_slot(lane, &index) == AT_OK) lane->op_free[unused++] = index;
    lane->op_free_count = unused;
    for (uint32_t i = 0; i < unused; i++) lane->op_generation[lane->op_free[i]] = lives < MOST_LIVES ? lives : MOST_LIVES - 1;
    return lane->op_count < AT_AGED ? AT_ENOMEM : AT_OK;
}

static uint64_t op_bytes(const at_op *op) {
    if (op->peer->port->window != 0) return op->bytes;
    int whole_bytes = !(op->kind & AT_OP_PAGES) && op->nbytes != 0; /* its extent are bytes */
    return whole_bytes ? op->moved : op->landed * op->nbytes;
}

/* Everything is retired: give back what was lent and tell the caller: the loop, a batch, or another thread. */
void at_op_end(at_op *op) {
    at_lane *lane = op->peer->lane;
    at_peer *peer = op->peer;
    at_region *region = op->region;
    at_remote *remote = op->remote;
    int whole = op->landed == op->units && (op->imm < 0 || op->counted == op->landed);
    int status = whole ? AT_OK : op->status != AT_OK ? op->status : AT_ECANCELED;
    lane->stats.ops_ended++;
    lane->stats.pending_ops--;
    lane->soon -= (uint32_t)op->soon;
    peer->queued_ops--;
    peer->queued_bytes -= op->nbytes * op->units;
    if (region != NULL) at_region_release(lane, op->region_index);
    if (remote != NULL) at_remote_release(lane, op->remote_index);
    if (op->stage != NULL) {
        at_stage_drop(op);
        at_copiers_call(lane); /* there is room for another one's */
    }
    free(op->table);
    op->table = NULL;
    if (op->detached == AT_DETACHED) {
        op->over = 1;
        op->status = status;
        (void)pthread_cond_broadcast(&lane->ended);
    } else {
        if (op->parent != 0) at_batch_ended(lane, op->parent, op->child, status, op_bytes(op));
        else at_event_push(lane, AT_EV_OP, (uint64_t)op->cookie, status, op_bytes(op));
        op_forget(lane, op);
    }
    at_peer_release(peer);
}

void at_op_enqueue(at_op *op) {
    at_line *line = &op->peer->lines[op->risk];
    op->next = NULL;
    if (line->tail != NULL) line->tail->next = op;
    else line->head = op;
    line->tail = op;
    op->queued = 1;
    op->peer->lane->risky += op->risk != AT_RISK_NONE;
}

void at_op_dequeue(at_op *op) {
    if (!op->queued) return;
    at_line *line = &op->peer->lines[op->risk];
    at_op **link = &line->head, *previous = NULL;
    while (*link != op) {
        previous = *link;
        link = &(*link)->next;
    }
    *link = op->next;
    if (line->tail == op) line->tail = previous;
    op->next = NULL;
    op->queued = 0;
    op->peer->lane->risky -= op->risk != AT_RISK_NONE;
}

static int op_over(const at_op *op) { return op->posted == 0 && op->running == 0; }

void at_op_stop(at_op *op, int status) {
    if (op->over) return;
    if (op->status == AT_OK) op->status = status;
    atomic_store(&op->withdrawn, 1);
    at_op_dequeue(op);
    if (op_over(op)) at_op_end(op);
}

/* ---- asynchronous ports ---- */

void at_stall(at_peer *peer, int stalled) {
    if (peer->stalled == stalled) return;
    uint32_t change = stalled ? 1u : UINT32_MAX;
    atomic_fetch_add_explicit(&peer->lane->stalled, change, memory_order_relaxed); /* order: alone: changed with the lock */
    peer->stalled = stalled;
    peer->lane->out.stalled = peer->lane->stalled != 0;
}

static void refill(at_peer *peer) {
    at_lane *lane = peer->lane;
    at_stall(peer, 0);
    const at_port *port = peer->port;
    while (port->window != 0 && !peer->paused && peer->lines[0].head != NULL && peer->posted < port->window) {
        at_op *op = peer->lines[0].head;
        int64_t rc = port->post(peer, op);
        if (rc == AT_EAGAIN) {
            lane->stats.refused_posts++;
            at_stall(peer, 1); /* again at the next completion or poll; no event may come of itself, see at_events.stalled */
            return;
        }
        if (rc == 0) return; /* full in its own way: a completion will come */
        if (rc < 0) {
            at_op_stop(op, (int)rc);
            continue;
        }
        op->posted++;
        peer->posted++;
        op->cursor += (uint64_t)rc;
        if (op->cursor == op->extent - op->tail) at_op_dequeue(op);
    }
}

void at_refill(at_peer *peer) {
    refill(peer);
    if (peer->port->flush != NULL) peer->port->flush(peer);
}

void at_op_unpost(at_op *op) {
    op->posted--;
    op->peer->posted--;
}

/* Its tail may be posted now. */
static void go_first(at_op *op) {
    at_line *line = &op->peer->lines[0];
    op->tail = 0;
    op->next = line->head;
    line->head = op;
    if (line->tail == NULL) line->tail = op;
    op->queued = 1;
}

void at_op_complete(at_op *op, uint64_t steps, uint64_t bytes, uint64_t counted, int status) {
    at_peer *peer = op->peer;
    op->posted--;
    peer->posted--;
    op->moved += steps;
    op->bytes += bytes;
    uint64_t before = op->landed;
    if (op->extent == op->units) op->landed = op->moved;
    else if (op->moved == op->extent) op->landed = op->units;
    op->counted += counted;
    peer->lane->stats.units_written += op->landed - before;
    peer->lane->stats.bytes_written += bytes;
    peer->users++; /* the operation may have been its last user */
    if (status != AT_OK) {
        at_op_stop(op, status);
    } else if (op_over(op) && (op->moved == op->extent || atomic_load(&op->withdrawn))) {
        at_op_end(op);
    } else if (op->tail != 0 && op->moved == op->extent - op->tail && !atomic_load(&op->withdrawn)) {
        if (at_stage_landed(op)) {
            at_op_enqueue(op);
            at_copiers_call(peer->lane);
        } else {
            go_first(op); /* all bytes have landed: now their immediates may go, before everything else */
        }
    }
    at_refill(peer);
    at_peer_release(peer);
}

/* ---- what goes on ---- */

int64_t at_op_keep(at_lane *lane, const at_op *template) {
    at_peer *peer = template->peer;
    uint64_t nbytes = template->nbytes * template->units;
    uint64_t queued = peer->queued_bytes, most = lane->config.max_bytes; /* one alone may be larger: it would never be taken else */
    if (peer->queued_ops >= lane->config.max_ops || (queued != 0 && (queued >= most || nbytes > most - queued))) return AT_EBUSY;
    if (at_events_reserve(lane) != AT_OK) return AT_ENOMEM;
    int ready = template->risk != AT_RISK_NONE ? at_copiers_ready(lane) : AT_OK;
    if (ready != AT_OK) return ready;
    at_op *op = op_new(lane);
    if (op == NULL) return AT_ENOMEM;
    *op = *template;
    if (op->kind & AT_OP_PAGES) {
        op->table = malloc((size_t)op->units * 2 * sizeof *op->table);
        if (op->table == NULL) {
            op_free(lane, op);
            return AT_ENOMEM;
        }
        memcpy(op->table, template->local_pages, (size_t)op->units * sizeof *op->table);
        memcpy(op->table + op->units, template->remote_pages, (size_t)op->units * sizeof *op->table);
        op->local_pages = op->table;
        op->remote_pages = op->table + op->units;
    }
    int64_t cookie = op_admit(lane, op);
    if (cookie < 0) {
        free(op->table);
        op_free(lane, op);
        return cookie;
    }
    if (peer->port->window != 0) op->extent = op->units;
    if (peer->port->cut != NULL) peer->port->cut(peer, op);
    at_op_hold(op);
    peer->queued_ops++;
    peer->queued_bytes += nbytes;
    at_op_enqueue(op);
    lane->stats.ops_queued++;
    lane->stats.pending_ops++;
    return cookie;
}

int64_t at_cancel(at_lane *lane, int64_t cookie, int status) {
    int64_t result = AT_EUNKNOWN;
    at_lock(lane);
    at_op *op = at_op_find(lane, cookie);
    if (op != NULL && op->batch != NULL && !op->batch->over) {
        result = 0;
        op->batch->open++; /* it may not end, and be gone, while we walk through it */
        for (uint32_t i = 0; i < op->batch->count; i++) {
            at_op *child = at_op_find(lane, op->batch->children[i]);
            if (child == NULL) continue;
            result += child->posted + (uint32_t)child->running;
            at_op_stop(child, status);
        }
        at_batch_ended(lane, cookie, op->batch->count, AT_OK, 0);
    } else if (op != NULL && op->batch == NULL) {
        result = op->posted + (uint32_t)op->running;
        at_op_stop(op, status);
    }
    at_unlock(lane);
    return result;
}

int64_t at_progress(at_lane *lane, int64_t cookie) {
    at_lock(lane);
    at_op *op = at_op_find(lane, cookie);
    int64_t result = AT_EUNKNOWN;
    if (op != NULL && op->batch == NULL) {
        result = op->over ? AT_EUNKNOWN : (int64_t)op_bytes(op);
    } else if (op != NULL) {
        uint64_t bytes = op->batch->landed_bytes;
        for (uint32_t i = 0; i < op->batch->count; i++) {
            const at_op *child = at_op_find(lane, op->batch->children[i]);
            if (child != NULL) bytes += op_bytes(child);
        }
        result = (int64_t)bytes;
    }
    at_unlock(lane);
    return result;
}

int at_fence(at_lane *lane, int64_t cookie) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_op *op = at_op_find(lane, cookie);
    if (op != NULL) {
        uint32_t n = op->batch != NULL ? op->batch->count : 1;
        result = AT_OK;
        for (uint32_t i = 0; i < n; i++) {
            at_op *batch = at_op_find(lane, cookie); /* fencing may have ended it */
            at_op *one = batch == NULL || batch->batch == NULL ? batch : at_op_find(lane, batch->batch->children[i]);
            if (one == NULL || one->over || one->peer->port->fence == NULL) continue;
            if (one->peer->port->window != 0 && one->posted == 0) continue; /* a copier is held up by memory of ours: no fence changes that */
            at_peer *peer = one->peer;
            peer->users++;
            peer->port->fence(peer);
            at_refill(peer);
            at_peer_release(peer);
        }
    }
    at_unlock(lane);
    return result;
}

void at_peer_end(at_peer *peer, int status) {
    if (peer->status == AT_OK) peer->status = status;
    if (peer->port->bar != NULL) peer->port->bar(peer);
    peer->users++;
    if (peer->probe == AT_PROBE_WANTED) {
        peer->probe = AT_PROBE_NONE;
        peer->lane->risky--;
    }
    for (int risk = 0; risk < AT_RISKS; risk++)
        while (peer->lines[risk].head != NULL) at_op_stop(peer->lines[risk].head, status);
    at_stall(peer, 0);
    if (peer->port->fence != NULL) peer->port->fence(peer); /* what is posted retires now and can touch nothing more */
    at_peer_release(peer);
}

/* ---- batches ---- */

int64_t at_op_new_batch(at_lane *lane, uint32_t count) {
    at_op *op = calloc(1, sizeof *op);
    size_t results = ((size_t)count * sizeof(int32_t) + 7) & ~(size_t)7;
    at_batch *batch = calloc(1, sizeof *batch + results + (size_t)count * sizeof(int64_t));
    int64_t cookie = op != NULL && batch != NULL && at_events_reserve(lane) == AT_OK ? AT_OK : AT_ENOMEM;
    if (cookie == AT_OK) {
        batch->count = count;
        batch->open = 1;
        batch->results = (int32_t *)(batch + 1);
        batch->children = (int64_t *)(void *)((uint8_t *)(batch + 1) + results);
        op->kind = AT_OP_BATCH;
        op->batch = batch;
        cookie = op_admit(lane, op);
    }
    if (cookie < 0) {
        free(op);
        free(batch);
        return cookie;
    }
    lane->stats.pending_ops++;
    return cookie;
}

void at_batch_ended(at_lane *lane, int64_t parent, uint32_t child, int status, uint64_t bytes) {
    at_op *op = at_op_find(lane, parent);
    if (op == NULL || op->batch == NULL) return; /* a child keeps it open: there is always one */
    at_batch *batch = op->batch;
    if (child < batch->count) batch->results[child] = status;
    batch->landed_bytes += bytes;
    if (op->status == AT_OK) op->status = status;
    if (--batch->open != 0) return;
    batch->over = 1;
    lane->stats.pending_ops--;
    at_event_push(lane, AT_EV_OP, (uint64_t)parent, op->status, batch->landed_bytes);
}

int at_batch_take(at_lane *lane, int64_t cookie, int32_t *results, uint64_t n) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_op *op = at_op_find(lane, cookie);
    if (op != NULL && op->batch != NULL && op->batch->over && op->batch->count == n) {
        memcpy(results, op->batch->results, (size_t)n * sizeof *results);
        op_forget(lane, op);
        result = AT_OK;
    }
    at_unlock(lane);
    return result;
}

/* ---- operations of other threads ---- */

/* With the lock, which it drops: bring asynchronous ports on, or sleep until something has ended. */
static void wait_a_little(at_lane *lane, uint64_t deadline) {
    if (lane->rails != NULL) {
        at_rail *rails = lane->rails;
        at_unlock(lane);
        at_rails_progress(rails, AT_TURN_POST);
        at_lock(lane);
        uint64_t soon = at_now() + 200000;
        deadline = soon < deadline ? soon : deadline;
    }
    struct timespec until = {(time_t)(deadline / 1000000000u), (long)(deadline % 1000000000u)};
    (void)pthread_cond_timedwait(&lane->ended, &lane->lock, &until);
}

int at_thread_wait(at_lane *lane, int64_t cookie, uint64_t ns) {
    uint64_t start = at_now(), deadline = ns > (UINT64_C(1) << 62) ? start + (UINT64_C(1) << 62) : start + ns, leave = 0;
    int result;
    at_lock(lane);
    lane->waiters++;
    for (;;) {
        const at_op *op = at_op_find(lane, cookie);
        result = op == NULL || op->detached != AT_DETACHED ? AT_EUNKNOWN : op->over ? op->status : 1;
        if (result != 1 || at_now() >= deadline) break;
        if (lane->shut && op->running != 0) { /* a copier is blocked: the waiter does not wait with it */
            if (leave == 0) leave = at_now() + LEAVE_NS;
            if (at_now() >= leave) {
                result = AT_ESHUT;
                break;
            }
        }
        wait_a_little(lane, leave != 0 && leave < deadline ? leave : deadline);
    }
    lane->waiters--;
    if (lane->waiters == 0 && lane->shut) (void)pthread_cond_broadcast(&lane->ended);
    at_unlock(lane);
    return result;
}

int at_thread_drop(at_lane *lane, int64_t cookie) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_op *op = at_op_find(lane, cookie);
    if (op != NULL && op->detached == AT_DETACHED) {
        result = op->over ? AT_OK : 1;
        if (op->over) op_forget(lane, op);
    }
    at_unlock(lane);
    return result;
}
