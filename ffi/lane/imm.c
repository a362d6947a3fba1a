/* The immediate table: how many writes with each 32-bit value have landed, whoever brought them and by whatever rail.
 *
 * A value is unknown, early (arrived before anybody opened it; kept, within a bound per sender), open (a counter exists),
 * retired (its counter was closed: later arrivals are strays) or lost (it arrived early when its sender's bound was
 * exhausted: opening it raises, because its count is not known). A retired value costs eight bytes.
 *
 * What peers can make us hold is bounded: `early_values` early values and as many lost ones for each sender, who is given up when he
 * goes past both, and as many for all senders that have gone: those that went first are forgotten first.
 *
 * The table is open addressing with linear probing on a multiplicative hash; retired values stay in it (they are ours). */
#include "lane.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#define MOST_SKIPPED 63u /* waits between two looks that find nothing */

enum { FRESH = -100, GONE = -2 /* instead of a sender: one that has left */ };

static uint32_t hash(uint32_t imm) { return (uint32_t)((imm * UINT64_C(0x9E3779B97F4A7C15)) >> 32); }

static at_imm_entry *find(const at_lane *lane, uint32_t imm) {
    uint32_t i = hash(imm) & lane->imm_mask;
    while (lane->imm_table[i].value != AT_IMM_EMPTY && lane->imm_table[i].imm != imm) i = (i + 1) & lane->imm_mask;
    return &lane->imm_table[i];
}

static int rehash(at_lane *lane, uint32_t size) {
    at_imm_entry *old = lane->imm_table;
    uint32_t old_size = old == NULL ? 0 : lane->imm_mask + 1;
    at_imm_entry *table = malloc((size_t)size * sizeof *table);
    if (table == NULL) return AT_ENOMEM;
    for (uint32_t i = 0; i < size; i++) table[i] = (at_imm_entry){0, AT_IMM_EMPTY};
    lane->imm_table = table;
    lane->imm_mask = size - 1;
    for (uint32_t i = 0; i < old_size; i++)
        if (old[i].value != AT_IMM_EMPTY) *find(lane, old[i].imm) = old[i];
    free(old);
    return AT_OK;
}

int at_imm_init(at_lane *lane) { return rehash(lane, 256); }

/* The entry of imm, made when it is not there; NULL when memory is out. */
static at_imm_entry *entry(at_lane *lane, uint32_t imm) {
    /* Short of memory it fills up more than is good for it, but one entry stays empty, where searches end. */
    at_imm_entry *e = find(lane, imm);
    if (e->value != AT_IMM_EMPTY) return e;
    if ((uint64_t)lane->imm_used * 2 > lane->imm_mask) {
        if (rehash(lane, (lane->imm_mask + 1) * 2) != AT_OK && lane->imm_used >= lane->imm_mask) return NULL;
        e = find(lane, imm);
    }
    lane->imm_used++;
    *e = (at_imm_entry){imm, FRESH}; /* the caller says what it becomes */
    return e;
}

static int one_more(at_lane *lane) {
    if (lane->imm_count == lane->imm_capacity) {
        uint32_t next = lane->imm_capacity ? lane->imm_capacity * 2 : 64;
        at_imm_record *more = realloc(lane->imm, next * sizeof *more);
        if (more == NULL) return AT_ENOMEM;
        memset(more + lane->imm_capacity, 0, (next - lane->imm_capacity) * sizeof *more);
        lane->imm = more;
        lane->imm_capacity = next;
    }
    lane->imm_count++;
    return AT_OK;
}

static int32_t record_new(at_lane *lane, uint32_t imm, int state) {
    uint32_t i = lane->imm_free;
    while (i < lane->imm_count && lane->imm[i].state != AT_IMM_FREE) i++;
    if (i == lane->imm_count && one_more(lane) != AT_OK) return AT_IMM_EMPTY;
    lane->imm_free = i + 1;
    uint32_t generation = lane->imm[i].generation + 1;
    lane->imm[i] = (at_imm_record){.imm = imm, .state = state, .sender = -1, .generation = generation};
    return (int32_t)i;
}

static void record_free(at_lane *lane, at_imm_record *record) {
    uint32_t index = (uint32_t)(record - lane->imm);
    record->state = record->generation < AT_MOST_LIVES ? AT_IMM_FREE : AT_IMM_SPENT;
    if (index < lane->imm_free) lane->imm_free = index;
}

int at_imm_age(at_lane *lane, uint32_t generation) {
    while (lane->imm_count < AT_AGED)
        if (one_more(lane) != AT_OK) return AT_ENOMEM;
    for (uint32_t i = 0; i < lane->imm_count; i++)
        if (lane->imm[i].state == AT_IMM_FREE) lane->imm[i].generation = generation;
    return AT_OK;
}

static void early_leave(at_lane *lane, at_imm_record *record) {
    at_peer *sender = at_peer_find(lane, record->sender);
    if (sender != NULL && sender->early > 0) sender->early--;
    lane->imm_orphans -= record->sender == GONE;
    lane->stats.early_values--;
}

/* As if it had never arrived. Linear probing keeps no tombstones: close the gap behind a removed entry. */
static void forget(at_lane *lane, at_imm_record *record) {
    uint32_t mask = lane->imm_mask, hole = (uint32_t)(find(lane, record->imm) - lane->imm_table);
    for (uint32_t i = (hole + 1) & mask; lane->imm_table[i].value != AT_IMM_EMPTY; i = (i + 1) & mask) {
        uint32_t home = hash(lane->imm_table[i].imm) & mask;
        if (((i - home) & mask) < ((i - hole) & mask)) continue;
        lane->imm_table[hole] = lane->imm_table[i];
        hole = i;
    }
    lane->imm_table[hole].value = AT_IMM_EMPTY;
    lane->imm_used--;
    if (record->state == AT_IMM_EARLY) {
        early_leave(lane, record);
        lane->stats.overflowed += record->total;
    } else {
        lane->imm_orphans -= record->sender == GONE;
    }
    record_free(lane, record);
}

void at_imm_departed(at_peer *peer) {
    at_lane *lane = peer->lane;
    uint64_t most = lane->config.early_values, own = (uint64_t)peer->early + peer->overflowed;
    if (own == 0) return;
    int full = lane->imm_orphans + own > most;
    uint64_t lost = full ? most - peer->early : peer->overflowed; /* how many of those are still remembered */
    for (uint32_t i = 0; i < lane->imm_count; i++) {
        at_imm_record *record = &lane->imm[i];
        if (record->state != AT_IMM_EARLY && record->state != AT_IMM_OVERFLOWN) continue;
        if (record->sender == GONE && full) {
            forget(lane, record);
        } else if (record->sender == peer->id) {
            if (record->state == AT_IMM_OVERFLOWN && lost-- == 0) {
                lost = 0;
                forget(lane, record);
            } else {
                record->sender = GONE;
                lane->imm_orphans++;
            }
        }
    }
}

/* Records are reused, ids are not: an event under way when its counter was closed finds nobody. */
static int64_t record_id(const at_lane *lane, int32_t index) {
    return (int64_t)(((uint64_t)lane->imm[index].generation << 32) | (uint32_t)index);
}

static void armed(at_lane *lane, int change) {
    lane->armed = (uint32_t)((int64_t)lane->armed + change);
    atomic_store(&lane->control->armed, lane->armed != 0); /* order: arm 1 */
}

static void disarm(at_lane *lane, at_imm_record *r) {
    r->want = 0;
    if (r->armed) {
        r->armed = 0;
        armed(lane, -1);
    }
}

void at_imm_arrive(at_peer *peer, uint32_t imm, uint64_t n) {
    at_lane *lane = peer->lane;
    lane->stats.arrivals += n;
    at_imm_entry *e = find(lane, imm);
    if (e->value == AT_IMM_EMPTY) {
        if (peer->overflowed >= lane->config.early_values) at_peer_broke(peer);
        if (!peer->broke) e = lane->imm_blind ? NULL : entry(lane, imm);
        if (peer->broke || e == NULL) { /* past every bound, or out of memory: not kept, and never silently */
            lane->imm_blind |= !peer->broke;
            lane->stats.overflowed += n;
            return;
        }
    }
    if (e->value == FRESH) {
        int early = peer->early < lane->config.early_values;
        int32_t index = record_new(lane, imm, early ? AT_IMM_EARLY : AT_IMM_OVERFLOWN);
        if (index < 0) {
            e->value = AT_IMM_LOST;
            lane->stats.overflowed += n;
            return;
        }
        e->value = index;
        lane->imm[index].sender = peer->id;
        if (early) {
            peer->early++;
            lane->stats.early_values++;
        } else {
            peer->overflowed++;
        }
    }
    if (e->value == AT_IMM_RETIRED) {
        lane->stats.strays += n;
        return;
    }
    if (e->value == AT_IMM_LOST || lane->imm[e->value].state == AT_IMM_OVERFLOWN) {
        lane->stats.overflowed += n;
        return;
    }
    at_imm_record *record = &lane->imm[e->value];
    record->total += n;
    if (record->want != 0 && record->total - record->taken >= record->want) {
        uint64_t want = record->want;
        record->taken += want;
        record->want = 0; /* stays armed: whoever waited usually waits again, and one idle ring disarms it */
        at_event_push(lane, AT_EV_COUNT, (uint64_t)record_id(lane, e->value), AT_OK, want);
    } else if (record->want == 0 && record->armed) {
        disarm(lane, record);
    }
}

static void drain_all(at_lane *lane) {
    for (uint32_t i = 0; i < lane->peer_count; i++)
        if (lane->peers[i] != NULL) lane->peers[i]->port->drain(lane->peers[i]);
}

static at_imm_record *record_of(at_lane *lane, int64_t record) {
    uint32_t index = (uint32_t)record;
    if (record < 0 || index >= lane->imm_count) return NULL;
    at_imm_record *r = &lane->imm[index];
    return r->state == AT_IMM_OPEN && (int64_t)r->generation == record >> 32 ? r : NULL;
}

int64_t at_imm_open(at_lane *lane, uint32_t imm) {
    int64_t result = AT_ENOMEM;
    at_lock(lane);
    drain_all(lane);
    at_imm_entry *e = find(lane, imm);
    int unknown = e->value == AT_IMM_EMPTY;
    if (unknown ? lane->imm_blind : e->value == AT_IMM_LOST || (e->value >= 0 && lane->imm[e->value].state == AT_IMM_OVERFLOWN)) {
        result = AT_EOVERFLOW;
    } else if ((e = entry(lane, imm)) != NULL) {
        if (e->value < 0) {
            int was_fresh = e->value == FRESH;
            int32_t index = record_new(lane, imm, AT_IMM_OPEN);
            if (index >= 0)
                e->value = index;
            else if (was_fresh)
                e->value = AT_IMM_RETIRED;
            result = index >= 0 ? record_id(lane, index) : AT_ENOMEM;
        } else {
            at_imm_record *record = &lane->imm[e->value];
            if (record->state == AT_IMM_EARLY) {
                early_leave(lane, record);
                record->state = AT_IMM_OPEN;
            }
            result = record_id(lane, e->value);
        }
    }
    at_unlock(lane);
    return result;
}

int at_imm_known(at_lane *lane, uint32_t imm) {
    at_lock(lane);
    drain_all(lane);
    at_imm_entry *e = find(lane, imm);
    int known = lane->imm_blind || e->value != AT_IMM_EMPTY;
    at_unlock(lane);
    return known;
}

int at_imm_take(at_lane *lane, int64_t record, uint64_t n, int arm) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_imm_record *r = record_of(lane, record);
    if (r != NULL) {
        r->want = 0;
        if (r->total - r->taken < n) {
            if (arm) { /* before the last look: whoever counts later rings */
                r->want = UINT64_MAX; /* what the look finds must not disarm again */
                if (!r->armed) {
                    r->armed = 1;
                    armed(lane, 1);
                }
            }
            drain_all(lane);
            r = &lane->imm[(uint32_t)record]; /* draining may have moved the records */
            r->want = 0;
        }
        result = r->total - r->taken >= n;
        if (result) {
            r->taken += n;
            at_count_turn(lane, 0);
            result = lane->turn_due ? 2 : 1;
        } else if (arm) {
            r->want = n;
        }
    }
    at_unlock(lane);
    return result;
}

/* An answer that another process gives at once is here before this one would be asleep, and waking costs ten times as much as looking.
 * A look that finds nothing makes the next ones rarer, MOST_SKIPPED waits apart at last: who waits for long loses next to nothing, and
 * who waits for ever does not look again. */
int at_imm_take_soon(at_lane *lane, int64_t record, uint64_t n) {
    if (lane->config.spin_ns == 0 || lane->cores < 2 || atomic_load(&lane->neighbours) == 0 || lane->spin_skip != 0) {
        lane->spin_skip -= lane->spin_skip != 0;
        return at_imm_take(lane, record, n, 1);
    }
    int result = at_imm_take(lane, record, n, 0);
    if (result != 0) return result;
    uint64_t until = at_now() + lane->config.spin_ns;
    do {
        (void)sched_yield(); /* on a crowded machine, to whoever is about to count */
        result = at_imm_take(lane, record, n, 0);
    } while (result == 0 && at_now() < until);
    at_lock(lane);
    lane->stats.spins++;
    lane->stats.spins_found += result != 0;
    if (result == 1 && at_now() - lane->turn_start > lane->config.turn_ns) { /* looking takes longer than what the turn counts for it */
        lane->turn_due = 1;
        result = 2;
    }
    at_unlock(lane);
    lane->spin_pause = result != 0 ? 0 : lane->spin_pause < MOST_SKIPPED ? 2 * lane->spin_pause + 1 : MOST_SKIPPED;
    lane->spin_skip = lane->spin_pause;
    return result != 0 ? result : at_imm_take(lane, record, n, 1);
}

int at_imm_take_each(at_lane *lane, uint32_t n, const int64_t *records, const uint64_t *wanted, int32_t *taken) {
    int found = 0;
    at_lock(lane);
    drain_all(lane);
    for (uint32_t i = 0; i < n; i++) {
        at_imm_record *r = record_of(lane, records[i]);
        taken[i] = r != NULL && r->want == 0 && r->total - r->taken >= wanted[i];
        if (taken[i]) r->taken += wanted[i];
        found += taken[i];
    }
    if (found != 0) at_count_turn(lane, 0);
    int result = found == 0 ? 0 : lane->turn_due ? 2 : 1;
    at_unlock(lane);
    return result;
}

int at_imm_give(at_lane *lane, int64_t record, uint64_t n) {
    at_lock(lane);
    at_imm_record *r = record_of(lane, record);
    if (r != NULL && r->taken >= n) r->taken -= n;
    at_unlock(lane);
    return r != NULL ? AT_OK : AT_EUNKNOWN;
}

int at_imm_disarm(at_lane *lane, int64_t record) {
    at_lock(lane);
    at_imm_record *r = record_of(lane, record);
    if (r != NULL) disarm(lane, r);
    at_unlock(lane);
    return r != NULL ? AT_OK : AT_EUNKNOWN;
}

int at_imm_value(at_lane *lane, int64_t record, uint64_t *total, uint64_t *taken) {
    at_lock(lane);
    at_imm_record *r = record_of(lane, record);
    if (r != NULL) {
        drain_all(lane);
        r = &lane->imm[(uint32_t)record];
        *total = r->total;
        *taken = r->taken;
    }
    at_unlock(lane);
    return r != NULL ? AT_OK : AT_EUNKNOWN;
}

int at_imm_close(at_lane *lane, int64_t record) {
    at_lock(lane);
    at_imm_record *r = record_of(lane, record);
    if (r != NULL) {
        drain_all(lane); /* what landed before the close is no stray */
        r = &lane->imm[(uint32_t)record];
        disarm(lane, r);
        find(lane, r->imm)->value = AT_IMM_RETIRED;
        record_free(lane, r);
    }
    at_unlock(lane);
    return r != NULL ? AT_OK : AT_EUNKNOWN;
}

void at_imm_destroy(at_lane *lane) {
    free(lane->imm);
    free(lane->imm_table);
    lane->imm = NULL;
    lane->imm_table = NULL;
}
