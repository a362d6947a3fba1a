/* Copiers: native threads for memory that may block the thread that touches it, for any time.
 *
 * A page of memory that a peer registered is the peer's: it may withhold it (userfaultfd, a file on NFS or FUSE), and the system call
 * that copies to it then returns when the peer likes. The same holds for a page of ours that is not plain memory. Such copies are
 * made by copiers alone: never with the lane's lock, never in a submitting call, never by the native thread that answers for us. Where
 * both sides may hold it up, ours is waited for first, outside of the peer.
 *
 * What one peer can cost is bounded. At most one copier is inside the foreign memory of one process, and at most one uses one slow
 * region of ours; so each of them holds up at most one copier, whose operation ends when the page comes, the peer dies or (withdrawn by
 * its deadline) never. Other peers are served by the other copiers: one that has been inside for HELD_NS does not count among those
 * that copy at once, and another one takes its place, up to AT_COPIERS. A copier beyond two that finds nothing to do ends.
 *
 * A lane whose copier is held up when its engine ends is left to it, with all that it uses (end.c). */
#include "copiers.h"
#include "stage.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#define AT_COPIERS 32u                   /* most threads of one lane, held up or not */
#define AT_ONCE 2u                       /* copy at the same time: more do not fill the memory bus any better */
#define HELD_NS UINT64_C(5000000)        /* inside one part for so long: held up */
#define MOST_LOOKS 64u                   /* operations of one queue that are looked at for one that may begin */
#define STACK_BYTES ((size_t)256 << 10)

enum { NONE, AWAKE, IDLE, BUSY, OVER };

typedef struct {
    at_lane *lane;
    pthread_t thread;
    int state;
    int risk;                /* BUSY: what it is inside of */
    int mover;
    at_peer *peer;
    const at_region *region; /* the slow one that it uses, or NULL */
    uint64_t since;          /* when its part began */
} copier;

struct at_copiers {
    pthread_cond_t wanted;
    uint32_t alive, idle, busy, turn;
    copier all[AT_COPIERS];
};

/* What a copier can do next. Without an operation: find out how the peer's memory is reached. */
typedef struct {
    at_peer *peer;
    at_op *op;
    int risk, mover;
} job;

/* ---- which job may begin ---- */

/* Which active word one more copier may use with this peer; -1: none. */
static int free_word(const at_copiers *copiers, const at_peer *peer, int risk) {
    uint32_t taken = 0;
    for (uint32_t i = 0; i < AT_COPIERS && copiers->busy != 0; i++) {
        const copier *one = &copiers->all[i];
        if (one->state != BUSY || one->risk != risk) continue;
        if (risk == AT_RISK_FOREIGN && (one->peer == peer || (peer->process != 0 && one->peer->process == peer->process))) return -1;
        if (risk == AT_RISK_SLOW && one->peer == peer) taken |= 1u << (one->mover - AT_MOVER_SLOW);
    }
    if (risk == AT_RISK_FOREIGN) return AT_MOVER_FOREIGN;
    int word = 0;
    while (word < AT_SLOW_WORDS && (taken >> word & 1u)) word++;
    return word < AT_SLOW_WORDS ? AT_MOVER_SLOW + word : -1;
}

static int region_taken(const at_copiers *copiers, const at_op *op) {
    if (!op->waits) return 0;
    for (uint32_t i = 0; i < AT_COPIERS; i++)
        if (copiers->all[i].state == BUSY && copiers->all[i].region == op->region) return 1;
    return 0;
}

static int find_job(const at_lane *lane, job *out) {
    const at_copiers *copiers = lane->copiers;
    if (lane->risky == 0) return 0;
    for (uint32_t k = 0; k < lane->peer_count; k++) {
        at_peer *peer = lane->peers[(copiers->turn + k) % lane->peer_count];
        if (peer == NULL || (peer->probe != AT_PROBE_WANTED && peer->lines[AT_RISK_FOREIGN].head == NULL && peer->lines[AT_RISK_SLOW].head == NULL))
            continue;
        int words[AT_RISKS] = {-1, free_word(copiers, peer, AT_RISK_FOREIGN), free_word(copiers, peer, AT_RISK_SLOW)};
        if (peer->probe == AT_PROBE_WANTED && words[AT_RISK_FOREIGN] >= 0) {
            *out = (job){.peer = peer, .risk = AT_RISK_FOREIGN};
            return 1;
        }
        for (int risk = AT_RISK_FOREIGN; risk < AT_RISKS; risk++) {
            uint32_t looks = 0;
            for (at_op *op = peer->lines[risk].head; op != NULL && looks < MOST_LOOKS; op = op->next, looks++) {
                /* what waits for memory of ours does that first, and takes no place in the peer meanwhile */
                int as = op->waits ? AT_RISK_SLOW : risk;
                if (words[as] < 0 || region_taken(copiers, op) || (peer->port->window != 0 && !at_stage_may(op))) continue;
                *out = (job){.peer = peer, .op = op, .risk = as, .mover = words[as]};
                return 1;
            }
        }
    }
    return 0;
}

/* How many are copying and not held up. */
static uint32_t copying(const at_copiers *copiers) {
    if (copiers->busy < AT_ONCE) return copiers->busy;
    uint32_t count = 0;
    uint64_t now = at_now();
    for (uint32_t i = 0; i < AT_COPIERS; i++)
        count += copiers->all[i].state == BUSY && now - copiers->all[i].since < HELD_NS;
    return count;
}

/* ---- the threads ---- */

static void another(at_lane *lane);

static void run(copier *me, const job *job) {
    at_lane *lane = me->lane;
    at_copiers *copiers = lane->copiers;
    at_peer *peer = job->peer;
    peer->users++;
    me->peer = peer;
    me->risk = job->risk;
    me->mover = job->mover;
    me->region = job->op != NULL && job->op->waits ? job->op->region : NULL;
    me->since = at_now();
    me->state = BUSY;
    copiers->busy++;
    copiers->turn = peer->index + 1;
    if (lane->risky > 1) another(lane);
    lane->copier_job(lane, peer, job->op, job->risk, job->mover, &me->since);
    copiers->busy--;
    me->state = AWAKE;
    at_peer_release(peer);
}

static void rest(copier *me, int found) {
    at_copiers *copiers = me->lane->copiers;
    me->state = IDLE;
    copiers->idle++;
    if (found) { /* it waits for those that copy: when one of them is held up, its place is free */
        uint64_t at = at_now() + HELD_NS;
        struct timespec until = {(time_t)(at / 1000000000u), (long)(at % 1000000000u)};
        (void)pthread_cond_timedwait(&copiers->wanted, &me->lane->lock, &until);
    } else {
        (void)pthread_cond_wait(&copiers->wanted, &me->lane->lock);
    }
    copiers->idle--;
    me->state = AWAKE;
}

static void *copier_main(void *argument) {
    copier *me = argument;
    at_lane *lane = me->lane;
    at_lock(lane);
    at_copiers *copiers = lane->copiers;
    while (!lane->thread_stop) {
        job job;
        int found = find_job(lane, &job);
        if (found && copying(copiers) < AT_ONCE) run(me, &job);
        else if (!found && copiers->idle >= AT_ONCE) break;
        else rest(me, found);
    }
    me->state = OVER;
    copiers->alive--;
    at_thread_left(lane);
    at_unlock(lane);
    return NULL;
}

static int start(at_lane *lane) {
    at_copiers *copiers = lane->copiers;
    uint32_t i = 0;
    while (i < AT_COPIERS && copiers->all[i].state != NONE && copiers->all[i].state != OVER) i++;
    if (i == AT_COPIERS) return EAGAIN;
    copier *one = &copiers->all[i];
    if (one->state == OVER) (void)pthread_join(one->thread, NULL);
    *one = (copier){.lane = lane};
    int rc = at_thread_new(lane, &one->thread, copier_main, one, "aiotransfer cp", STACK_BYTES);
    if (rc == 0) {
        one->state = AWAKE;
        copiers->alive++;
    }
    return rc;
}

/* Wake one, or start one when all are busy, if there is something that may begin. */
static void another(at_lane *lane) {
    at_copiers *copiers = lane->copiers;
    job job;
    if (lane->thread_stop || copiers->alive > copiers->busy + copiers->idle || !find_job(lane, &job)) return; /* one is on its way to look */
    if (copiers->idle != 0) (void)pthread_cond_signal(&copiers->wanted);
    else (void)start(lane);
}

void at_copiers_pin(at_lane *lane) {
    for (uint32_t i = 0; lane->copiers != NULL && i < AT_COPIERS; i++)
        if (lane->copiers->all[i].state != NONE && lane->copiers->all[i].state != OVER) at_cpus_give(&lane->cpus, lane->copiers->all[i].thread);
}

int at_copiers_ready(at_lane *lane) {
    if (lane->thread_stop) return AT_ESHUT;
    if (lane->copiers == NULL) {
        at_copiers *copiers = calloc(1, sizeof *copiers);
        if (copiers == NULL) return AT_ENOMEM;
        pthread_condattr_t monotonic;
        (void)pthread_condattr_init(&monotonic);
#ifdef __linux__
        (void)pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
#endif
        (void)pthread_cond_init(&copiers->wanted, &monotonic);
        (void)pthread_condattr_destroy(&monotonic);
        lane->copiers = copiers;
    }
    if (lane->copiers->alive != 0) return AT_OK;
    int rc = start(lane);
    if (rc == 0) return AT_OK;
    lane->oserror = rc;
    return AT_EIO;
}

void at_copiers_call(at_lane *lane) {
    if (lane->risky != 0 && at_copiers_ready(lane) == AT_OK) another(lane);
}

/* ---- their end ---- */

void at_copiers_ask(at_lane *lane) {
    if (lane->copiers != NULL) (void)pthread_cond_broadcast(&lane->copiers->wanted);
}

void at_copiers_join(at_lane *lane) {
    at_copiers *copiers = lane->copiers;
    if (copiers == NULL) return;
    for (uint32_t i = 0; i < AT_COPIERS; i++)
        if (copiers->all[i].state == OVER) (void)pthread_join(copiers->all[i].thread, NULL);
    (void)pthread_cond_destroy(&copiers->wanted);
    free(copiers);
    lane->copiers = NULL;
}
