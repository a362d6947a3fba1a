/* What everything of a lane stands on: its lock, its clock, its process and threads, ids, and its rails. */
#include "lane.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

void at_lock(at_lane *lane) { (void)pthread_mutex_lock(&lane->lock); }
void at_unlock(at_lane *lane) { (void)pthread_mutex_unlock(&lane->lock); }

uint64_t at_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- of which process and thread ---- */

/* A forked child inherits lanes whose threads are gone and whose shared words belong to the parent: every lane remembers
 * the generation it was made in and refuses work in any other. */
static uint32_t fork_generation;
static void forked(void) { fork_generation++; }
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static void fork_hook(void) { (void)pthread_atfork(NULL, NULL, forked); }

void at_belongs_here(at_lane *lane) {
    (void)pthread_once(&fork_once, fork_hook);
    lane->owner = pthread_self();
    lane->fork_generation = fork_generation;
}

int at_is_forked(const at_lane *lane) { return lane->fork_generation != fork_generation; }

int at_check_owner(const at_lane *lane) {
    if (lane == NULL) return AT_ESHUT; /* freed: its engine has forgotten it */
    if (lane->fork_generation != fork_generation) return AT_EFORK;
    if (!pthread_equal(lane->owner, pthread_self())) return AT_ETHREAD;
    return lane->shut ? AT_ESHUT : AT_OK;
}

int at_check_process(const at_lane *lane) {
    if (lane == NULL) return AT_ESHUT;
    return lane->fork_generation != fork_generation ? AT_EFORK : lane->shut ? AT_ESHUT : AT_OK;
}

int at_is_moving(at_lane *lane) {
    int here = 1;
    return atomic_compare_exchange_strong(&lane->moving_here, &here, 2) || here == 2;
}

void at_wait_here(at_lane *lane) {
    if (pthread_equal(lane->owner, pthread_self())) return;
    while (at_is_moving(lane)) (void)pthread_cond_wait(&lane->ended, &lane->lock);
}

/* ---- ids ---- */

int at_grow(void ***items, uint32_t *capacity, uint32_t count) {
    if (count < *capacity) return 0;
    uint32_t next = *capacity ? *capacity * 2 : 16;
    void **more = realloc(*items, next * sizeof *more);
    if (more == NULL) return AT_ENOMEM;
    memset(more + *capacity, 0, (next - *capacity) * sizeof *more);
    *items = more;
    *capacity = next;
    return 0;
}

int64_t at_make_id(uint32_t generation, uint32_t index) {
    return (int64_t)(((uint64_t)generation << 32) | index); /* at most AT_MOST_LIVES */
}

/* ---- rails ---- */

void at_rail_add(at_lane *lane, at_rail *rail) {
    rail->lane = lane;
    rail->next = lane->rails;
    lane->rails = rail;
}

void at_rails_progress(at_rail *first, int turn) {
    for (at_rail *rail = first; rail != NULL; rail = rail->next) rail->progress(rail, turn);
}
