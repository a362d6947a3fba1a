/* Operations: checked, posted or queued, moved, withdrawn, ended.
 *
 * Invariants (the property tests of the simulator hold us to them):
 *   - nothing is posted unless every check has passed; a refused call leaves no trace;
 *   - an operation ends exactly once, and only when no work request of it is posted and no thread moves it;
 *   - cursor counts what is posted, landed what has landed; cursor never moves once `withdrawn` is set;
 *   - regions, remote regions and peers outlive the operations that use them (use counts). */
#include "lane.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#define COOKIE_BITS 20
#define COOKIE_MASK ((1u << COOKIE_BITS) - 1u)
#define LATE_BYTES ((uint64_t)64 << 10) /* once a turn is overdue, only smaller operations run inside the call */
#define RECENT_LEAST ((uint64_t)64 << 10)
#define HEAD_BYTES ((uint64_t)512 << 10) /* moved by the caller while the native thread wakes up */
#define ROUND_BYTES ((uint64_t)4 << 20) /* the native thread serves one operation this long before it looks at others */

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
        uint32_t *generations = realloc(lane->op_generation, next * sizeof *generations);
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

static at_op *op_find(at_lane *lane, int64_t cookie) {
    uint32_t index = (uint32_t)cookie & COOKIE_MASK;
    if (cookie < AT_FIRST_COOKIE || index >= lane->op_count) return NULL;
    at_op *op = lane->ops[index];
    return op != NULL && op->cookie == cookie ? op : NULL;
}

/* Everything is retired: give back what was lent and tell the loop. */
static void op_end(at_op *op) {
    at_lane *lane = op->peer->lane;
    at_peer *peer = op->peer;
    uint32_t index = (uint32_t)op->cookie & COOKIE_MASK;
    int whole = op->landed == op->units && (op->imm < 0 || op->counted == op->landed);
    int status = whole ? AT_OK : op->status != AT_OK ? op->status : AT_ECANCELED;
    lane->ops[index] = NULL;
    lane->op_free[lane->op_free_count++] = index;
    lane->stats.ops_ended++;
    lane->stats.pending_ops--;
    peer->queued_ops--;
    peer->queued_bytes -= op->nbytes * op->units;
    at_event_push(lane, AT_EV_OP, (uint64_t)op->cookie, status, op->landed);
    if (op->region != NULL) at_region_release(lane, op->region_index);
    if (op->remote != NULL) at_remote_release(lane, op->remote_index);
    free(op->table);
    free(op);
    at_peer_release(peer);
}

static void dequeue(at_op *op) {
    if (!op->queued) return;
    at_peer *peer = op->peer;
    at_op **link = &peer->head, *previous = NULL;
    while (*link != op) {
        previous = *link;
        link = &(*link)->next;
    }
    *link = op->next;
    if (peer->tail == op) peer->tail = previous;
    op->next = NULL;
    op->queued = 0;
}

static int op_over(const at_op *op) { return op->posted == 0 && !op->running; }

/* Stop an operation: nothing more of it is posted; it ends now or when the rest has retired. */
static void op_stop(at_op *op, int status) {
    if (op->status == AT_OK) op->status = status;
    atomic_store(&op->withdrawn, 1);
    dequeue(op);
    if (op_over(op)) op_end(op);
}

/* ---- asynchronous ports ---- */

void at_refill(at_peer *peer) {
    at_lane *lane = peer->lane;
    const at_port *port = peer->port;
    while (port->window != 0 && peer->head != NULL && peer->posted < port->window) {
        at_op *op = peer->head;
        int rc = port->post(peer, op, op->cursor);
        if (rc == AT_EAGAIN) {
            lane->stats.refused_posts++;
            return; /* again at the next completion or poll */
        }
        if (rc != AT_OK) {
            op_stop(op, rc);
            continue;
        }
        op->posted++;
        peer->posted++;
        op->cursor++;
        if (op->cursor == op->units) dequeue(op);
    }
}

void at_op_complete(at_op *op, uint64_t units, int status) {
    at_peer *peer = op->peer;
    op->posted--;
    peer->posted--;
    op->landed += units;
    op->counted += units; /* the provider carries the immediate with the bytes */
    peer->lane->stats.units_written += units;
    peer->lane->stats.bytes_written += units * op->nbytes;
    peer->users++; /* the operation may have been its last user */
    if (status != AT_OK) {
        op_stop(op, status);
    } else if (op_over(op) && (op->cursor == op->units || atomic_load(&op->withdrawn))) {
        op_end(op);
    }
    at_refill(peer);
    at_peer_release(peer);
}

/* ---- synchronous ports ---- */

/* Publish the immediates of what has landed. Pages carry one each; a write or signal one in all. */
static int publish(at_op *op) {
    if (op->imm < 0 || op->landed == op->counted) return AT_OK;
    int rc = op->peer->port->count(op->peer, (uint32_t)op->imm, op->landed - op->counted);
    if (rc == AT_OK) op->counted = op->landed;
    return rc;
}

static int moved_all(const at_op *op) { return op->landed == op->units; }

/* After some of it was moved without the lock: withdrawn, finished, or to be gone on with? Returns 1 when it has ended. */
static int move_over(at_lane *lane, at_op *op, int rc, int oserror) {
    at_peer *peer = op->peer;
    if (oserror != 0) lane->oserror = oserror;
    int published = publish(op);
    op->running = 0;
    if (rc != AT_OK || atomic_load(&op->withdrawn) || peer->status != AT_OK) {
        op_stop(op, rc != AT_OK ? rc : peer->status);
        return 1;
    }
    if (!moved_all(op) || published == AT_EAGAIN) return 0;
    dequeue(op);
    lane->stats.units_written += op->units;
    lane->stats.bytes_written += op->units * op->nbytes;
    op_end(op);
    return 1;
}

/* One operation of the queue, for at most ROUND_BYTES. Enters and leaves with the lock. */
static void move_one(at_lane *lane, at_peer *peer, at_op *op) {
    op->running = 1;
    int rc = AT_OK, oserror = 0;
    uint64_t budget = ROUND_BYTES;
    while (rc == AT_OK && budget > 0 && !moved_all(op) && !atomic_load(&op->withdrawn) && peer->status == AT_OK) {
        at_unlock(lane);
        rc = peer->port->move(peer, op, AT_CHUNK * 4, 1, &oserror);
        at_lock(lane);
        lane->stats.thread_chunks++;
        budget -= AT_CHUNK * 4;
    }
    if (!move_over(lane, op, rc, oserror) && peer->head != peer->tail) { /* fair: behind the others of this peer */
        dequeue(op);
        peer->tail->next = op;
        peer->tail = op;
        op->queued = 1;
    }
}

void at_move_queued(at_lane *lane) {
    for (uint32_t k = 0; k < lane->peer_count; k++) {
        at_peer *peer = lane->peers[(lane->thread_turn + k) % lane->peer_count];
        if (peer == NULL || peer->port->window != 0 || peer->head == NULL || peer->head->running) continue;
        peer->users++;
        move_one(lane, peer, peer->head);
        at_peer_release(peer);
    }
    lane->thread_turn++;
}

/* Waking the native thread takes as long as copying some hundred KiB: the caller moves those meanwhile. */
static void head_start(at_lane *lane, at_op *op) {
    if (op->peer->head != op || lane->turn_due || op->nbytes * op->units < 2 * HEAD_BYTES) return;
    int oserror = 0;
    op->running = lane->head_start = 1;
    at_unlock(lane);
    int rc = op->peer->port->move(op->peer, op, HEAD_BYTES, 0, &oserror);
    at_lock(lane);
    lane->head_start = 0;
    at_count_turn(lane, HEAD_BYTES);
    (void)move_over(lane, op, rc, oserror);
}

/* ---- submission ---- */

void at_count_turn(at_lane *lane, uint64_t nbytes) {
    lane->turn_bytes += nbytes;
    if (++lane->turn_ops % 16 != 0 && lane->turn_bytes < AT_CHUNK) return;
    lane->turn_bytes = 0;
    if (at_now() - lane->turn_start > lane->config.turn_ns) lane->turn_due = 1;
}

/* Copy a finished description into an operation of its own and queue it. */
static int64_t op_keep(at_lane *lane, const at_op *template) {
    at_peer *peer = template->peer;
    uint64_t nbytes = template->nbytes * template->units;
    if (peer->queued_ops >= lane->config.max_ops || nbytes > lane->config.max_bytes - peer->queued_bytes) return AT_EBUSY;
    at_op *op = malloc(sizeof *op);
    if (op == NULL) return AT_ENOMEM;
    *op = *template;
    if (op->kind == AT_OP_PAGES) {
        op->table = malloc((size_t)op->units * 2 * sizeof *op->table);
        if (op->table == NULL) {
            free(op);
            return AT_ENOMEM;
        }
        memcpy(op->table, template->src_pages, (size_t)op->units * sizeof *op->table);
        memcpy(op->table + op->units, template->dst_pages, (size_t)op->units * sizeof *op->table);
        op->src_pages = op->table;
        op->dst_pages = op->table + op->units;
    }
    uint32_t index;
    int rc = op_slot(lane, &index);
    if (rc != AT_OK) {
        free(op->table);
        free(op);
        return rc;
    }
    op->cookie = (int64_t)(((uint64_t)(++lane->op_generation[index]) << COOKIE_BITS) | index);
    lane->ops[index] = op;
    if (op->region != NULL) op->region->users++;
    if (op->remote != NULL) op->remote->users++;
    peer->users++;
    peer->queued_ops++;
    peer->queued_bytes += nbytes;
    if (peer->tail != NULL)
        peer->tail->next = op;
    else
        peer->head = op;
    peer->tail = op;
    op->queued = 1;
    lane->stats.ops_queued++;
    lane->stats.pending_ops++;
    return op->cookie;
}

/* Fresh places add up; a place that is written again does not: only the former outgrow the caches. */
static void note_footprint(at_lane *lane, at_op *op, uint64_t nbytes) {
    op->footprint = nbytes;
    if (nbytes < RECENT_LEAST) return;
    uint64_t where = op->remote->va + op->dst_offset;
    if (op->kind == AT_OP_PAGES) where += (uint64_t)op->dst_pages[0] * op->dst_stride;
    uint32_t i = 0;
    while (i < AT_RECENT && lane->recent[i].where != where) i++;
    if (i == AT_RECENT) i = lane->recent_next++ % AT_RECENT;
    lane->recent_bytes += nbytes - lane->recent[i].nbytes;
    lane->recent[i].where = where;
    lane->recent[i].nbytes = nbytes;
    op->footprint = lane->recent_bytes;
}

/* The description in *op has passed every check. */
static int64_t submit(at_lane *lane, at_op *op) {
    at_peer *peer = op->peer;
    const at_port *port = peer->port;
    uint64_t nbytes = op->nbytes * op->units;
    if (op->units == 0) return lane->turn_due ? AT_DUE : AT_OK;
    if (op->remote != NULL) note_footprint(lane, op, nbytes);
    if (port->window == 0) {
        int here = nbytes <= lane->config.inline_bytes && (!lane->turn_due || nbytes <= LATE_BYTES);
        if (here || (lane->config.flags & AT_LANE_NO_THREAD)) {
            int oserror = 0, rc = AT_OK;
            while (rc == AT_OK && !moved_all(op)) rc = port->move(peer, op, nbytes, 0, &oserror);
            if (rc == AT_OK) rc = publish(op);
            else if (op->landed != 0) (void)publish(op);
            at_count_turn(lane, nbytes);
            if (rc == AT_OK) {
                lane->stats.ops_inline++;
                lane->stats.units_written += op->units;
                lane->stats.bytes_written += nbytes;
                return lane->turn_due ? AT_DUE : AT_OK;
            }
            if (rc != AT_EAGAIN) {
                if (oserror != 0) lane->oserror = oserror;
                return rc;
            }
        }
    }
    int64_t cookie = op_keep(lane, op);
    if (cookie < 0) return cookie;
    if (port->window == 0) {
        at_thread_kick(lane);
        if (lane->thread_started) head_start(lane, op_find(lane, cookie));
    } else {
        at_refill(peer);
    }
    return cookie;
}

static int64_t finish(at_lane *lane, at_peer *peer, int64_t result) {
    void (*progress)(at_lane *) = result >= 0 && peer->port->window != 0 ? peer->port->progress : NULL;
    at_unlock(lane);
    if (progress != NULL) progress(lane);
    return result;
}

static int resolve(at_lane *lane, at_op *op, int64_t remote_id, int64_t region_id, int64_t imm) {
    if (imm >= 0 && imm > (int64_t)UINT32_MAX) return AT_EIMM;
    at_region *region = at_region_use(lane, region_id);
    if (region == NULL) return AT_ECLOSED;
    at_remote *remote = at_remote_use(lane, remote_id);
    if (remote == NULL) return AT_ESTALE;
    if (remote->peer->status != AT_OK) return AT_EPEER;
    if (!(remote->access & AT_ACCESS_WRITE)) return AT_EGRANT;
    if (atomic_load_explicit(remote->word, memory_order_acquire) != remote->epoch) return AT_ESTALE;
    op->peer = remote->peer;
    op->remote = remote;
    op->region = region;
    op->remote_index = (uint32_t)remote_id;
    op->region_index = (uint32_t)region_id;
    op->imm = imm;
    return AT_OK;
}

int64_t at_write(at_lane *lane, int64_t remote_id, uint64_t dst_offset, int64_t region_id, uint64_t src_offset,
                 uint64_t nbytes, int64_t imm) {
    int64_t result = at_check_owner(lane);
    if (result != AT_OK) return result;
    at_lock(lane);
    at_op op = {.kind = AT_OP_WRITE, .dst_offset = dst_offset, .nbytes = nbytes, .units = 1};
    result = resolve(lane, &op, remote_id, region_id, imm);
    if (result == AT_OK) {
        if (src_offset > op.region->nbytes || nbytes > op.region->nbytes - src_offset) result = AT_ESRC;
        else if (dst_offset > op.remote->nbytes || nbytes > op.remote->nbytes - dst_offset) result = AT_EDST;
    }
    if (result != AT_OK) {
        at_unlock(lane);
        return result;
    }
    op.src = op.region->base + src_offset;
    return finish(lane, op.peer, submit(lane, &op));
}

/* The largest legal index for pages at offset + index * stride inside `nbytes`; -1 when not even page 0 fits. */
static int64_t last_page(uint64_t nbytes, uint64_t offset, uint64_t page, uint64_t stride) {
    if (offset > nbytes || page > nbytes - offset) return -1;
    if (stride == 0) return INT64_MAX;
    uint64_t most = (nbytes - offset - page) / stride;
    return most > (uint64_t)INT64_MAX ? INT64_MAX : (int64_t)most;
}

/* AT_OK when all of pages[0..n) lie in [0, last]. One vectorisable pass (a negative index is huge when read unsigned). */
static int check_pages(at_lane *lane, const int64_t *pages, uint64_t n, int64_t last, int status) {
    uint64_t bad = 0;
    for (uint64_t i = 0; i < n; i++) bad |= (uint64_t)(last < 0) | (uint64_t)((uint64_t)pages[i] > (uint64_t)last);
    if (bad == 0) return AT_OK;
    for (uint64_t i = 0; i < n; i++) {
        if (last < 0 || (uint64_t)pages[i] > (uint64_t)last) {
            lane->detail = pages[i];
            break;
        }
    }
    return status;
}

int64_t at_write_pages(at_lane *lane, int64_t remote_id, int64_t region_id, const int64_t *src_pages,
                       const int64_t *dst_pages, uint64_t n, uint64_t page_bytes, uint64_t src_stride, uint64_t dst_stride,
                       uint64_t src_offset, uint64_t dst_offset, int64_t imm) {
    int64_t result = at_check_owner(lane);
    if (result != AT_OK) return result;
    if (page_bytes == 0 || page_bytes > (uint64_t)INT64_MAX || dst_stride < page_bytes ||
        (src_stride != 0 && src_stride < page_bytes) || n > (uint64_t)INT64_MAX / page_bytes)
        return AT_ESIZE;
    at_lock(lane);
    at_op op = {.kind = AT_OP_PAGES, .dst_offset = dst_offset, .nbytes = page_bytes, .units = n, .src_stride = src_stride,
                .dst_stride = dst_stride, .src_pages = src_pages, .dst_pages = dst_pages};
    result = resolve(lane, &op, remote_id, region_id, imm);
    if (result == AT_OK)
        result = check_pages(lane, src_pages, n, last_page(op.region->nbytes, src_offset, page_bytes, src_stride),
                             AT_EINDEX_SRC);
    if (result == AT_OK)
        result = check_pages(lane, dst_pages, n, last_page(op.remote->nbytes, dst_offset, page_bytes, dst_stride),
                             AT_EINDEX_DST);
    if (result != AT_OK) {
        at_unlock(lane);
        return result;
    }
    op.src = op.region->base + src_offset;
    return finish(lane, op.peer, submit(lane, &op));
}

int64_t at_signal(at_lane *lane, int64_t peer_id, int64_t imm) {
    int64_t result = at_check_owner(lane);
    if (result != AT_OK) return result;
    if (imm < 0 || imm > (int64_t)UINT32_MAX) return AT_EIMM;
    at_lock(lane);
    at_peer *peer = at_peer_find(lane, peer_id);
    if (peer == NULL || peer->status != AT_OK) {
        at_unlock(lane);
        return AT_EPEER;
    }
    at_op op = {.kind = AT_OP_SIGNAL, .peer = peer, .imm = imm, .units = 1};
    return finish(lane, peer, submit(lane, &op));
}

int64_t at_cancel(at_lane *lane, int64_t cookie, int status) {
    int64_t result = AT_EUNKNOWN;
    at_lock(lane);
    at_op *op = op_find(lane, cookie);
    if (op != NULL) {
        result = op->posted + (op->running ? 1 : 0);
        op_stop(op, status);
    }
    at_unlock(lane);
    return result;
}

int64_t at_progress(at_lane *lane, int64_t cookie) {
    at_lock(lane);
    at_op *op = op_find(lane, cookie);
    int64_t result = AT_EUNKNOWN;
    if (op != NULL) {
        int whole_bytes = op->kind == AT_OP_WRITE && op->peer->port->window == 0; /* cursor counts bytes there */
        result = (int64_t)(whole_bytes ? op->cursor : op->landed * op->nbytes);
    }
    at_unlock(lane);
    return result;
}

void at_peer_end(at_peer *peer, int status) {
    if (peer->status == AT_OK) peer->status = status;
    peer->users++;
    while (peer->head != NULL) op_stop(peer->head, status);
    if (peer->port->fence != NULL) peer->port->fence(peer); /* what is posted retires now and can touch nothing more */
    at_peer_release(peer);
}
