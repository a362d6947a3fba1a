/* What a lane knows of memory: local regions, grants given to others (epoch words), and remote regions of peers. */
#include "lane.h"
#include "own.h"

#include <stdlib.h>

/* ---- local regions ---- */

int64_t at_region_add(at_lane *lane, void *base, uint64_t nbytes) {
    int64_t id = AT_ENOMEM;
    at_lock(lane);
    uint32_t i = lane->region_hint; /* everything below is in use */
    while (i < lane->region_count && (lane->regions[i]->generation & 1u)) i++;
    if (i == lane->region_count) {
        if (at_grow((void ***)&lane->regions, &lane->region_capacity, lane->region_count) != 0) goto out;
        at_region *fresh = calloc(1, sizeof *fresh);
        if (fresh == NULL) goto out;
        lane->regions[lane->region_count++] = fresh;
    }
    at_region *region = lane->regions[i];
    lane->region_hint = i + 1;
    region->generation++;
    region->base = base;
    region->nbytes = nbytes;
    region->users = 0;
    region->open = 1;
    region->file = 0;
    region->cuda = region->dmabuf_fd = -1;
    region->slow = 0;
    region->absent = region->first_there = 0;
    lane->stats.regions++;
    id = at_make_id(region->generation, i);
out:
    at_unlock(lane);
    return id;
}

static void region_free(at_lane *lane, uint32_t index) {
    for (at_rail *rail = lane->rails; rail != NULL; rail = rail->next)
        if (rail->region_over != NULL) rail->region_over(rail, index);
    lane->regions[index]->generation = at_life_over(lane->regions[index]->generation);
    lane->regions[index]->base = NULL;
    free(lane->regions[index]->there);
    lane->regions[index]->there = NULL;
    if (index < lane->region_hint) lane->region_hint = index;
    lane->stats.regions--;
}

int at_regions_age(at_lane *lane, uint32_t generation) {
    while (lane->region_count < AT_AGED) {
        if (at_grow((void ***)&lane->regions, &lane->region_capacity, lane->region_count) != 0) return AT_ENOMEM;
        at_region *fresh = calloc(1, sizeof *fresh);
        if (fresh == NULL) return AT_ENOMEM;
        lane->regions[lane->region_count++] = fresh;
    }
    for (uint32_t i = 0; i < lane->region_count; i++)
        if ((lane->regions[i]->generation & 1u) == 0) lane->regions[i]->generation = generation & ~1u;
    return AT_OK;
}

static at_region *region_find(at_lane *lane, int64_t id) {
    uint32_t index = (uint32_t)id;
    if (id < 0 || index >= lane->region_count) return NULL;
    at_region *region = lane->regions[index];
    return region->generation == (uint32_t)(id >> 32) ? region : NULL;
}

int at_region_close(at_lane *lane, int64_t id) {
    int result = AT_ECLOSED;
    at_lock(lane);
    at_wait_here(lane);
    at_region *region = region_find(lane, id);
    if (region != NULL && region->open) {
        region->open = 0;
        result = region->users != 0;
        if (result == 0) region_free(lane, (uint32_t)id);
    }
    at_unlock(lane);
    return result;
}

void at_region_release(at_lane *lane, uint32_t index) {
    at_region *region = lane->regions[index];
    if (--region->users == 0 && !region->open) {
        int64_t id = at_make_id(region->generation, index);
        region_free(lane, index);
        at_event_push(lane, AT_EV_REGION, (uint64_t)id, AT_OK, 0);
    }
}

int at_region_on_device(at_lane *lane, int64_t id, int cuda, int dmabuf_fd, uint64_t dmabuf_start) {
    at_lock(lane);
    at_region *region = at_region_use(lane, id);
    if (region != NULL) {
        region->cuda = cuda;
        region->dmabuf_fd = dmabuf_fd;
        region->dmabuf_start = dmabuf_start;
    }
    at_unlock(lane);
    return region != NULL ? AT_OK : AT_ECLOSED;
}

int at_region_look(at_lane *lane, int64_t id) {
    at_lock(lane);
    at_region *region = at_region_use(lane, id);
    const void *base = region != NULL ? region->base : NULL;
    uint64_t nbytes = region != NULL ? region->nbytes : 0;
    at_unlock(lane);
    int kind = at_own_kind(base, nbytes);
    at_lock(lane);
    region = at_region_use(lane, id);
    if (region != NULL) {
        region->file = kind != AT_FILE_NONE;
        region->slow = kind == AT_FILE_SLOW && !(lane->config.flags & AT_LANE_NO_THREAD); /* no copier would ever come */
    }
    at_unlock(lane);
    return region != NULL ? AT_OK : AT_ECLOSED;
}

int at_region_is_file(at_lane *lane, int64_t id) {
    at_lock(lane);
    const at_region *region = at_region_use(lane, id);
    int result = region != NULL ? region->file : AT_ECLOSED;
    at_unlock(lane);
    return result;
}

at_region *at_region_use(at_lane *lane, int64_t id) {
    at_region *region = region_find(lane, id);
    return region != NULL && region->open ? region : NULL;
}

/* ---- grants: the epoch words that writers compare before and after they set their active word ---- */

int64_t at_grant_new(at_lane *lane, uint64_t *epoch) {
    int64_t slot = AT_EBUSY;
    at_lock(lane);
    if (lane->over)
        slot = AT_ESHUT;
    else if (lane->grant_free_count > 0)
        slot = lane->grant_free[--lane->grant_free_count];
    else if (lane->grant_top < AT_GRANTS)
        slot = lane->grant_top++;
    if (slot >= 0) {
        _Atomic uint64_t *word = &lane->control->epoch[slot];
        /* odd: live; even: revoked. The value never repeats in a slot, so an old descriptor can never fit again. */
        *epoch = atomic_load(word) + 1;
        atomic_store(word, *epoch);
        lane->stats.grants++;
    }
    at_unlock(lane);
    return slot;
}

static int grant_active(at_lane *lane, int64_t slot) {
    int count = 0;
    for (uint32_t i = 0; i < lane->peer_count; i++) {
        at_peer *peer = lane->peers[i];
        if (peer != NULL && peer->port->active(peer, (uint32_t)slot)) count++;
    }
    return count;
}

static int grant_known(at_lane *lane, int64_t slot) { return slot >= 0 && slot < (int64_t)lane->grant_top; }

int at_grant_revoke(at_lane *lane, int64_t slot) {
    int count = AT_EUNKNOWN;
    at_lock(lane);
    if (grant_known(lane, slot)) {
        _Atomic uint64_t *word = &lane->control->epoch[slot];
        uint64_t value = atomic_load(word);
        if (value & 1u) {
            atomic_store(word, value + 1); /* order: revoke 1 */
            for (uint32_t i = 0; i < lane->peer_count; i++)
                if (lane->peers[i] != NULL && lane->peers[i]->port->revoke != NULL) lane->peers[i]->port->revoke(lane->peers[i], (uint32_t)slot);
        }
        count = grant_active(lane, slot);
    }
    at_unlock(lane);
    return count;
}

int at_grant_active(at_lane *lane, int64_t slot) {
    at_lock(lane);
    int count = grant_known(lane, slot) ? grant_active(lane, slot) : AT_EUNKNOWN;
    at_unlock(lane);
    return count;
}

int at_grant_expel(at_lane *lane, int64_t slot) {
    at_lock(lane);
    for (uint32_t i = 0; grant_known(lane, slot) && i < lane->peer_count; i++) {
        at_peer *peer = lane->peers[i];
        if (peer != NULL && peer->port->expel != NULL && peer->port->active(peer, (uint32_t)slot)) peer->port->expel(peer);
    }
    at_rail *rails = lane->rails;
    at_unlock(lane);
    for (at_rail *rail = rails; rail != NULL; rail = rail->next) /* what they had sent before is counted before this is over */
        if (rail->drain != NULL) rail->drain(rail);
    at_lock(lane);
    int count = grant_known(lane, slot) ? grant_active(lane, slot) : AT_EUNKNOWN;
    at_unlock(lane);
    return count;
}

int at_grant_free(at_lane *lane, int64_t slot) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    if (grant_known(lane, slot) && (atomic_load(&lane->control->epoch[slot]) & 1u) == 0) {
        result = grant_active(lane, slot) ? AT_EBUSY : AT_OK;
        if (result == AT_OK) {
            for (at_rail *rail = lane->rails; rail != NULL; rail = rail->next)
                if (rail->grant_over != NULL) rail->grant_over(rail, (uint32_t)slot);
            lane->grant_free[lane->grant_free_count++] = (uint32_t)slot;
            lane->stats.grants--;
        }
    }
    at_unlock(lane);
    return result;
}

int at_grant_valid(at_lane *lane, int64_t slot, uint64_t epoch) {
    return grant_known(lane, slot) && (epoch & 1u) && atomic_load(&lane->control->epoch[slot]) == epoch;
}

/* ---- remote regions ---- */

int64_t at_remote_add(at_lane *lane, int64_t peer_id, void *base, uint64_t va, uint64_t nbytes, int access, uint32_t slot,
                      uint64_t epoch) {
    int64_t id = AT_ENOMEM;
    at_lock(lane);
    at_peer *peer = at_peer_find(lane, peer_id);
    if (peer == NULL || peer->status != AT_OK || slot >= AT_GRANTS || !(epoch & 1u)) { /* an even epoch is that of a revoked grant */
        id = peer == NULL || peer->status != AT_OK ? AT_EPEER : AT_ESTALE;
        goto out;
    }
    uint32_t i = lane->remote_hint;
    while (i < lane->remote_count && (lane->remotes[i]->generation & 1u)) i++;
    if (i == lane->remote_count) {
        if (at_grow((void ***)&lane->remotes, &lane->remote_capacity, lane->remote_count) != 0) goto out;
        at_remote *fresh = calloc(1, sizeof *fresh);
        if (fresh == NULL) goto out;
        lane->remotes[lane->remote_count++] = fresh;
    }
    at_remote *remote = lane->remotes[i];
    lane->remote_hint = i + 1;
    uint32_t generation = remote->generation + 1;
    *remote = (at_remote){.peer = peer,
                          .base = base,
                          .va = va,
                          .nbytes = nbytes,
                          .word = &peer->control->epoch[slot],
                          .epoch = epoch,
                          .slot = slot,
                          .generation = generation,
                          .access = access,
                          .foreign = base == NULL && peer->port->foreign && !(lane->config.flags & AT_LANE_NO_THREAD),
                          .segment_fd = -1,
                          .open = 1};
    peer->users++;
    lane->stats.remote_regions++;
    id = at_make_id(generation, i);
out:
    at_unlock(lane);
    return id;
}

int at_remotes_age(at_lane *lane, uint32_t generation) {
    while (lane->remote_count < AT_AGED) {
        if (at_grow((void ***)&lane->remotes, &lane->remote_capacity, lane->remote_count) != 0) return AT_ENOMEM;
        at_remote *fresh = calloc(1, sizeof *fresh);
        if (fresh == NULL) return AT_ENOMEM;
        lane->remotes[lane->remote_count++] = fresh;
    }
    for (uint32_t i = 0; i < lane->remote_count; i++)
        if ((lane->remotes[i]->generation & 1u) == 0) lane->remotes[i]->generation = generation & ~1u;
    return AT_OK;
}

int at_remote_guard(at_lane *lane, int64_t id, int fd, uint64_t nbytes) {
    at_lock(lane);
    at_remote *remote = at_remote_use(lane, id);
    if (remote != NULL) {
        remote->segment_fd = fd;
        remote->segment_bytes = nbytes;
    }
    at_unlock(lane);
    return remote != NULL ? AT_OK : AT_ESTALE;
}

int at_remote_is_file(at_lane *lane, int64_t id) {
    at_lock(lane);
    at_remote *remote = at_remote_use(lane, id);
    if (remote != NULL) remote->file = 1;
    at_unlock(lane);
    return remote != NULL ? AT_OK : AT_ESTALE;
}

at_remote *at_remote_use(at_lane *lane, int64_t id) {
    uint32_t index = (uint32_t)id;
    if (id < 0 || index >= lane->remote_count) return NULL;
    at_remote *remote = lane->remotes[index];
    return remote->generation == (uint32_t)(id >> 32) && remote->open ? remote : NULL;
}

static void remote_free(at_lane *lane, uint32_t index) {
    at_remote *remote = lane->remotes[index];
    at_peer *peer = remote->peer;
    remote->generation = at_life_over(remote->generation);
    remote->peer = NULL;
    remote->base = NULL;
    free(remote->parts);
    remote->parts = NULL;
    if (index < lane->remote_hint) lane->remote_hint = index;
    lane->stats.remote_regions--;
    at_peer_release(peer);
}

void at_remote_release(at_lane *lane, uint32_t index) {
    at_remote *remote = lane->remotes[index];
    if (--remote->users == 0 && !remote->open) remote_free(lane, index);
}

int at_remote_valid(at_lane *lane, int64_t id) {
    atomic_thread_fence(memory_order_acquire); /* order: alone: what was read, before the look at the word */
    at_lock(lane);
    at_remote *remote = at_remote_use(lane, id);
    int result = remote != NULL && atomic_load(remote->word) == remote->epoch ? AT_OK : AT_ESTALE;
    at_unlock(lane);
    return result;
}

/* Closed, and still used by operations. */
static int is_closing(const at_lane *lane, int64_t id) {
    uint32_t index = (uint32_t)id;
    return id >= 0 && index < lane->remote_count && (lane->remotes[index]->generation & 1u) &&
           (lane->remotes[index]->generation & 0x7fffffffu) == (uint32_t)(id >> 32);
}

int at_remote_close(at_lane *lane, int64_t id) {
    int result = AT_ESTALE;
    at_lock(lane);
    at_wait_here(lane);
    at_remote *remote = at_remote_use(lane, id);
    if (remote != NULL) {
        remote->open = 0;
        result = remote->users != 0;
        if (result == 0) remote_free(lane, (uint32_t)id);
    } else {
        result = is_closing(lane, id) ? 1 : AT_ESTALE;
    }
    at_unlock(lane);
    return result;
}
