/* The peers of a lane: added, found, and gone with their last use. */
#include "lane.h"

#include <stdlib.h>

at_peer *at_peer_add(at_lane *lane, const at_port *port, void *impl, const at_control *control) {
    uint32_t index = 0;
    while (index < lane->peer_count && lane->peers[index] != NULL) index++;
    if (index >> AT_PEER_BITS != 0 || lane->peer_serial >= (UINT64_C(1) << (63 - AT_PEER_BITS)) - 1) return NULL;
    if (at_grow((void ***)&lane->peers, &lane->peer_capacity, index) != 0) return NULL;
    at_peer *peer = calloc(1, sizeof *peer);
    if (peer == NULL) return NULL;
    peer->lane = lane;
    peer->port = port;
    peer->impl = impl;
    peer->index = index;
    peer->id = (int64_t)(++lane->peer_serial << AT_PEER_BITS | index); /* slots are reused, ids are not */
    peer->users = 1;
    peer->control = control;
    lane->peers[index] = peer;
    if (index == lane->peer_count) lane->peer_count++;
    lane->stats.peers++;
    return peer;
}

at_peer *at_peer_find(at_lane *lane, int64_t id) {
    uint32_t index = (uint32_t)id & ((1u << AT_PEER_BITS) - 1u);
    if (id < 0 || index >= lane->peer_count) return NULL;
    at_peer *peer = lane->peers[index];
    return peer != NULL && peer->id == id && !peer->freed ? peer : NULL;
}

void at_peer_release(at_peer *peer) {
    at_lane *lane = peer->lane;
    if (--peer->users != 0) return;
    lane->peers[peer->index] = NULL;
    lane->stats.peers--;
    peer->port->destroy(peer);
    free(peer);
}

void at_peer_broke(at_peer *peer) {
    if (peer->broke) return;
    peer->broke = 1;
    at_event_push(peer->lane, AT_EV_PEER, (uint64_t)peer->id, AT_EPROTO, 0);
}

void at_peers_reap(at_lane *lane) {
    for (uint32_t i = 0; i < lane->peer_count && lane->lingering != 0; i++) {
        at_peer *peer = lane->peers[i];
        if (peer == NULL || !peer->lingers || peer->port->inside(peer)) continue;
        peer->lingers = 0;
        lane->lingering--;
        at_peer_release(peer);
    }
}

int at_peer_ping(at_lane *lane, int64_t id) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_peer *peer = at_peer_find(lane, id);
    if (peer != NULL) {
        peer->port->ping(peer, ++peer->ping);
        result = AT_OK;
    }
    at_unlock(lane);
    return result;
}

int at_peer_pong(at_lane *lane, int64_t id, uint64_t *sent, uint64_t *native, uint64_t *loop) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_peer *peer = at_peer_find(lane, id);
    if (peer != NULL) {
        *sent = peer->ping;
        peer->port->pong(peer, native, loop);
        result = AT_OK;
    }
    at_unlock(lane);
    return result;
}

int64_t at_peer_queued(at_lane *lane, int64_t id) {
    at_lock(lane);
    at_peer *peer = at_peer_find(lane, id);
    int64_t count = peer != NULL ? (int64_t)peer->queued_ops : AT_EUNKNOWN;
    at_unlock(lane);
    return count;
}
