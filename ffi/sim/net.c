/* The network: its members, its clock, its dice, and the requests under way in order of time. */
#include "sim/sim.h"

#include <stdlib.h>

/* splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014) */
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

uint64_t at_net_draw(at_net *net) { return mix(net->random += UINT64_C(0x9E3779B97F4A7C15)); }

/* Draws only when there is something to decide, so that faults which are off leave the rest of a run as it was. */
int at_net_chance(at_net *net, uint32_t per_mille) { return per_mille != 0 && at_net_draw(net) % 1000 < per_mille; }

void at_net_mark(at_net *net, uint64_t what, uint64_t a, uint64_t b) {
    net->counts.trace = mix(net->counts.trace ^ mix(what ^ mix(a ^ mix(b ^ mix(net->counts.now)))));
}

at_net *at_net_new(const at_net_config *config) {
    at_net *net = calloc(1, sizeof *net);
    if (net == NULL) return NULL;
    net->config = *config;
    net->random = config->seed;
    net->users = 1;
    (void)pthread_mutex_init(&net->lock, NULL);
    (void)pthread_cond_init(&net->unpinned, NULL);
    return net;
}

static void net_release(at_net *net) { /* with the lock, which goes with the last user */
    uint32_t left = --net->users;
    (void)pthread_mutex_unlock(&net->lock);
    if (left != 0) return;
    for (uint32_t i = 0; i < net->heap_count; i++) free(net->heap[i]);
    for (at_request *r = net->parked, *next; r != NULL; r = next) next = r->next, free(r);
    (void)pthread_mutex_destroy(&net->lock);
    (void)pthread_cond_destroy(&net->unpinned);
    free(net->heap);
    free(net);
}

void at_net_free(at_net *net) {
    (void)pthread_mutex_lock(&net->lock);
    net_release(net);
}

at_member *at_member_find(at_net *net, uint64_t incarnation) {
    at_member *member = net->members;
    while (member != NULL && (member->left || member->stopped || member->incarnation != incarnation)) member = member->next;
    return member;
}

at_end *at_end_find(at_net *net, uint64_t home, uint64_t to) {
    at_end *end = net->ends;
    while (end != NULL && (end->gone || end->home->incarnation != home || end->to != to)) end = end->next;
    return end;
}

void at_unpin(at_net *net, at_member *member) {
    if (--member->pins == 0) (void)pthread_cond_broadcast(&net->unpinned);
}

void at_net_unlock(at_net *net, at_member *member) {
    if (member == NULL || !member->left || member->ends != 0) {
        (void)pthread_mutex_unlock(&net->lock);
        return;
    }
    at_member **link = &net->members;
    while (*link != member) link = &(*link)->next;
    *link = member->next;
    free(member);
    net_release(net);
}

/* ---- requests in order of (when, serial) ---- */

static int before(const at_request *a, const at_request *b) {
    return a->when != b->when ? a->when < b->when : a->serial < b->serial;
}

int at_heap_push(at_net *net, at_request *request) {
    if (net->heap_count == net->heap_room) {
        uint32_t room = net->heap_room ? net->heap_room * 2 : 64;
        at_request **more = realloc(net->heap, room * sizeof *more);
        if (more == NULL) return AT_ENOMEM;
        net->heap = more;
        net->heap_room = room;
    }
    uint32_t i = net->heap_count++;
    for (; i > 0 && before(request, net->heap[(i - 1) / 2]); i = (i - 1) / 2) net->heap[i] = net->heap[(i - 1) / 2];
    net->heap[i] = request;
    return AT_OK;
}

static void sift(at_net *net, uint32_t i) {
    at_request *request = net->heap[i];
    for (;;) {
        uint32_t child = 2 * i + 1;
        if (child >= net->heap_count) break;
        if (child + 1 < net->heap_count && before(net->heap[child + 1], net->heap[child])) child++;
        if (!before(net->heap[child], request)) break;
        net->heap[i] = net->heap[child];
        i = child;
    }
    net->heap[i] = request;
}

at_request *at_heap_pop(at_net *net) {
    at_request *first = net->heap[0];
    net->heap[0] = net->heap[--net->heap_count];
    if (net->heap_count != 0) sift(net, 0);
    return first;
}

at_request *at_net_take(at_net *net, int (*want)(const at_request *, const void *), const void *arg) {
    at_request *taken = NULL, **last = &taken;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < net->heap_count; i++) {
        at_request *request = net->heap[i];
        if (!want(request, arg)) {
            net->heap[kept++] = request;
            continue;
        }
        request->next = NULL;
        *last = request;
        last = &request->next;
    }
    net->heap_count = kept;
    for (uint32_t i = kept / 2; i-- > 0;) sift(net, i);
    for (at_request **link = &net->parked; *link != NULL;) {
        at_request *request = *link;
        if (!want(request, arg)) {
            link = &request->next;
            continue;
        }
        *link = request->next;
        request->next = NULL;
        *last = request;
        last = &request->next;
    }
    return taken;
}

void at_net_unpark(at_net *net) {
    while (net->parked != NULL) {
        at_request *request = net->parked;
        if (at_heap_push(net, request) != AT_OK) return; /* no memory now: they stay parked */
        net->parked = request->next;
    }
}

void at_net_configure(at_net *net, const at_net_config *config) {
    (void)pthread_mutex_lock(&net->lock);
    net->config = *config;
    (void)pthread_mutex_unlock(&net->lock);
}

void at_net_counts_get(at_net *net, at_net_counts *out) {
    (void)pthread_mutex_lock(&net->lock);
    *out = net->counts;
    out->waiting = net->heap_count;
    for (const at_request *r = net->parked; r != NULL; r = r->next) out->waiting++;
    for (const at_request *r = net->moving; r != NULL; r = r->next) out->waiting++;
    (void)pthread_mutex_unlock(&net->lock);
}
