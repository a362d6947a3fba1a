/* What the immediate table (imm.c) is kept in: a record for each value that is counted, and an entry for each value that was ever seen.
 *
 * A retired value is never forgotten, so there may be very many entries, and none of the calls that add one may take long. They lie on
 * shelves of at most AT_IMM_SHELF entries. A shelf that is full is split in two by the next bit of the hash: one call moves the entries of
 * one shelf and no more. Records lie in blocks and never move. */
#ifndef AT_VALUES_H
#define AT_VALUES_H

#include <stdint.h>

#define AT_IMM_SHELF 4096u
#define AT_IMM_BLOCK 4096u

typedef struct {
    uint32_t imm;
    uint32_t generation;
    int state;          /* AT_IMM_* */
    int armed;          /* counted in lane->armed */
    uint64_t total, taken, want; /* want 0: no task waits */
    int64_t sender;     /* the peer that brought it first, for the bound */
    uint32_t next_free; /* of those that are free, + 1; 0: the last */
} at_imm_record;

enum { AT_IMM_FREE, AT_IMM_OPEN, AT_IMM_EARLY, AT_IMM_OVERFLOWN, AT_IMM_SPENT /* its generations are used up */ };

typedef struct {
    uint32_t imm;
    int32_t value; /* record index, or AT_IMM_RETIRED / AT_IMM_LOST */
} at_imm_entry;

enum { AT_IMM_EMPTY = -1, AT_IMM_RETIRED = -2, AT_IMM_LOST = -3, AT_IMM_FRESH = -100 /* until the caller says what it becomes */ };

typedef struct at_imm_shelf at_imm_shelf;
struct at_imm_shelf {
    at_imm_shelf *halves;  /* two, by the next bit of the hash; NULL: the entries are here */
    at_imm_entry *entries; /* open addressing with linear probing */
    uint32_t used, mask;
};

typedef struct {
    at_imm_shelf root;
    uint64_t multiplier; /* of the hash, random: peers choose values, and shall not choose where they lie */
    at_imm_record **blocks;
    uint32_t block_room, count, free; /* free: the first free record, + 1; 0: none */
    uint64_t moved;                   /* the most entries that one call has moved to another place */
} at_imm_values;

int at_values_open(at_imm_values *values); /* AT_OK or AT_ENOMEM */
void at_values_close(at_imm_values *values);
at_imm_entry *at_values_find(const at_imm_values *values, uint32_t imm); /* its entry, or where it would be: AT_IMM_EMPTY */
at_imm_entry *at_values_entry(at_imm_values *values, uint32_t imm);      /* made where there is none; NULL: no memory */
void at_values_remove(at_imm_values *values, uint32_t imm);              /* as if it had never been there */

static inline at_imm_record *at_values_record(const at_imm_values *values, uint32_t index) {
    return &values->blocks[index / AT_IMM_BLOCK][index % AT_IMM_BLOCK];
}
int32_t at_values_record_new(at_imm_values *values, uint32_t imm, int state); /* its index, or AT_IMM_EMPTY: no memory */
void at_values_record_free(at_imm_values *values, uint32_t index);

#endif
