/* The immediate table: how many writes with each 32-bit value have landed, of all senders and by all rails.
 *
 * A value is unknown, early (arrived before it was opened; kept, within a bound per sender), open (a counter exists),
 * retired (its counter was closed: later arrivals are strays) or lost (it arrived early when its sender's bound was
 * exhausted: opening it raises, because its count is not known). A retired value costs eight bytes.
 *
 * What peers can make us hold is bounded: `early_values` early values and as many lost ones for each sender, which is given up when it
 * goes past both, and as many for all senders that have gone: those that went first are forgotten first.
 *
 * Where they lie: values.h. Retired values stay (they are ours). */
#include "lane.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#define MOST_SKIPPED 63u /* waits between two looks that find nothing */

enum { GONE = -2 /* instead of a sender: one that has left */ };

static at_imm_entry *find(const at_lane *lane, uint32_t imm) { return at_values_find(&lane->values, imm); }
static at_imm_record *record_at(const at_lane *lane, int64_t index) { return at_values_record(&lane->values, (uint32_t)index); }

int at_imm_init(at_lane *lane) { return at_values_open(&lane->values); }

static void early_leave(at_lane *lane, at_imm_record *record) {
    at_peer *sender = at_peer_find(lane, record->sender);
    if (sender != NULL && sender->early > 0) sender->early--;
    lane->imm_orphans -= record->sender == GONE;
    lane->stats.early_values--;
}

/* Forget a value, as if it had never arrived. */
static void forget(at_lane *lane, uint32_t index) {
    at_imm_record *record = record_at(lane, index);
    at_values_remove(&lane->values, record->imm);
    if (record->state == AT_IMM_EARLY) {
        early_leave(lane, record);
        lane->stats.overflowed += record->total;
    } else {
        lane->imm_orphans -= record->sender == GONE;
    }
    at_values_record_free(&lane->values, index);
}

void at_imm_departed(at_peer *peer) {
    at_lane *lane = peer->lane;
    uint64_t most = lane->config.early_values, own = (uint64_t)peer->early + peer->overflowed;
    if (own == 0) return;
    int full = lane->imm_orphans + own > most;
    uint64_t lost = full ? most - peer->early : peer->overflowed; /* how many of those are still remembered */
    for (uint32_t i = 0; i < lane->values.count; i++) {
        at_imm_record *record = record_at(lane, i);
        if (record->state != AT_IMM_EARLY && record->state != AT_IMM_OVERFLOWN) continue;
        if (record->sender == GONE && full) {
            forget(lane, i);
        } else if (record->sender == peer->id) {
            if (record->state == AT_IMM_OVERFLOWN && lost-- == 0) {
                lost = 0;
                forget(lane, i);
            } else {
                record->sender = GONE;
                lane->imm_orphans++;
            }
        }
    }
}

/* Records are reused, ids are not: an event under way when its counter was closed finds no record. */
static int64_t record_id(const at_lane *lane, int32_t index) {
    return (int64_t)(((uint64_t)record_at(lane, index)->generation << 32) | (uint32_t)index);
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
        if (!peer->broke) e = lane->imm_blind ? NULL : at_values_entry(&lane->values, imm);
        if (peer->broke || e == NULL) { /* past every bound, or out of memory: not kept, and never silently */
            lane->imm_blind |= !peer->broke;
            lane->stats.overflowed += n;
            return;
        }
    }
    if (e->value == AT_IMM_FRESH) {
        int early = peer->early < lane->config.early_values;
        int32_t index = at_values_record_new(&lane->values, imm, early ? AT_IMM_EARLY : AT_IMM_OVERFLOWN);
        if (index < 0) {
            e->value = AT_IMM_LOST;
            lane->stats.overflowed += n;
            return;
        }
        e->value = index;
        record_at(lane, index)->sender = peer->id;
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
    if (e->value == AT_IMM_LOST || record_at(lane, e->value)->state == AT_IMM_OVERFLOWN) {
        lane->stats.overflowed += n;
        return;
    }
    at_imm_record *record = record_at(lane, e->value);
    record->total += n;
    if (record->want != 0 && record->total - record->taken >= record->want) {
        uint64_t want = record->want;
        record->taken += want;
        record->want = 0; /* stays armed: a waiter usually waits again, and one idle ring disarms it */
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
    if (record < 0 || index >= lane->values.count) return NULL;
    at_imm_record *r = record_at(lane, index);
    return r->state == AT_IMM_OPEN && (int64_t)r->generation == record >> 32 ? r : NULL;
}

int64_t at_imm_open(at_lane *lane, uint32_t imm) {
    int64_t result = AT_ENOMEM;
    at_lock(lane);
    drain_all(lane);
    at_imm_entry *e = find(lane, imm);
    int unknown = e->value == AT_IMM_EMPTY;
    if (unknown ? lane->imm_blind : e->value == AT_IMM_LOST || (e->value >= 0 && record_at(lane, e->value)->state == AT_IMM_OVERFLOWN)) {
        result = AT_EOVERFLOW;
    } else if ((e = at_values_entry(&lane->values, imm)) != NULL) {
        if (e->value < 0) {
            int was_fresh = e->value == AT_IMM_FRESH;
            int32_t index = at_values_record_new(&lane->values, imm, AT_IMM_OPEN);
            if (index >= 0)
                e->value = index;
            else if (was_fresh)
                e->value = AT_IMM_RETIRED;
            result = index >= 0 ? record_id(lane, index) : AT_ENOMEM;
        } else {
            at_imm_record *record = record_at(lane, e->value);
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
            if (arm) { /* before the last look: a writer that counts later rings */
                r->want = UINT64_MAX; /* what the look finds must not disarm again */
                if (!r->armed) {
                    r->armed = 1;
                    armed(lane, 1);
                }
            }
            drain_all(lane);
            r->want = 0;
        }
        result = r->total - r->taken >= n;
        if (result) {
            r->taken += n;
            at_count_turn(lane, 1, 0);
            result = lane->turn_due ? 2 : 1;
        } else if (arm) {
            r->want = n;
        }
    }
    at_unlock(lane);
    return result;
}

/* An answer that another process gives at once is here before this one would be asleep, and waking costs ten times as much as looking.
 * A look that finds nothing makes the next ones rarer, MOST_SKIPPED waits apart at last: a long wait loses next to nothing, and
 * an endless one does not look again. */
int at_imm_take_soon(at_lane *lane, int64_t record, uint64_t n) {
    if (lane->config.spin_ns == 0 || lane->cores < 2 || atomic_load(&lane->neighbours) == 0 || lane->spin_skip != 0) {
        lane->spin_skip -= lane->spin_skip != 0;
        return at_imm_take(lane, record, n, 1);
    }
    int result = at_imm_take(lane, record, n, 0);
    if (result != 0) return result;
    uint64_t until = at_now() + lane->config.spin_ns;
    do {
        (void)sched_yield(); /* on a crowded machine, to the thread that is about to count */
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
    if (found != 0) at_count_turn(lane, 1, 0);
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
        disarm(lane, r);
        find(lane, r->imm)->value = AT_IMM_RETIRED;
        at_values_record_free(&lane->values, (uint32_t)record);
    }
    at_unlock(lane);
    return r != NULL ? AT_OK : AT_EUNKNOWN;
}

void at_imm_destroy(at_lane *lane) { at_values_close(&lane->values); }
