/* One lane's side of a simulated connection: made, posted to, fenced, destroyed. */
#include "sim/sim.h"

#include <stdlib.h>

#define WINDOW 64u

int64_t at_sim_connect(at_lane *lane, uint64_t to) {
    int64_t result = AT_ENOMEM;
    at_end *end = calloc(1, sizeof *end);
    if (end == NULL) return AT_ENOMEM;
    at_lock(lane);
    at_member *home = at_member_of(lane);
    if (home == NULL || lane->shut) {
        at_unlock(lane);
        free(end);
        return AT_ESHUT;
    }
    at_net *net = home->net;
    (void)pthread_mutex_lock(&net->lock);
    at_member *other = at_member_find(net, to);
    if (other == NULL || other->dead) {
        result = AT_EPEER;
    } else {
        end->home = home;
        end->to = to;
        end->control = other->lane->control_ref;
        atomic_fetch_add(&end->control->users, 1);
        end->peer = at_peer_add(lane, &at_sim_port, end, end->control->memory);
        if (end->peer != NULL) {
            result = end->peer->id;
            end->next = net->ends;
            net->ends = end;
            home->ends++;
        } else {
            at_control_release(end->control);
        }
    }
    (void)pthread_mutex_unlock(&net->lock);
    at_unlock(lane);
    if (result < 0) free(end);
    return result;
}

static uint64_t delay(at_net *net) {
    uint64_t low = net->config.delay_min, high = net->config.delay_max;
    return high > low ? low + at_net_draw(net) % (high - low + 1) : low;
}

/* With the lane's lock. */
static int64_t sim_post(at_peer *peer, at_op *op) {
    at_end *end = peer->impl;
    at_net *net = end->home->net;
    at_request *request = calloc(1, sizeof *request);
    if (request == NULL) return AT_EAGAIN;
    *request = (at_request){.end = end, .op = op, .n = op->nbytes, .imm = op->cursor < op->precounted ? -1 : op->imm};
    if (op->remote != NULL) {
        const at_remote *remote = op->remote;
        uint8_t *base = remote->base != NULL ? remote->base : (uint8_t *)(uintptr_t)remote->va;
        uint64_t from = 0, to = op->remote_offset;
        if (op->kind & AT_OP_PAGES) {
            from = (uint64_t)op->local_pages[op->cursor] * op->local_stride;
            to += (uint64_t)op->remote_pages[op->cursor] * op->remote_stride;
        }
        request->local = op->local + from;
        request->file = op->region->file || remote->file;
        request->remote = base + to;
        request->reads = op->kind & AT_OP_READ;
        request->word = remote->word;
        request->epoch = remote->epoch;
        request->slot = remote->slot;
    }
    (void)pthread_mutex_lock(&net->lock);
    int rc = AT_OK;
    if (at_net_chance(net, net->config.refuse)) {
        net->counts.refused++;
        at_net_mark(net, 1, end->home->incarnation, end->to);
        rc = AT_EAGAIN;
    } else {
        request->serial = ++net->serial;
        request->when = net->counts.now + delay(net);
        rc = at_heap_push(net, request) == AT_OK ? AT_OK : AT_EAGAIN;
    }
    if (rc == AT_OK) {
        net->counts.posted++;
        net->counts.delayed += request->when > net->counts.now;
        at_net_mark(net, 2, request->when, request->n);
    }
    (void)pthread_mutex_unlock(&net->lock);
    if (rc != AT_OK) free(request);
    return rc == AT_OK ? 1 : rc;
}

static int of_grant(const at_request *request, const at_end *end, uint32_t slot) {
    const at_member *writer = request->end->home;
    return request->state != AT_REQ_WAITING && request->word != NULL && request->slot == slot && !writer->dead &&
           writer->incarnation == end->to && request->end->to == end->home->incarnation;
}

static int sim_active(at_peer *peer, uint32_t slot) {
    const at_end *end = peer->impl;
    at_net *net = end->home->net;
    int found = 0;
    (void)pthread_mutex_lock(&net->lock);
    for (uint32_t i = 0; i < net->heap_count; i++) found |= of_grant(net->heap[i], end, slot);
    for (const at_request *r = net->parked; r != NULL; r = r->next) found |= of_grant(r, end, slot);
    for (const at_request *r = net->moving; r != NULL; r = r->next) found |= of_grant(r, end, slot);
    (void)pthread_mutex_unlock(&net->lock);
    return found;
}

/* Whether the request is of this end, and its operation was withdrawn (as all are when the peer has ended). */
static int to_fence(const at_request *request, const void *arg) {
    const at_end *end = arg;
    return request->end == end && (end->peer->status != AT_OK || atomic_load(&request->op->withdrawn));
}

/* With the lane's lock. What was withdrawn retires without having landed. Others stay: this network knows that they have not been
 * touched, so nothing needs to be posted again. What another thread is delivering right now retires when it is through. */
static void sim_fence(at_peer *peer) {
    at_end *end = peer->impl;
    at_net *net = end->home->net;
    (void)pthread_mutex_lock(&net->lock);
    at_request *list = at_net_take(net, to_fence, end);
    for (const at_request *r = list; r != NULL; r = r->next) {
        net->counts.fenced++;
        at_net_mark(net, 3, r->serial, 0);
    }
    (void)pthread_mutex_unlock(&net->lock);
    while (list != NULL) {
        at_request *next = list->next;
        at_op *op = list->op;
        free(list);
        at_op_complete(op, 0, 0, 0, op->status != AT_OK ? op->status : peer->status != AT_OK ? peer->status : AT_ERAIL);
        list = next;
    }
}

static void sim_drain(at_peer *peer) { (void)peer; } /* arrivals are handed over when they arrive */

static void sim_ping(at_peer *peer, uint64_t seq) {
    at_end *end = peer->impl;
    at_net *net = end->home->net;
    (void)pthread_mutex_lock(&net->lock);
    const at_member *other = at_member_find(net, end->to);
    if (other != NULL && !other->held && !other->dead) end->pong = seq;
    (void)pthread_mutex_unlock(&net->lock);
}

static void sim_pong(at_peer *peer, uint64_t *native, uint64_t *loop) {
    const at_end *end = peer->impl;
    *native = *loop = end->pong;
}

static void sim_answer(at_peer *peer, int from_loop) { (void)peer, (void)from_loop; }

static int of_end(const at_request *request, const void *end) { return request->end == end; }

/* With the lane's lock. What is still under way of this end belongs to a lane that is being freed. */
static void sim_destroy(at_peer *peer) {
    at_end *end = peer->impl;
    at_member *home = end->home;
    at_net *net = home->net;
    (void)pthread_mutex_lock(&net->lock);
    at_request *list = at_net_take(net, of_end, end);
    at_end **link = &net->ends;
    while (*link != end) link = &(*link)->next;
    *link = end->next;
    end->gone = 1;
    home->ends--;
    int pinned = end->pins != 0;
    at_control_ref *control = end->control;
    end->control = NULL;
    at_net_unlock(net, home);
    for (at_request *next; list != NULL; list = next) next = list->next, free(list);
    at_control_release(control);
    if (!pinned) free(end); /* else the holder of the pin frees it */
}

const at_port at_sim_port = {
    .name = "loopback",
    .window = WINDOW,
    .post = sim_post,
    .drain = sim_drain,
    .active = sim_active,
    .fence = sim_fence,
    .ping = sim_ping,
    .pong = sim_pong,
    .answer = sim_answer,
    .destroy = sim_destroy,
};
