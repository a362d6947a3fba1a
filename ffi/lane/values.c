/* Shelves of immediate values, and blocks of their records: see values.h. */
#ifdef __linux__
#define _GNU_SOURCE
#include <sys/random.h>
#endif
#include "lane.h"

#include <stdlib.h>

#define LEAST 256u    /* slots of a shelf */
#define SLOTS (2 * AT_IMM_SHELF)
#define LAST_BIT 13   /* of the hash, for a split: those below say where on its shelf an entry lies */

static uint32_t hash(const at_imm_values *values, uint32_t imm) { return (uint32_t)((imm * values->multiplier) >> 32); }

/* The shelf that an immediate belongs on. *bit: by which a split of it would go. */
static at_imm_shelf *shelf_of(const at_imm_values *values, uint32_t hashed, int *bit) {
    const at_imm_shelf *shelf = &values->root;
    for (*bit = 31; shelf->halves != NULL; (*bit)--) shelf = &shelf->halves[hashed >> *bit & 1u];
    return (at_imm_shelf *)(uintptr_t)shelf;
}

static at_imm_entry *place(const at_imm_shelf *shelf, uint32_t hashed, uint32_t imm) {
    uint32_t i = hashed & shelf->mask;
    while (shelf->entries[i].value != AT_IMM_EMPTY && shelf->entries[i].imm != imm) i = (i + 1) & shelf->mask;
    return &shelf->entries[i];
}

static int shelf_new(at_imm_shelf *shelf, uint32_t slots) {
    at_imm_entry *entries = malloc((size_t)slots * sizeof *entries);
    if (entries == NULL) return AT_ENOMEM;
    for (uint32_t i = 0; i < slots; i++) entries[i] = (at_imm_entry){0, AT_IMM_EMPTY};
    *shelf = (at_imm_shelf){.entries = entries, .mask = slots - 1};
    return AT_OK;
}

/* Every entry of a shelf goes to `to`, or where `bit` is one of the hash to the half that this names. */
static void move(at_imm_values *values, const at_imm_shelf *from, at_imm_shelf *to, int bit) {
    uint64_t moved = 0;
    for (uint32_t i = 0; i <= from->mask; i++) {
        const at_imm_entry *entry = &from->entries[i];
        if (entry->value == AT_IMM_EMPTY) continue;
        uint32_t hashed = hash(values, entry->imm);
        at_imm_shelf *shelf = bit >= 0 ? &to[hashed >> bit & 1u] : to;
        *place(shelf, hashed, entry->imm) = *entry;
        shelf->used++;
        moved++;
    }
    if (moved > values->moved) values->moved = moved;
    free(from->entries);
}

static int split(at_imm_values *values, at_imm_shelf *shelf, int bit) {
    at_imm_shelf *halves = calloc(2, sizeof *halves);
    if (halves == NULL) return AT_ENOMEM;
    if (shelf_new(&halves[0], SLOTS) != AT_OK || shelf_new(&halves[1], SLOTS) != AT_OK) {
        free(halves[0].entries);
        free(halves);
        return AT_ENOMEM;
    }
    move(values, shelf, halves, bit);
    *shelf = (at_imm_shelf){.halves = halves};
    return AT_OK;
}

static int widen(at_imm_values *values, at_imm_shelf *shelf) {
    at_imm_shelf wider;
    if (shelf_new(&wider, (shelf->mask + 1) * 2) != AT_OK) return AT_ENOMEM;
    move(values, shelf, &wider, -1);
    *shelf = wider;
    return AT_OK;
}

static void shelf_close(at_imm_shelf *shelf) {
    if (shelf->halves != NULL) {
        shelf_close(&shelf->halves[0]);
        shelf_close(&shelf->halves[1]);
    }
    free(shelf->halves);
    free(shelf->entries);
}

int at_values_open(at_imm_values *values) {
    uint64_t random = at_now() ^ (uint64_t)(uintptr_t)values;
#ifdef __linux__
    uint64_t better;
    if (getrandom(&better, sizeof better, GRND_NONBLOCK) == (ssize_t)sizeof better) random = better;
#endif
    values->multiplier = random | 1u;
    return shelf_new(&values->root, LEAST);
}

void at_values_close(at_imm_values *values) {
    shelf_close(&values->root);
    for (uint32_t i = 0; i * AT_IMM_BLOCK < values->count; i++) free(values->blocks[i]);
    free(values->blocks);
    *values = (at_imm_values){.count = 0};
}

at_imm_entry *at_values_find(const at_imm_values *values, uint32_t imm) {
    uint32_t hashed = hash(values, imm);
    int bit;
    return place(shelf_of(values, hashed, &bit), hashed, imm);
}

at_imm_entry *at_values_entry(at_imm_values *values, uint32_t imm) {
    uint32_t hashed = hash(values, imm);
    int bit;
    at_imm_shelf *shelf = shelf_of(values, hashed, &bit);
    at_imm_entry *entry = place(shelf, hashed, imm);
    if (entry->value != AT_IMM_EMPTY) return entry;
    if (shelf->used * 2 > shelf->mask) {
        int rc = shelf->mask + 1 < SLOTS || bit < LAST_BIT ? widen(values, shelf) : split(values, shelf, bit);
        /* Short of memory it fills up more than is good for it, but one entry stays empty, where searches end. */
        if (rc != AT_OK && shelf->used >= shelf->mask) return NULL;
        shelf = shelf_of(values, hashed, &bit);
        entry = place(shelf, hashed, imm);
    }
    shelf->used++;
    *entry = (at_imm_entry){imm, AT_IMM_FRESH};
    return entry;
}

/* Linear probing keeps no tombstones: close the gap behind a removed entry. */
void at_values_remove(at_imm_values *values, uint32_t imm) {
    uint32_t hashed = hash(values, imm);
    int bit;
    at_imm_shelf *shelf = shelf_of(values, hashed, &bit);
    uint32_t mask = shelf->mask, hole = (uint32_t)(place(shelf, hashed, imm) - shelf->entries);
    if (shelf->entries[hole].value == AT_IMM_EMPTY) return;
    for (uint32_t i = (hole + 1) & mask; shelf->entries[i].value != AT_IMM_EMPTY; i = (i + 1) & mask) {
        uint32_t home = hash(values, shelf->entries[i].imm) & mask;
        if (((i - home) & mask) < ((i - hole) & mask)) continue;
        shelf->entries[hole] = shelf->entries[i];
        hole = i;
    }
    shelf->entries[hole].value = AT_IMM_EMPTY;
    shelf->used--;
}

/* ---- records ---- */

static int one_more(at_imm_values *values) {
    uint32_t block = values->count / AT_IMM_BLOCK;
    if (values->count % AT_IMM_BLOCK == 0) {
        if (block == values->block_room) {
            uint32_t room = values->block_room ? values->block_room * 2 : 8;
            at_imm_record **more = realloc(values->blocks, room * sizeof *more);
            if (more == NULL) return AT_ENOMEM;
            values->blocks = more;
            values->block_room = room;
        }
        values->blocks[block] = calloc(AT_IMM_BLOCK, sizeof **values->blocks);
        if (values->blocks[block] == NULL) return AT_ENOMEM;
    }
    values->count++;
    return AT_OK;
}

int32_t at_values_record_new(at_imm_values *values, uint32_t imm, int state) {
    uint32_t index = values->free - 1;
    if (values->free != 0) {
        values->free = at_values_record(values, index)->next_free;
    } else {
        index = values->count;
        if (one_more(values) != AT_OK) return AT_IMM_EMPTY;
    }
    at_imm_record *record = at_values_record(values, index);
    *record = (at_imm_record){.imm = imm, .state = state, .sender = -1, .generation = record->generation + 1};
    return (int32_t)index;
}

void at_values_record_free(at_imm_values *values, uint32_t index) {
    at_imm_record *record = at_values_record(values, index);
    record->state = record->generation < AT_MOST_LIVES ? AT_IMM_FREE : AT_IMM_SPENT;
    if (record->state == AT_IMM_SPENT) return;
    record->next_free = values->free;
    values->free = index + 1;
}

uint64_t at_imm_moved(at_lane *lane) {
    at_lock(lane);
    uint64_t moved = lane->values.moved;
    at_unlock(lane);
    return moved;
}

int at_imm_age(at_lane *lane, uint32_t generation) {
    at_imm_values *values = &lane->values;
    while (values->count < AT_AGED) {
        if (one_more(values) != AT_OK) return AT_ENOMEM;
        at_values_record_free(values, values->count - 1);
    }
    for (uint32_t i = 0; i < values->count; i++)
        if (at_values_record(values, i)->state == AT_IMM_FREE) at_values_record(values, i)->generation = generation;
    return AT_OK;
}
