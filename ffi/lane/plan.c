/* Plans: operations that are checked once and posted many times (as the work-request templates of arXiv 2510.27656), and scatters,
 * which are plans posted once.
 *
 * A plan holds ids, not pointers. Posting looks each of them up again, which costs a few loads: the region may have been closed,
 * the remote region revoked, the peer lost since, and then the post is refused as the plain call would be. Bounds are not
 * checked again: the regions that ids name never change. */
#include "copiers.h"
#include "lane.h"

#include <stdlib.h>
#include <string.h>

struct at_plan {
    uint64_t count;
    int scatter;      /* its targets end as one, with a result each */
    int64_t *tables;  /* of pages */
    uint64_t places;  /* of remote memory, which each post names; its orders have numbers of places for remotes then */
    uint64_t *needs;  /* bytes of each place that the orders use; NULL: the orders name the remotes */
    at_order orders[];
};

/* Some bytes of a local region, and where parts of it go: the arguments of at_scatter. */
typedef struct {
    int64_t region;
    uint64_t offset, nbytes;
} at_source;

typedef struct {
    uint64_t count;
    const int64_t *remotes;
    const uint64_t *bases, *limits;
    const int64_t *local_offsets, *nbytes, *remote_offsets;
} at_targets;

/* Parts of two tables of pages, and where each goes: the arguments of at_scatter_pages. */
typedef struct {
    at_source src;
    uint64_t count, rows, page;
    const int64_t *remotes;
    const uint64_t *bases, *limits;
    const at_page_target *targets;
    const int64_t *local_pages, *remote_pages;
} at_rows;

/* Where the places of a plan are, for one post. */
typedef struct {
    const int64_t *remotes;
    const uint64_t *bases;
} at_places;

/* Whether [offset, offset + n) lies in `nbytes`; what is negative is too large here. */
static int lies_in(int64_t offset, int64_t n, uint64_t nbytes) {
    return (uint64_t)n <= nbytes && (uint64_t)offset <= nbytes - (uint64_t)n;
}

static at_plan *plan_new(uint64_t count, int scatter) {
    if (count > UINT32_MAX) return NULL;
    at_plan *plan = calloc(1, sizeof *plan + (size_t)count * sizeof plan->orders[0]);
    if (plan != NULL) {
        plan->count = count;
        plan->scatter = scatter;
    }
    return plan;
}

/* Copy the tables into the plan, so that they cannot change any more. */
static int copy_tables(at_plan *plan, const int64_t *local_pages, const int64_t *remote_pages, uint64_t n) {
    plan->tables = malloc((size_t)n * 2 * sizeof *plan->tables + 1);
    if (plan->tables == NULL) return AT_ENOMEM;
    if (n != 0) memcpy(plan->tables, local_pages, (size_t)n * sizeof *plan->tables);
    if (n != 0) memcpy(plan->tables + n, remote_pages, (size_t)n * sizeof *plan->tables);
    return AT_OK;
}

/* Check every order of a fresh plan; it goes when one is refused. */
static at_plan *plan_checked(at_lane *lane, at_plan *plan, int *status) {
    *status = plan == NULL ? AT_ENOMEM : lane == NULL ? AT_ESHUT : AT_OK;
    if (*status == AT_OK) {
        at_lock(lane);
        for (uint64_t i = 0; i < plan->count && *status == AT_OK; i++) {
            at_op op;
            *status = at_resolve(lane, &plan->orders[i], 0, &op);
            if (*status == AT_OK) *status = at_check(lane, &plan->orders[i], &op, NULL);
            if (*status != AT_OK && plan->scatter) lane->detail = (int64_t)i;
        }
        at_unlock(lane);
    }
    if (*status == AT_OK) return plan;
    at_plan_free(plan);
    return NULL;
}

at_plan *at_plan_copy(at_lane *lane, int read, int64_t remote, uint64_t remote_offset, int64_t region, uint64_t local_offset,
                      uint64_t nbytes, int *status) {
    at_plan *plan = plan_new(1, 0);
    if (plan != NULL)
        plan->orders[0] = (at_order){.kind = read ? AT_OP_READ : AT_OP_WRITE, .remote = remote, .region = region,
                                     .local_offset = local_offset, .remote_offset = remote_offset, .nbytes = nbytes, .units = 1,
                                     .imm = -1};
    return plan_checked(lane, plan, status);
}

at_plan *at_plan_pages(at_lane *lane, int64_t remote, int64_t region, const int64_t *local_pages, const int64_t *remote_pages,
                       uint64_t n, uint64_t page_bytes, uint64_t local_stride, uint64_t remote_stride, uint64_t local_offset,
                       uint64_t remote_offset, int *status) {
    *status = AT_ESIZE;
    if (!at_pages_make_sense(n, page_bytes, local_stride, remote_stride)) return NULL;
    at_plan *plan = plan_new(1, 0);
    if (plan != NULL && copy_tables(plan, local_pages, remote_pages, n) != AT_OK) {
        free(plan);
        plan = NULL;
    }
    if (plan != NULL) {
        plan->orders[0] = (at_order){.kind = AT_OP_PAGES, .remote = remote, .region = region, .local_offset = local_offset,
                                     .remote_offset = remote_offset, .nbytes = page_bytes, .units = n,
                                     .local_stride = local_stride, .remote_stride = remote_stride, .local_pages = plan->tables,
                                     .remote_pages = plan->tables + n, .imm = -1};
    }
    return plan_checked(lane, plan, status);
}

at_plan *at_plan_scatter(at_lane *lane, int64_t region, uint64_t n, const int64_t *remotes, const uint64_t *local_offsets,
                         const uint64_t *remote_offsets, const uint64_t *nbytes, int *status) {
    at_plan *plan = plan_new(n, 1);
    for (uint64_t i = 0; plan != NULL && i < n; i++)
        plan->orders[i] = (at_order){.kind = AT_OP_WRITE, .remote = remotes[i], .region = region,
                                     .local_offset = local_offsets[i], .remote_offset = remote_offsets[i], .nbytes = nbytes[i],
                                     .units = 1, .imm = -1};
    return plan_checked(lane, plan, status);
}

/* Make the order of what goes to target i. Its pages are checked next. */
static int rows_order(const at_rows *to, uint64_t i, at_order *order) {
    const at_page_target *t = &to->targets[i];
    uint64_t n = (uint64_t)t->count, begin = (uint64_t)t->begin; /* what is negative is too large here */
    if (begin > to->rows || n > to->rows - begin || ((t->local_offset | t->remote_offset | t->local_stride | t->remote_stride) < 0) ||
        !at_pages_make_sense(n, to->page, (uint64_t)t->local_stride, (uint64_t)t->remote_stride))
        return AT_ESIZE;
    *order = (at_order){.kind = AT_OP_PAGES, .remote = to->remotes[i], .region = to->src.region, .nbytes = to->page, .units = n,
                        .local_offset = to->src.offset + (uint64_t)t->local_offset, .remote_offset = to->bases[i] + (uint64_t)t->remote_offset,
                        .local_stride = (uint64_t)t->local_stride, .remote_stride = (uint64_t)t->remote_stride,
                        .local_pages = to->local_pages + begin, .remote_pages = to->remote_pages + begin, .imm = -1};
    return AT_OK;
}

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Its pages lie in the parts of the two regions that the caller named. */
static int check_rows(at_lane *lane, const at_rows *to, uint64_t i, const at_order *order, at_op *op) {
    uint64_t here = least(op->region->nbytes, to->src.offset + to->src.nbytes), there = least(op->remote->nbytes, to->bases[i] + to->limits[i]);
    return at_check_pages(lane, order, op, here, there, NULL);
}

at_plan *at_plan_scatter_pages(at_lane *lane, int64_t region, uint64_t offset, uint64_t nbytes, uint64_t n, const int64_t *remotes,
                               const uint64_t *bases, const uint64_t *limits, const at_page_target *targets, const int64_t *local_pages,
                               const int64_t *remote_pages, uint64_t rows, uint64_t page_bytes, int *status) {
    at_rows to = {.src = {region, offset, nbytes}, .count = n, .rows = rows, .page = page_bytes, .remotes = remotes, .bases = bases,
                  .limits = limits, .targets = targets, .local_pages = local_pages, .remote_pages = remote_pages};
    *status = AT_ESIZE;
    if (page_bytes == 0 || rows > (uint64_t)INT64_MAX / page_bytes || rows > SIZE_MAX / 4 / sizeof *local_pages) return NULL;
    at_plan *plan = plan_new(n, 1);
    if (plan != NULL && copy_tables(plan, local_pages, remote_pages, rows) != AT_OK) {
        free(plan);
        plan = NULL;
    }
    if (plan == NULL || lane == NULL) return plan_checked(lane, plan, status);
    to.local_pages = plan->tables, to.remote_pages = plan->tables + rows;
    int rc = AT_OK;
    at_lock(lane);
    for (uint64_t i = 0; i < n && rc == AT_OK; i++) {
        at_op op;
        rc = rows_order(&to, i, &plan->orders[i]);
        if (rc == AT_OK) rc = at_resolve(lane, &plan->orders[i], 0, &op);
        if (rc == AT_OK) rc = check_rows(lane, &to, i, &plan->orders[i], &op);
        if (rc != AT_OK) lane->detail = (int64_t)i;
    }
    at_unlock(lane);
    *status = rc;
    if (rc == AT_OK) return plan;
    at_plan_free(plan);
    return NULL;
}

at_plan *at_plan_signals(at_lane *lane, uint64_t n, const int64_t *peers, const uint32_t *imms, int *status) {
    at_plan *plan = plan_new(n, 1);
    for (uint64_t i = 0; plan != NULL && i < n; i++)
        plan->orders[i] = (at_order){.kind = AT_OP_SIGNAL, .remote = peers[i], .units = 1, .imm = imms[i]};
    return plan_checked(lane, plan, status);
}

/* Where the rows of a plan of places come from: the first arguments of at_plan_places. */
typedef struct {
    uint64_t count;
    const int64_t *regions;
    const uint64_t *bases, *limits;
} at_sources;

/* What one row says. It is in bounds of its source; what it needs of its place is compared at each post. */
static int place_order(at_lane *lane, const at_sources *from, const at_place_row *row, uint64_t places, at_order *order) {
    uint64_t source = (uint64_t)row->source; /* what is negative is too large here */
    if (source >= from->count || (uint64_t)row->place >= places) return AT_ESIZE;
    if (!lies_in(row->local_offset, row->nbytes, from->limits[source])) return AT_ESRC;
    if (row->remote_offset < 0 || row->nbytes > INT64_MAX - row->remote_offset) return AT_EDST;
    const at_region *region = at_region_use(lane, from->regions[source]);
    uint64_t offset = from->bases[source] + (uint64_t)row->local_offset, n = (uint64_t)row->nbytes;
    if (region == NULL) return AT_ECLOSED;
    if (offset > region->nbytes || n > region->nbytes - offset) return AT_ESRC;
    *order = (at_order){.kind = AT_OP_WRITE, .remote = row->place, .region = from->regions[source], .local_offset = offset,
                        .remote_offset = (uint64_t)row->remote_offset, .nbytes = n, .units = 1, .imm = -1};
    return AT_OK;
}

at_plan *at_plan_places(at_lane *lane, uint64_t sources, const int64_t *regions, const uint64_t *bases, const uint64_t *limits, uint64_t n,
                        const at_place_row *rows, uint64_t places, int *status) {
    *status = lane == NULL ? AT_ESHUT : places >= UINT32_MAX ? AT_ESIZE : AT_OK;
    if (*status != AT_OK) return NULL;
    at_plan *plan = plan_new(n, 1);
    if (plan != NULL) plan->needs = calloc((size_t)places + 1, sizeof *plan->needs);
    if (plan == NULL || plan->needs == NULL) {
        at_plan_free(plan);
        *status = AT_ENOMEM;
        return NULL;
    }
    plan->places = places;
    at_sources from = {.count = sources, .regions = regions, .bases = bases, .limits = limits};
    at_lock(lane);
    for (uint64_t i = 0; i < n && *status == AT_OK; i++) {
        at_order *order = &plan->orders[i];
        *status = place_order(lane, &from, &rows[i], places, order);
        if (*status != AT_OK) lane->detail = (int64_t)i;
        else if (plan->needs[order->remote] < order->remote_offset + order->nbytes) plan->needs[order->remote] = order->remote_offset + order->nbytes;
    }
    at_unlock(lane);
    if (*status == AT_OK) return plan;
    at_plan_free(plan);
    return NULL;
}

void at_plan_free(at_plan *plan) {
    if (plan != NULL) free(plan->tables);
    if (plan != NULL) free(plan->needs);
    free(plan);
}

/* ---- posting ---- */

static int resolve_order(at_lane *lane, const at_plan *plan, const at_places *at, uint64_t i, int64_t imm, at_op *op) {
    if (at == NULL) return at_resolve(lane, &plan->orders[i], imm, op);
    at_order order = plan->orders[i];
    int64_t place = order.remote;
    order.remote = at->remotes[place];
    order.remote_offset += at->bases[place];
    return at_resolve(lane, &order, imm, op);
}

/* One target that could not be moved at once, or failed: the batch knows of it from now on. Returns the batch's cookie, or AT_E*. */
static int64_t join_batch(at_lane *lane, int64_t parent, uint64_t count, uint32_t child, at_op *op, int rc) {
    if (parent == 0 && (parent = at_op_new_batch(lane, (uint32_t)count)) < 0) {
        lane->detail = (int64_t)child;
        return parent;
    }
    const at_op *whole = at_op_find(lane, parent);
    if (whole == NULL || whole->batch == NULL) return AT_EUNKNOWN; /* it is open while it is posted: there is always one */
    at_batch *batch = whole->batch;
    batch->open++;
    if (rc == AT_EAGAIN) {
        op->parent = parent;
        op->child = child;
        int64_t cookie = at_op_keep(lane, op);
        if (cookie >= AT_FIRST_COOKIE) {
            batch->children[child] = cookie;
            if (op->risk != AT_RISK_NONE) at_copiers_call(lane);
            else if (op->peer->port->window != 0) at_refill(op->peer);
            return parent;
        }
        rc = (int)cookie;
    }
    at_batch_ended(lane, parent, child, rc, 0);
    return parent;
}

#define MOST_KEPT 1024u /* targets that are resolved once; of more, none is kept */

/* Room for the operations of a scatter while it is posted. It stays the lane's: the next step's scatter is as large. */
static at_op *kept_for(at_lane *lane, uint64_t count) {
    uint32_t need = count < MOST_KEPT ? (uint32_t)count : MOST_KEPT;
    if (need > lane->kept_capacity) {
        at_op *more = realloc(lane->kept, need * sizeof *more);
        if (more == NULL) return NULL;
        lane->kept = more;
        lane->kept_capacity = need;
    }
    return lane->kept;
}

/* The targets from i on that are moved inside the call, and together: *n of them. AT_HERE when that is all that can be said now; else what
 * became of the one behind them. */
static int group(at_lane *lane, at_op *ops, uint64_t count, const at_plan *plan, const at_places *at, int64_t imm, uint64_t i, uint32_t *n,
                 uint64_t *nbytes) {
    uint64_t bytes = 0, most = MOST_KEPT - i % MOST_KEPT < AT_TOGETHER ? MOST_KEPT - i % MOST_KEPT : AT_TOGETHER;
    for (; i < count && *n < most && bytes < AT_CHUNK; i++, ++*n) {
        at_op *op = &ops[i % MOST_KEPT];
        int rc = count <= MOST_KEPT ? AT_OK : resolve_order(lane, plan, at, i, imm, op);
        if (rc == AT_OK) rc = at_submit_here(lane, op);
        if (rc != AT_HERE) return rc;
        bytes += op->nbytes * op->units;
        *nbytes = bytes;
    }
    return AT_HERE;
}

/* Post what has been resolved: the op of target i is ops[i % MOST_KEPT], and where there are more than those, the plan says it again. */
static int64_t post_targets(at_lane *lane, at_op *ops, uint64_t count, const at_plan *plan, const at_places *at, int64_t imm) {
    int64_t parent = 0;
    int queued = 0;
    uint64_t landed = 0;
    for (uint64_t i = 0; i < count && parent >= 0;) {
        uint32_t n = 0;
        uint64_t bytes = 0;
        int rc = group(lane, ops, count, plan, at, imm, i, &n, &bytes);
        if (n != 0 && at_move_here(lane, &ops[i % MOST_KEPT], n)) { /* the usual case: no look at each */
            landed += bytes;
            i += n;
            n = 0;
        }
        uint64_t end = i + n + (rc != AT_HERE);
        for (uint64_t k = i; k < end && parent >= 0; k++) {
            at_op *op = &ops[k % MOST_KEPT];
            int result = k < i + n ? op->status : rc;
            op->status = AT_OK;
            if (result == AT_OK) {
                landed += op->nbytes * op->units;
                continue;
            }
            queued |= result == AT_EAGAIN && op->peer->port->window == 0;
            parent = join_batch(lane, parent, count, (uint32_t)k, op, result);
        }
        i = end;
    }
    if (parent < 0) return parent; /* no memory for the first that did not land: the targets before it have */
    if (parent == 0) return lane->turn_due ? AT_DUE : AT_OK;
    if (queued) at_wake_mover(lane, 0);
    at_batch_ended(lane, parent, (uint32_t)count, AT_OK, landed);
    return parent;
}

static int64_t post_scatter(at_lane *lane, const at_plan *plan, const at_places *at, int64_t imm) {
    at_op *ops = kept_for(lane, plan->count);
    if (ops == NULL && plan->count != 0) return AT_ENOMEM;
    for (uint64_t i = 0; i < plan->count; i++) { /* all or nothing, as far as can be known beforehand */
        int rc = resolve_order(lane, plan, at, i, imm, &ops[i % MOST_KEPT]);
        if (rc != AT_OK) {
            lane->detail = (int64_t)i;
            return rc;
        }
    }
    return post_targets(lane, ops, plan->count, plan, at, imm);
}

/* The caller's arrays may be changed by other threads meanwhile: each number is read once. */
static int64_t once(const int64_t *at) { return *(const volatile int64_t *)at; }

static int resolve_target(at_lane *lane, const at_source *src, const at_targets *to, uint64_t i, int64_t imm, at_op *op) {
    int64_t from = once(&to->local_offsets[i]), n = once(&to->nbytes[i]);
    int64_t at = to->remote_offsets == NULL ? 0 : once(&to->remote_offsets[i]);
    if (!lies_in(from, n, src->nbytes)) return AT_ESRC;
    if (!lies_in(at, n, to->limits[i]) || (to->remote_offsets == NULL && (uint64_t)n != to->limits[i])) return AT_EDST;
    at_order order = {.kind = AT_OP_WRITE, .remote = to->remotes[i], .region = src->region,
                      .local_offset = src->offset + (uint64_t)from, .remote_offset = to->bases[i] + (uint64_t)at,
                      .nbytes = (uint64_t)n, .units = 1, .imm = -1};
    int rc = at_resolve(lane, &order, imm, op);
    return rc == AT_OK ? at_check(lane, &order, op, NULL) : rc;
}

static int64_t scatter(at_lane *lane, const at_source *src, const at_targets *to, int64_t imm, uint64_t *total) {
    at_op *ops = kept_for(lane, to->count);
    if (ops == NULL && to->count != 0) return AT_ENOMEM;
    for (uint64_t i = 0; i < to->count; i++) {
        int rc = resolve_target(lane, src, to, i, imm, &ops[i]);
        if (rc != AT_OK) {
            lane->detail = (int64_t)i;
            return rc;
        }
        *total += ops[i].nbytes;
    }
    return post_targets(lane, ops, to->count, NULL, NULL, imm);
}

int64_t at_scatter(at_lane *lane, int64_t region, uint64_t offset, uint64_t nbytes, uint64_t n, const int64_t *remotes,
                   const uint64_t *bases, const uint64_t *limits, const int64_t *local_offsets, const int64_t *sizes,
                   const int64_t *remote_offsets, int64_t imm, uint64_t *total) {
    *total = 0;
    int64_t result = at_check_owner(lane);
    if (result != AT_OK) return result;
    if (n > MOST_KEPT) return AT_ESIZE;
    at_source src = {.region = region, .offset = offset, .nbytes = nbytes};
    at_targets to = {.count = n, .remotes = remotes, .bases = bases, .limits = limits, .local_offsets = local_offsets,
                     .nbytes = sizes, .remote_offsets = remote_offsets};
    at_lock(lane);
    result = scatter(lane, &src, &to, imm, total);
    return at_unlock_and_progress(lane, result);
}

static int64_t scatter_pages(at_lane *lane, const at_rows *to, const at_tables *tables, int64_t imm, uint64_t *total) {
    at_op *ops = kept_for(lane, to->count);
    if (ops == NULL && to->count != 0) return AT_ENOMEM;
    at_rows own = *to;
    own.local_pages = tables->pages, own.remote_pages = tables->pages + to->rows;
    if (to->rows != 0) { /* in one go: parts of several targets may overlap, and none may change after its check */
        memcpy(tables->pages, to->local_pages, (size_t)to->rows * sizeof *tables->pages);
        memcpy(tables->pages + to->rows, to->remote_pages, (size_t)to->rows * sizeof *tables->pages);
    }
    for (uint64_t i = 0; i < to->count; i++) {
        at_order order;
        int rc = rows_order(&own, i, &order);
        if (rc == AT_OK) rc = at_resolve(lane, &order, imm, &ops[i]);
        if (rc == AT_OK) rc = check_rows(lane, &own, i, &order, &ops[i]);
        if (rc != AT_OK) {
            lane->detail = (int64_t)i;
            return rc;
        }
        *total += order.nbytes * order.units;
    }
    return post_targets(lane, ops, to->count, NULL, NULL, imm);
}

int64_t at_scatter_pages(at_lane *lane, int64_t region, uint64_t offset, uint64_t nbytes, uint64_t n, const int64_t *remotes,
                         const uint64_t *bases, const uint64_t *limits, const at_page_target *targets, const int64_t *local_pages,
                         const int64_t *remote_pages, uint64_t rows, uint64_t page_bytes, int64_t imm, uint64_t *total) {
    *total = 0;
    int64_t result = at_check_owner(lane);
    if (result != AT_OK) return result;
    if (n > MOST_KEPT || page_bytes == 0 || rows > (uint64_t)INT64_MAX / page_bytes) return AT_ESIZE;
    at_rows to = {.src = {region, offset, nbytes}, .count = n, .rows = rows, .page = page_bytes, .remotes = remotes, .bases = bases,
                  .limits = limits, .targets = targets, .local_pages = local_pages, .remote_pages = remote_pages};
    at_tables tables;
    at_lock(lane);
    result = at_tables_take(lane, rows, &tables);
    if (result == AT_OK) result = scatter_pages(lane, &to, &tables, imm, total);
    at_tables_give(lane, &tables);
    return at_unlock_and_progress(lane, result);
}

int64_t at_plan_post(at_lane *lane, const at_plan *plan, int64_t imm) {
    int64_t result = at_check_owner(lane);
    if (result != AT_OK) return result;
    if (plan == NULL || plan->needs != NULL) return AT_EUNKNOWN; /* not resolved yet, or it does not say where it goes */
    at_lock(lane);
    if (plan->scatter) {
        result = post_scatter(lane, plan, NULL, imm);
    } else {
        at_op op;
        result = at_resolve(lane, &plan->orders[0], imm, &op);
        if (result == AT_OK) return at_submit_last(lane, &op);
    }
    return at_unlock_and_progress(lane, result);
}

int64_t at_plan_post_places(at_lane *lane, const at_plan *plan, uint64_t places, const int64_t *remotes, const uint64_t *bases,
                            const uint64_t *limits, int64_t imm) {
    int64_t result = at_check_owner(lane);
    if (result != AT_OK) return result;
    if (plan == NULL || plan->needs == NULL || plan->places != places) return AT_EUNKNOWN;
    at_lock(lane);
    for (uint64_t k = 0; k < places && result == AT_OK; k++) {
        const at_remote *remote = at_remote_use(lane, remotes[k]);
        lane->detail = -1 - (int64_t)k; /* of a place and no target */
        if (remote == NULL) result = AT_ESTALE;
        else if (plan->needs[k] > limits[k] || bases[k] > remote->nbytes || limits[k] > remote->nbytes - bases[k]) result = AT_EDST;
    }
    at_places at = {.remotes = remotes, .bases = bases};
    if (result == AT_OK) result = post_scatter(lane, plan, &at, imm);
    return at_unlock_and_progress(lane, result);
}

int64_t at_thread_post(at_lane *lane, const at_plan *plan, int64_t imm) {
    int64_t result = at_check_process(lane);
    if (result != AT_OK) return result;
    at_op op;
    at_lock(lane);
    result = at_resolve(lane, &plan->orders[0], imm, &op);
    op.detached = AT_DETACHED;
    if (result == AT_OK) result = at_submit(lane, &op);
    return at_unlock_and_progress(lane, result);
}
