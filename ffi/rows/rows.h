/* What the kernels of this folder share. */
#ifndef AT_ROWS_H
#define AT_ROWS_H

#include <stddef.h>
#include <stdint.h>

#include "rows/decls.h"

/* One token: the rows that it sums and where the sum goes. */
typedef struct {
    uint8_t *out;
    const uint64_t *rows, *next; /* addresses, 0: left out; next: those that are summed afterwards */
    const float *weights;
    uint64_t choices, hidden;
    int src_kind, out_kind;
} at_sum;

static inline const uint8_t *at_row_at(uint64_t address) { return (const uint8_t *)(uintptr_t)address; }
static inline size_t at_row_width(int kind) { return kind == AT_ROW_F64 ? 8 : kind == AT_ROW_F32 ? 4 : 2; }

/* Instructions to use: 0 plain C, 1 AVX2 and F16C, 2 AVX-512 (F and BW); level.c. */
int at_rows_level(void);

/* Sums the columns from `column` on, with the instructions that every processor has. */
void at_sum_plain(const at_sum *sum, uint64_t column);
/* Sum columns from the first on, as many as fill vectors; return how many that were. */
uint64_t at_sum_avx2(const at_sum *sum);
uint64_t at_sum_avx512(const at_sum *sum);

/* A block of a matrix, and where it goes as float8_e4m3fn. */
typedef struct {
    uint8_t *dst;
    const uint8_t *src, *next; /* next: the block that is read afterwards, or NULL */
    uint64_t dst_row, src_row, src_column; /* strides in bytes */
    uint64_t rows, columns;
    int kind; /* of src */
    float scale;
} at_block;

/* Convert as many of n numbers of one kind to another as fill vectors; return how many that were. */
uint64_t at_cast_avx2(uint8_t *dst, const uint8_t *src, uint64_t n, int to, int of);
uint64_t at_cast_avx512(uint8_t *dst, const uint8_t *src, uint64_t n, int to, int of);
/* The greatest magnitude by its bits, in as many columns as fill vectors; return how many that were. */
uint64_t at_most_avx2(const at_block *block, uint32_t *most);
uint64_t at_most_avx512(const at_block *block, uint32_t *most);
/* Quantise as many columns as fill vectors; return how many that were. */
uint64_t at_narrow_avx2(const at_block *block);
uint64_t at_narrow_avx512(const at_block *block);

#endif
