/* A lane's place in the network: taken, advanced by the thread that polls the lane, left. */
#include "sim/sim.h"

#include <stdlib.h>
#include <time.h>

static void progress(at_rail *rail, int turn) {
    (void)turn;
    at_member *member = (at_member *)rail;
    at_lane *lane = rail->lane;
    at_lock(lane);
    for (uint32_t i = 0; i < lane->peer_count; i++) /* what was refused before */
        if (lane->peers[i] != NULL && lane->peers[i]->port == &at_sim_port) at_refill(lane->peers[i]);
    at_unlock(lane);
    at_net *net = member->net;
    for (;;) {
        (void)pthread_mutex_lock(&net->lock);
        at_request *request = at_take_due(net, net->counts.now);
        (void)pthread_mutex_unlock(&net->lock);
        if (request == NULL) return;
        at_deliver(net, request);
    }
}

at_member *at_member_of(at_lane *lane) {
    at_rail *rail = lane->rails;
    while (rail != NULL && rail->progress != progress) rail = rail->next;
    return (at_member *)rail;
}

/* Stop: nothing is delivered to or from this lane any more. */
static int stop(at_rail *rail, uint64_t until) {
    at_member *member = (at_member *)rail;
    at_net *net = member->net;
    (void)pthread_mutex_lock(&net->lock);
    member->stopped = 1;
    while (member->pins != 0 && at_now() < until) {
        (void)pthread_mutex_unlock(&net->lock);
        struct timespec span = {0, 100000};
        (void)nanosleep(&span, NULL);
        (void)pthread_mutex_lock(&net->lock);
    }
    int quiet = member->pins == 0;
    (void)pthread_mutex_unlock(&net->lock);
    return quiet;
}

/* Called when the lane is freed; its ends go afterwards, with its peers. */
static void leave(at_rail *rail) {
    at_member *member = (at_member *)rail;
    at_net *net = member->net;
    (void)pthread_mutex_lock(&net->lock);
    member->left = 1;
    while (member->pins != 0) (void)pthread_cond_wait(&net->unpinned, &net->lock);
    for (at_end *end = net->ends; end != NULL; end = end->next)
        if (end->home == member) end->gone = 1;
    at_net_unlock(net, member);
}

int at_net_join(at_net *net, at_lane *lane) {
    at_member *member = calloc(1, sizeof *member);
    if (member == NULL) return AT_ENOMEM;
    member->net = net;
    member->lane = lane;
    member->incarnation = lane->incarnation;
    at_lock(lane);
    (void)pthread_mutex_lock(&net->lock);
    int taken = at_member_of(lane) != NULL || at_member_find(net, lane->incarnation) != NULL;
    if (!taken) {
        member->next = net->members;
        net->members = member;
        net->users++;
        member->rail = (at_rail){.name = at_sim_port.name, .progress = progress, .stop = stop, .leave = leave};
        at_rail_add(lane, &member->rail);
    }
    (void)pthread_mutex_unlock(&net->lock);
    at_unlock(lane);
    if (taken) free(member);
    return taken ? AT_EBUSY : AT_OK;
}
