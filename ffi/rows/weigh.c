/* Sums of rows with weights, in plain C.
 *
 * A token's rows are read once; what they sum to so far stays in registers (vectors.c) or in a block that stays in the first
 * cache (here). Every way rounds after each product and each sum, in the order of the choices, so all give the same bits. */
#include "rows/numbers.h"

#include <string.h>

#define BLOCK 64u /* columns */

static void add_row(float *acc, const uint8_t *row, float weight, int kind, size_t n) {
    if (kind == AT_ROW_F32) {
        for (size_t j = 0; j < n; j++) acc[j] += weight * load32(row + 4 * j);
    } else if (kind == AT_ROW_BF16) {
        for (size_t j = 0; j < n; j++) acc[j] += weight * float_of(load16(row + 2 * j) << 16);
    } else {
        for (size_t j = 0; j < n; j++) acc[j] += weight * from_half(load16(row + 2 * j));
    }
}

static void store(uint8_t *out, const float *acc, int kind, size_t n) {
    for (size_t j = 0; j < n; j++) {
        float value = acc[j] != acc[j] ? float_of(QUIET) : acc[j];
        uint16_t small = kind == AT_ROW_BF16 ? to_bfloat(value) : kind == AT_ROW_F16 ? to_half(value) : 0;
        if (kind == AT_ROW_F32) memcpy(out + 4 * j, &value, sizeof value);
        else memcpy(out + 2 * j, &small, sizeof small);
    }
}

void at_sum_plain(const at_sum *sum, uint64_t column) {
    for (size_t n; column < sum->hidden; column += n) {
        n = sum->hidden - column < BLOCK ? (size_t)(sum->hidden - column) : BLOCK;
        float acc[BLOCK] = {0};
        uint64_t begin = column * at_row_width(sum->src_kind);
        for (uint64_t k = 0; k < sum->choices; k++)
            if (sum->rows[k] != 0) add_row(acc, at_row_at(sum->rows[k]) + begin, sum->weights[k], sum->src_kind, n);
        store(sum->out + column * at_row_width(sum->out_kind), acc, sum->out_kind, n);
    }
}

static void sum_token(const at_sum *sum, int level) {
    uint64_t column = 0;
#if defined(__x86_64__)
    if (level == 2) column = at_sum_avx512(sum);
    else if (level == 1) column = at_sum_avx2(sum);
#endif
    (void)level; /* elsewhere there is one way */
    at_sum_plain(sum, column);
}

void at_rows_weigh(uint8_t *out, uint64_t out_stride, int out_kind, const uint64_t *rows, int kind, const float *weights,
                   uint64_t tokens, uint64_t choices, uint64_t hidden) {
    int level = at_rows_level();
    for (uint64_t t = 0; t < tokens; t++) {
        const uint64_t *now = rows + t * choices;
        at_sum sum = {.out = out + t * out_stride, .rows = now, .next = t + 1 < tokens ? now + choices : now,
                      .weights = weights + t * choices, .choices = choices, .hidden = hidden, .src_kind = kind,
                      .out_kind = out_kind};
        sum_token(&sum, level);
    }
}
