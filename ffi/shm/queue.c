/* Counting immediates through a channel: running totals in slots, see shm.h. */
#define _GNU_SOURCE
#include "shm.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SOFT_SLOTS 1024u    /* below this, fresh slots are handed out without looking for old ones */
#define HAND_STEPS 64u      /* slots looked at when one is wanted */
#define WILD ((uint64_t)1 << 48) /* no honest peer adds this many arrivals between two looks */

static uint32_t hash(uint32_t imm) { return (uint32_t)((imm * UINT64_C(0x9E3779B97F4A7C15)) >> 32); }

static at_slot_entry *find(const at_shm *shm, uint32_t imm) {
    uint32_t i = hash(imm) & shm->table_mask;
    while (shm->table[i].slot != 0 && shm->table[i].imm != imm) i = (i + 1) & shm->table_mask;
    return &shm->table[i];
}

/* Linear probing keeps no tombstones: close the gap behind a removed entry. */
static void forget(at_shm *shm, uint32_t imm) {
    uint32_t mask = shm->table_mask, hole = (uint32_t)(find(shm, imm) - shm->table);
    if (shm->table[hole].slot == 0) return;
    for (uint32_t i = (hole + 1) & mask; shm->table[i].slot != 0; i = (i + 1) & mask) {
        uint32_t home = hash(shm->table[i].imm) & mask;
        if (((i - home) & mask) >= ((i - hole) & mask)) {
            shm->table[hole] = shm->table[i];
            hole = i;
        }
    }
    shm->table[hole].slot = 0;
}

/* Room for one more slot in our private arrays and twice as many entries in the table. */
static int more_slots(at_shm *shm) {
    if (shm->slots < shm->slots_room) return AT_OK;
    uint32_t room = shm->slots_room ? shm->slots_room * 2 : 64;
    uint64_t *total = realloc(shm->total, room * sizeof *total);
    if (total == NULL) return AT_ENOMEM;
    shm->total = total;
    uint32_t *slot_imm = realloc(shm->slot_imm, room * sizeof *slot_imm);
    if (slot_imm == NULL) return AT_ENOMEM;
    shm->slot_imm = slot_imm;
    at_slot_entry *table = calloc((size_t)room * 2, sizeof *table);
    if (table == NULL) return AT_ENOMEM;
    free(shm->table);
    shm->table = table;
    shm->table_mask = room * 2 - 1;
    for (uint32_t s = 0; s < shm->slots; s++) *find(shm, shm->slot_imm[s]) = (at_slot_entry){shm->slot_imm[s], s + 1};
    shm->slots_room = room;
    return AT_OK;
}

/* A slot whose arrivals the owner has all seen may carry another value from now on. */
static int64_t recycle(at_shm *shm) {
    for (uint32_t step = 0; step < HAND_STEPS && step < shm->slots; step++) {
        uint32_t slot = shm->hand;
        shm->hand = (shm->hand + 1) % shm->slots;
        if (atomic_load_explicit(&shm->outbound->drained[slot], memory_order_acquire) == shm->total[slot]) { /* order: recycle 1 */
            forget(shm, shm->slot_imm[slot]);
            return slot;
        }
    }
    return -1;
}

static int64_t slot_of(at_shm *shm, uint32_t imm) {
    if (shm->table != NULL) {
        const at_slot_entry *entry = find(shm, imm);
        if (entry->slot != 0) return (int64_t)entry->slot - 1;
    }
    int64_t slot = shm->slots < SOFT_SLOTS ? -1 : recycle(shm);
    if (slot < 0) {
        if (shm->slots == AT_SLOTS) return AT_EAGAIN;
        if (more_slots(shm) != AT_OK) return AT_EAGAIN;
        slot = shm->slots++;
        shm->total[slot] = 0;
    }
    shm->slot_imm[slot] = imm;
    *find(shm, imm) = (at_slot_entry){imm, (uint32_t)slot + 1};
    atomic_store_explicit(&shm->outbound->imm[slot], imm, memory_order_release); /* order: name 1 */
    return slot;
}

/* An eventfd of the peer's making, of which it may have filled the counter and cleared O_NONBLOCK: a 1 would then wait here for
 * ever. A 0 always fits, and wakes a thread that waits for an edge all the same. */
void at_shm_ring(int fd) {
    uint64_t nothing = 0;
    ssize_t written = write(fd, &nothing, sizeof nothing);
    (void)written;
}

/* With the lane's lock: there is one active word for it. `remote`: what was written under, or NULL for a signal. */
int at_shm_count(at_peer *peer, const at_remote *remote, uint32_t imm, uint64_t n) {
    at_shm *shm = peer->impl;
    at_channel *channel = shm->outbound;
    int64_t found = slot_of(shm, imm);
    if (found < 0) return (int)found;
    int rc = remote != NULL ? at_shm_enter(shm, &channel->active[AT_COUNTING], remote)
                            : atomic_load(&channel->barred) != 0 ? AT_EPEER : AT_OK;
    if (rc != AT_OK) return rc;
    uint32_t slot = (uint32_t)found;
    shm->total[slot] += n;
    _Atomic uint64_t *bitmap = &channel->bitmap[slot / 64], *summary = &channel->summary[slot / 4096];
    uint64_t bit = UINT64_C(1) << (slot % 64), word = UINT64_C(1) << (slot / 64 % 64);
    atomic_store(&channel->count[slot], shm->total[slot]);                  /* order: count 1 */
    if ((atomic_load(bitmap) & bit) == 0)                                   /* order: count 2 */
        atomic_fetch_or(bitmap, bit);                                       /* order: count 3 */
    if ((atomic_load(summary) & word) == 0)                                 /* order: count 4 */
        atomic_fetch_or(summary, word);                                     /* order: count 5 */
    if (atomic_load(&channel->dirty) == 0 &&                                /* order: count 6 */
        atomic_exchange(&channel->dirty, 1) == 0 &&                         /* order: count 7 */
        atomic_load(&shm->control->armed) != 0) {                           /* order: count 8 */
        peer->lane->stats.doorbells_rung++;
        at_shm_ring(shm->outbound_doorbell);
    }
    if (remote != NULL) at_shm_leave(&channel->active[AT_COUNTING]);
    return AT_OK;
}

static int seen_room(at_shm *shm, uint32_t slot) {
    if (slot < shm->seen_room) return AT_OK;
    uint32_t room = shm->seen_room ? shm->seen_room : 64;
    while (room <= slot) room *= 2;
    uint64_t *seen = realloc(shm->seen, room * sizeof *seen);
    if (seen == NULL) return AT_ENOMEM;
    memset(seen + shm->seen_room, 0, (room - shm->seen_room) * sizeof *seen);
    shm->seen = seen;
    shm->seen_room = room;
    return AT_OK;
}

/* Marks without arrivals and rings are paid for by arrivals. A peer that keeps to the protocol marks and rings once for each count, and
 * each count is an arrival, so that it never owes; one that does not is found out after so many. */
static void useless(at_peer *peer, at_shm *shm) {
    if (--shm->idle_rings < 0) at_peer_broke(peer);
}

void at_shm_rung(at_peer *peer) { useless(peer, peer->impl); }

/* Returns 0 when memory is out: the slot stays marked and is looked at again. */
static int take_slot(at_peer *peer, at_shm *shm, uint32_t slot) {
    at_channel *channel = shm->inbound;
    if (seen_room(shm, slot) != AT_OK) return 0;
    uint64_t total = atomic_load(&channel->count[slot]);                                /* order: take 1 */
    uint32_t imm = atomic_load_explicit(&channel->imm[slot], memory_order_relaxed);     /* order: take 2 */
    uint64_t n = total - shm->seen[slot];
    if (n == 0) {
        useless(peer, shm);
        return 1;
    }
    if (shm->idle_rings < AT_IDLE_RINGS) shm->idle_rings += 3; /* for its mark, its ring, and a look that came between them */
    shm->seen[slot] = total;
    atomic_store_explicit(&channel->drained[slot], total, memory_order_release); /* order: take 3 */
    if (n >= WILD) {
        at_peer_broke(peer);
        return 1;
    }
    at_imm_arrive(peer, imm, n);
    return 1;
}

void at_shm_drain(at_peer *peer) {
    at_shm *shm = peer->impl;
    at_channel *channel = shm->inbound;
    if (atomic_load(&channel->dirty) == 0 || peer->broke) return; /* order: drain 1 */
    atomic_store(&channel->dirty, 0);                             /* order: drain 2 */
    for (uint32_t w = 0; w < AT_SLOTS / 4096; w++) {
        if (atomic_load(&channel->summary[w]) == 0) continue;      /* order: drain 3 */
        uint64_t words = atomic_exchange(&channel->summary[w], 0); /* order: drain 4 */
        for (; words != 0; words &= words - 1) {
            uint32_t word = w * 64 + (uint32_t)__builtin_ctzll(words);
            uint64_t bits = atomic_exchange(&channel->bitmap[word], 0); /* order: drain 5 */
            for (; bits != 0 && !peer->broke; bits &= bits - 1) {
                uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(bits);
                if (take_slot(peer, shm, slot)) continue;
                atomic_fetch_or(&channel->bitmap[word], bits);
                atomic_fetch_or(&channel->summary[w], words); /* this one and those behind it */
                atomic_store(&channel->dirty, 1);
                at_shm_ring(shm->inbound_doorbell); /* the writer will not: it is dirty already */
                return;
            }
        }
    }
}
