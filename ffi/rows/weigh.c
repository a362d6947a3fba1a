/* Sums of rows with weights: which instructions, and the sum in plain C.
 *
 * A token's rows are read once; what they sum to so far stays in registers (vectors.c) or in a block that stays in the first
 * cache (here). Every way rounds after each product and each sum, in the order of the choices, so all give the same bits. */
#include "rows/rows.h"

#include <pthread.h>
#include <string.h>

#define BLOCK 64u /* columns */
#define QUIET 0x7FC00000u

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t load16(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return bits;
}

static float from_half(uint32_t half) {
    uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7FFFu;
    if (rest >= 0x7C00u) return float_of(sign | 0x7F800000u | rest << 13);
    if (rest >= 0x0400u) return float_of(sign | ((rest << 13) + (112u << 23)));
    float tiny = (float)rest * 0x1p-24f; /* subnormal: exact, and a normal float32 */
    return float_of(sign | bits_of(tiny));
}

/* To nearest, ties to even; no NaN but the quiet one comes here. */
static uint16_t to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7FFFFFFFu;
    if (rest > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (rest >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u); /* 65520 and above */
    if (rest < 0x33000000u) return (uint16_t)sign;              /* below half of the smallest */
    uint32_t shift = 13, whole = rest - (112u << 23);
    if (rest < 0x38800000u) { /* the result is subnormal: its unit is 2^-24 */
        shift = 126u - (rest >> 23);
        whole = (rest & 0x7FFFFFu) | 0x800000u;
    }
    uint32_t half = 1u << (shift - 1);
    return (uint16_t)(sign | (whole + half - 1 + (whole >> shift & 1)) >> shift);
}

static uint16_t to_bfloat(float value) {
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

static void add_row(float *acc, const uint8_t *row, float weight, int kind, size_t n) {
    if (kind == AT_ROW_F32) {
        for (size_t j = 0; j < n; j++) {
            float value;
            memcpy(&value, row + 4 * j, sizeof value);
            acc[j] += weight * value;
        }
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

/* ---- which instructions ---- */

static int best, level;
static pthread_once_t chosen = PTHREAD_ONCE_INIT;

static void choose(void) {
#if defined(__x86_64__)
    best = __builtin_cpu_supports("avx512f") ? 2 : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") ? 1 : 0;
#endif
    level = best;
}

int at_rows_limit(int limit) {
    (void)pthread_once(&chosen, choose);
    level = limit < best ? limit : best;
    return level;
}

static void sum_token(const at_sum *sum) {
    uint64_t column = 0;
#if defined(__x86_64__)
    if (level == 2) column = at_sum_avx512(sum);
    else if (level == 1) column = at_sum_avx2(sum);
#endif
    at_sum_plain(sum, column);
}

void at_rows_weigh(uint8_t *out, uint64_t out_stride, int out_kind, const uint64_t *rows, int kind, const float *weights,
                   uint64_t tokens, uint64_t choices, uint64_t hidden) {
    (void)pthread_once(&chosen, choose);
    for (uint64_t t = 0; t < tokens; t++) {
        const uint64_t *now = rows + t * choices;
        at_sum sum = {.out = out + t * out_stride, .rows = now, .next = t + 1 < tokens ? now + choices : now,
                      .weights = weights + t * choices, .choices = choices, .hidden = hidden, .src_kind = kind,
                      .out_kind = out_kind};
        sum_token(&sum);
    }
}
