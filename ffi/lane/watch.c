/* Watched words: 64-bit words that something outside this library changes (a kernel, another process). No doorbell rings for them, so
 * the native thread looks: often while they change, ever more rarely while they do not. */
#include "lane.h"
#include "own.h"

#include <stdlib.h>

#define PAUSE_LEAST ((uint64_t)50000)   /* ns: right after a change */
#define PAUSE_MOST ((uint64_t)4000000)  /* ns: nothing has changed for a while */

/* What the word is now. AT_EMEMORY when it lies in a mapping of a file that was shortened: touching it would end the process. The kernel
 * says so, but what it copies may be half of one value and half of the next, so the value itself is loaded. A file that is shortened
 * between these two is shortened too fast for us. */
static int look(const at_watch *watch, uint64_t *value) {
    if (watch->file && at_own_copy(value, (const void *)watch->word, sizeof *value) != 0) return AT_EMEMORY;
    *value = atomic_load_explicit(watch->word, memory_order_acquire); /* order: alone: one word, looked at again and again */
    return AT_OK;
}

static int one_more(at_lane *lane) {
    if (lane->watch_count == lane->watch_capacity) {
        uint32_t next = lane->watch_capacity ? lane->watch_capacity * 2 : 8;
        at_watch *more = realloc(lane->watches, next * sizeof *more);
        if (more == NULL) return AT_ENOMEM;
        lane->watches = more;
        lane->watch_capacity = next;
    }
    lane->watches[lane->watch_count++] = (at_watch){.word = NULL};
    return AT_OK;
}

int at_watches_age(at_lane *lane, uint32_t generation) {
    while (lane->watch_count < AT_AGED)
        if (one_more(lane) != AT_OK) return AT_ENOMEM;
    for (uint32_t i = 0; i < lane->watch_count; i++)
        if (lane->watches[i].word == NULL) lane->watches[i].generation = generation;
    return AT_OK;
}

int64_t at_watch_add(at_lane *lane, const void *word, uint64_t *value) {
    int64_t id = AT_ENOMEM;
    int file = at_own_kind(word, sizeof *value) != AT_FILE_NONE;
    at_lock(lane);
    uint32_t i = 0;
    while (i < lane->watch_count && (lane->watches[i].word != NULL || lane->watches[i].generation == AT_MOST_LIVES)) i++;
    if (i == lane->watch_count && one_more(lane) != AT_OK) goto out;
    at_watch *watch = &lane->watches[i];
    *watch = (at_watch){.word = word, .generation = watch->generation + 1, .file = file};
    if (look(watch, value) == AT_OK) {
        watch->told = *value;
        id = at_make_id(watch->generation, i);
    } else {
        watch->word = NULL;
        id = AT_EMEMORY;
    }
out:
    at_unlock(lane);
    return id;
}

static at_watch *find(at_lane *lane, int64_t id) {
    uint32_t index = (uint32_t)id;
    if (id < 0 || index >= lane->watch_count) return NULL;
    at_watch *watch = &lane->watches[index];
    return watch->word != NULL && watch->generation == (uint32_t)(id >> 32) ? watch : NULL;
}

int at_watch_next(at_lane *lane, int64_t id, uint64_t *value) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_watch *watch = find(lane, id);
    if (watch != NULL) {
        if (look(watch, value) != AT_OK) {
            at_unlock(lane);
            return AT_EMEMORY;
        }
        result = *value != watch->told;
        watch->armed = !result;
        watch->told = *value;
        lane->watch_pause = PAUSE_LEAST;
        if (!result && (at_thread_start(lane) != AT_OK || !lane->thread_started)) result = AT_EIO;
        if (!result) at_thread_kick(lane);
    }
    at_unlock(lane);
    return result;
}

int at_watch_close(at_lane *lane, int64_t id) {
    at_lock(lane);
    at_watch *watch = find(lane, id);
    if (watch != NULL) watch->word = NULL;
    at_unlock(lane);
    return watch != NULL ? AT_OK : AT_EUNKNOWN;
}

uint64_t at_watch_look(at_lane *lane) {
    int armed = 0, changed = 0;
    for (uint32_t i = 0; i < lane->watch_count; i++) {
        at_watch *watch = &lane->watches[i];
        if (watch->word == NULL || !watch->armed) continue;
        uint64_t value = watch->told;
        int status = look(watch, &value);
        if (status == AT_OK && value == watch->told) {
            armed = 1;
            continue;
        }
        if (status == AT_OK) watch->told = value;
        watch->armed = 0;
        changed = 1;
        at_event_push(lane, AT_EV_WATCH, (uint64_t)at_make_id(watch->generation, i), status, value);
    }
    if (changed || lane->watch_pause == 0) lane->watch_pause = PAUSE_LEAST;
    else if (armed) lane->watch_pause += lane->watch_pause / 2;
    if (lane->watch_pause > PAUSE_MOST) lane->watch_pause = PAUSE_MOST;
    return armed ? lane->watch_pause : 0;
}
