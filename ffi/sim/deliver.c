/* Deliveries, and the faults that strike them. */
#include "sim/sim.h"

#include "lane/own.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int stands_still(at_net *net, const at_request *request) {
    const at_member *to = at_member_find(net, request->end->to);
    return request->end->home->dead || request->end->home->held || (to != NULL && to->held && !to->dead);
}

static void park(at_net *net, at_request *request) {
    net->counts.held++;
    request->next = net->parked;
    net->parked = request;
}

at_request *at_take_due(at_net *net, uint64_t until) {
    while (net->heap_count != 0 && net->heap[0]->when <= until) {
        at_request *request = at_heap_pop(net);
        if (stands_still(net, request)) {
            park(net, request);
            continue;
        }
        if (request->when > net->counts.now) net->counts.now = request->when;
        request->next = net->moving;
        net->moving = request;
        request->end->home->pins++;
        return request;
    }
    return NULL;
}

static void stop_moving(at_net *net, at_request *request) {
    at_request **link = &net->moving;
    while (*link != request) link = &(*link)->next;
    *link = request->next;
}

/* The end of a request that was taken out (not by at_take_due): tell its operation. */
void at_request_end(at_net *net, at_request *request, uint64_t units, int status) {
    at_member *home = request->end->home;
    at_lane *lane = home->lane;
    at_op *op = request->op;
    uint64_t counted = request->imm >= 0 ? units : 0;
    free(request);
    at_lock(lane);
    if (status == AT_EIO) lane->oserror = EFAULT;
    at_op_complete(op, units, units * op->nbytes, counted, status);
    at_unlock(lane);
    (void)pthread_mutex_lock(&net->lock);
    at_unpin(net, home);
    at_net_unlock(net, NULL);
}

/* Copy [done, until). The state says for all to see that bytes may be landing. */
static int copy(at_request *request, uint64_t until) {
    if (until <= request->done) return AT_OK;
    uint8_t *local = request->local + request->done, *remote = request->remote + request->done;
    uint8_t *to = request->reads ? local : remote, *from = request->reads ? remote : local;
    if (request->file && at_own_copy(to, from, until - request->done) != 0) /* whose is gone? */
        return at_own_readable(local, until - request->done) ? AT_EIO : AT_EMEMORY;
    if (!request->file) memcpy(to, from, until - request->done);
    request->done = until;
    return AT_OK;
}

static void arrive(at_end *end, at_lane *lane, int64_t imm) {
    if (imm < 0) return;
    at_lock(lane);
    if (!end->gone) at_imm_arrive(end->peer, (uint32_t)imm, 1);
    at_unlock(lane);
}

/* With the net's lock: decide what happens to a request whose time has come. 1: the first half only. */
static int decide(at_net *net, at_request *request, at_end *target, int *status) {
    int fresh = request->state == AT_REQ_WAITING;
    request->state = AT_REQ_MOVING;
    *status = target == NULL || target->home->dead || target->home->stopped ? AT_EPEER : AT_OK;
    if (*status == AT_OK && fresh && request->word != NULL && atomic_load(request->word) != request->epoch) {
        net->counts.stale++;
        *status = AT_ESTALE;
    }
    at_net_mark(net, 4, request->serial, (uint64_t)(unsigned)-*status);
    if (*status != AT_OK) return 0;
    if (fresh && request->n > 1 && at_net_chance(net, net->config.split)) {
        net->counts.split++;
        return 1;
    }
    net->counts.delivered++;
    if (request->serial < request->end->last_serial) net->counts.reordered++;
    else request->end->last_serial = request->serial;
    return 0;
}

/* The rest comes after another delay; until then the write is seen to be going on. Returns 0 when there is no memory for it. */
static int second_half(at_net *net, at_request *request) {
    (void)pthread_mutex_lock(&net->lock);
    uint64_t range = net->config.delay_max > net->config.delay_min ? net->config.delay_max - net->config.delay_min : 0;
    request->when = net->counts.now + net->config.delay_min + (range != 0 ? at_net_draw(net) % (range + 1) : 0);
    stop_moving(net, request);
    request->state = AT_REQ_HALF;
    int kept = at_heap_push(net, request) == AT_OK;
    if (!kept) {
        request->state = AT_REQ_MOVING;
        request->next = net->moving;
        net->moving = request;
    } else {
        at_unpin(net, request->end->home);
    }
    (void)pthread_mutex_unlock(&net->lock);
    return kept;
}

void at_deliver(at_net *net, at_request *request) {
    int status;
    (void)pthread_mutex_lock(&net->lock);
    at_end *target = at_end_find(net, request->end->to, request->end->home->incarnation);
    int half = decide(net, request, target, &status);
    at_member *there = status == AT_OK ? target->home : NULL;
    if (there != NULL) there->pins++, target->pins++;
    (void)pthread_mutex_unlock(&net->lock);
    int64_t imm = request->imm;
    if (status == AT_OK) status = copy(request, half ? request->n / 2 : request->n);
    int later = status == AT_OK && half && second_half(net, request); /* then it is not ours any more */
    if (status == AT_OK && !later) status = copy(request, request->n);
    if (status == AT_OK && !later) {
        arrive(target, there->lane, imm);
        if (request->reads && atomic_load(request->word) != request->epoch) status = AT_ESTALE; /* revoked between its halves */
    }
    if (there != NULL) {
        (void)pthread_mutex_lock(&net->lock);
        int over = --target->pins == 0 && target->gone && target->control == NULL;
        at_unpin(net, there);
        (void)pthread_mutex_unlock(&net->lock);
        if (over) free(target);
    }
    if (later) return;
    (void)pthread_mutex_lock(&net->lock);
    stop_moving(net, request);
    (void)pthread_mutex_unlock(&net->lock);
    at_request_end(net, request, status == AT_OK, status);
}

int at_net_step(at_net *net) {
    (void)pthread_mutex_lock(&net->lock);
    at_request *request = at_take_due(net, UINT64_MAX);
    (void)pthread_mutex_unlock(&net->lock);
    if (request == NULL) return 0;
    at_deliver(net, request);
    return 1;
}

int64_t at_net_next(at_net *net) {
    (void)pthread_mutex_lock(&net->lock);
    while (net->heap_count != 0 && stands_still(net, net->heap[0])) park(net, at_heap_pop(net));
    uint64_t now = net->counts.now;
    int64_t ns = net->heap_count == 0 ? -1 : net->heap[0]->when <= now ? 0 : (int64_t)(net->heap[0]->when - now);
    (void)pthread_mutex_unlock(&net->lock);
    return ns;
}

int64_t at_net_advance(at_net *net, uint64_t ns) {
    (void)pthread_mutex_lock(&net->lock);
    uint64_t until = net->counts.now + ns;
    (void)pthread_mutex_unlock(&net->lock);
    int64_t count = 0;
    for (;; count++) {
        (void)pthread_mutex_lock(&net->lock);
        at_request *request = at_take_due(net, until);
        if (request == NULL) net->counts.now = until;
        (void)pthread_mutex_unlock(&net->lock);
        if (request == NULL) return count;
        at_deliver(net, request);
    }
}

/* ---- faults ---- */

int at_net_hold(at_net *net, uint64_t incarnation, int on) {
    (void)pthread_mutex_lock(&net->lock);
    at_member *member = at_member_find(net, incarnation);
    if (member != NULL) {
        member->held = on;
        at_net_mark(net, 5, incarnation, (uint64_t)on);
        if (!on) at_net_unpark(net);
    }
    (void)pthread_mutex_unlock(&net->lock);
    return member != NULL ? AT_OK : AT_EUNKNOWN;
}

/* An end whose other side was killed and that was not told yet, pinned. */
static at_end *untold(at_net *net, uint64_t killed) {
    at_end *end = net->ends;
    while (end != NULL && (end->gone || end->to != killed || end->home->dead || end->home->left || end->told)) end = end->next;
    if (end != NULL) {
        end->told = 1;
        end->pins++;
        end->home->pins++;
    }
    return end;
}

int at_net_kill(at_net *net, uint64_t incarnation) {
    (void)pthread_mutex_lock(&net->lock);
    at_member *member = at_member_find(net, incarnation);
    if (member == NULL) {
        (void)pthread_mutex_unlock(&net->lock);
        return AT_EUNKNOWN;
    }
    member->dead = 1;
    net->counts.killed++;
    at_net_mark(net, 6, incarnation, 0);
    for (at_end *end; (end = untold(net, incarnation)) != NULL;) {
        at_member *home = end->home;
        (void)pthread_mutex_unlock(&net->lock);
        at_lock(home->lane);
        if (!end->gone) {
            end->peer->dead = 1;
            at_event_push(home->lane, AT_EV_PEER, (uint64_t)end->peer->id, AT_EPEER, 0);
        }
        at_unlock(home->lane);
        (void)pthread_mutex_lock(&net->lock);
        int over = --end->pins == 0 && end->gone && end->control == NULL;
        at_unpin(net, home);
        if (over) free(end);
    }
    at_net_unpark(net); /* what waited for it to go on now fails instead */
    (void)pthread_mutex_unlock(&net->lock);
    return AT_OK;
}

typedef struct {
    uint64_t from, to;
} link_name;

static int on_link(const at_request *request, const void *arg) {
    const link_name *name = arg;
    return request->end->home->incarnation == name->from && request->end->to == name->to;
}

int64_t at_net_break(at_net *net, uint64_t from, uint64_t to) {
    link_name name = {from, to};
    int64_t count = 0;
    (void)pthread_mutex_lock(&net->lock);
    at_request *list = at_net_take(net, on_link, &name);
    at_net_mark(net, 7, from, to);
    for (at_request *r = list; r != NULL; r = r->next) {
        net->counts.lost++;
        r->end->home->pins++;
        at_end *target = at_end_find(net, to, from);
        int lands = target != NULL && !target->home->dead && !target->home->stopped && (r->word == NULL || atomic_load(r->word) == r->epoch);
        uint64_t dice = at_net_draw(net) % 3;
        if (lands && dice != 0) copy(r, dice == 1 ? r->n : r->n / 2 > r->done ? r->n / 2 : r->done);
    }
    (void)pthread_mutex_unlock(&net->lock);
    for (at_request *next; list != NULL; list = next, count++) {
        next = list->next;
        at_request_end(net, list, 0, AT_ERAIL);
    }
    return count;
}
