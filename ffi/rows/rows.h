/* What the kernels of weigh.c share. */
#ifndef AT_ROWS_H
#define AT_ROWS_H

#include <stddef.h>
#include <stdint.h>

#include "native.h"

/* One token: the rows that it sums and where the sum goes. */
typedef struct {
    uint8_t *out;
    const uint64_t *rows, *next; /* addresses, 0: left out; next: those that are summed afterwards */
    const float *weights;
    uint64_t choices, hidden;
    int src_kind, out_kind;
} at_sum;

static inline const uint8_t *at_row_at(uint64_t address) { return (const uint8_t *)(uintptr_t)address; }
static inline size_t at_row_width(int kind) { return kind == AT_ROW_F32 ? 4 : 2; }

/* Sums the columns from `column` on, with the instructions that every processor has. */
void at_sum_plain(const at_sum *sum, uint64_t column);
/* Sum columns from the first on, as many as fill vectors; return how many that were. */
uint64_t at_sum_avx2(const at_sum *sum);
uint64_t at_sum_avx512(const at_sum *sum);

#endif
