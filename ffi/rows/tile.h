/* The sum of one token by vectors: included once for each instruction set, which defines
 *
 *   NAME(x)            a name of its own        V                  a vector of LANES floats
 *   TARGET             the function attribute   ZERO SPLAT(f)      vectors
 *   ADD(a, b) MUL(a, b) CANON(a)                CANON makes every NaN the quiet one: whose payload survives an addition of two
 *                                               depends on which the compiler put first
 *   LOAD_F32 LOAD_BF16 LOAD_F16(at)             STORE_F32 STORE_BF16 STORE_F16(at, a)
 *   RAW LOAD_RAW(at) EVEN(r) ODD(r)             two vectors of neighbouring bfloat16 as they lie: a RAW, the numbers of even and those of
 *                                               odd places in it
 *   STORE_RAW(at, even, odd)                    rounded, and put together again
 *   FIRST(even, odd) SECOND(even, odd)          the vectors of the places in their order
 *
 * convert.h, which is included after this, says what else it needs. ADD and MUL are never fused: the flag -ffp-contract=off of the
 * build sees to it. */

#define AHEAD 512u /* bytes, on into the rows of the next token: with so many rows at once the processor itself sees too late where
                    * they go on (a quarter of the speed from memory) */

#ifndef UNROLLED /* left alone, gcc keeps the sums of bfloat16 in memory: half as fast */
#if defined(__clang__)
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 8")
#endif
#endif

TARGET static inline __attribute__((always_inline)) V NAME(load)(int kind, const uint8_t *at) {
    return kind == AT_ROW_F32 ? LOAD_F32(at) : kind == AT_ROW_BF16 ? LOAD_BF16(at) : LOAD_F16(at);
}

TARGET static inline __attribute__((always_inline)) void NAME(store)(int kind, uint8_t *out, const V *acc, size_t n) {
    UNROLLED for (size_t j = 0; j < n; j++) {
        if (kind == AT_ROW_F32) STORE_F32(out + j * LANES * 4, CANON(acc[j]));
        else if (kind == AT_ROW_BF16) STORE_BF16(out + j * LANES * 2, CANON(acc[j]));
        else STORE_F16(out + j * LANES * 2, CANON(acc[j]));
    }
}

TARGET static inline __attribute__((always_inline)) void NAME(ahead)(const uint8_t *at, size_t n) {
    for (size_t j = 0; j < n; j += 64) __builtin_prefetch(at + j);
}

/* n vectors of columns, kept in registers while all rows are added; kind and n are constants. */
TARGET static inline __attribute__((always_inline)) void NAME(tile)(const at_sum *s, uint64_t column, int kind, size_t n) {
    size_t width = kind == AT_ROW_F32 ? 4 : 2;
    uint64_t then = column + AHEAD / width;
    const uint64_t *soon = then < s->hidden ? s->rows : s->next;
    uint64_t later = (then < s->hidden ? then : then - s->hidden) * width;
    V acc[TILE];
    UNROLLED for (size_t j = 0; j < n; j++) acc[j] = ZERO;
    for (uint64_t k = 0; k < s->choices; k++) {
        if (s->rows[k] == 0) continue;
        const uint8_t *row = at_row_at(s->rows[k]) + column * width;
        V weight = SPLAT(s->weights[k]);
        if (soon[k] != 0) NAME(ahead)(at_row_at(soon[k]) + later, n * LANES * width);
        UNROLLED for (size_t j = 0; j < n; j++) acc[j] = ADD(acc[j], MUL(weight, NAME(load)(kind, row + j * LANES * width)));
    }
    uint8_t *out = s->out + column * at_row_width(s->out_kind);
    if (s->out_kind == AT_ROW_F32) NAME(store)(AT_ROW_F32, out, acc, n);
    else if (s->out_kind == AT_ROW_BF16) NAME(store)(AT_ROW_BF16, out, acc, n);
    else NAME(store)(AT_ROW_F16, out, acc, n);
}

/* The same for bfloat16, twice LANES columns to a RAW: numbers of even and of odd places are taken apart by a shift and a mask, which
 * is a third less work than widening them one after the other. n: TILE / 2. */
TARGET static inline __attribute__((always_inline)) void NAME(pairs)(const at_sum *s, uint64_t column, size_t n) {
    uint64_t then = column + AHEAD / 2;
    const uint64_t *soon = then < s->hidden ? s->rows : s->next;
    uint64_t later = (then < s->hidden ? then : then - s->hidden) * 2;
    V even[TILE / 2], odd[TILE / 2];
    UNROLLED for (size_t j = 0; j < n; j++) even[j] = odd[j] = ZERO;
    for (uint64_t k = 0; k < s->choices; k++) {
        if (s->rows[k] == 0) continue;
        const uint8_t *row = at_row_at(s->rows[k]) + column * 2;
        V weight = SPLAT(s->weights[k]);
        if (soon[k] != 0) NAME(ahead)(at_row_at(soon[k]) + later, n * LANES * 4);
        UNROLLED for (size_t j = 0; j < n; j++) {
            RAW raw = LOAD_RAW(row + j * LANES * 4);
            even[j] = ADD(even[j], MUL(weight, EVEN(raw)));
            odd[j] = ADD(odd[j], MUL(weight, ODD(raw)));
        }
    }
    uint8_t *out = s->out + column * at_row_width(s->out_kind);
    UNROLLED for (size_t j = 0; j < n; j++) {
        V a = CANON(even[j]), b = CANON(odd[j]);
        if (s->out_kind == AT_ROW_BF16) {
            STORE_RAW(out + j * LANES * 4, a, b);
        } else if (s->out_kind == AT_ROW_F32) {
            STORE_F32(out + j * LANES * 8, FIRST(a, b));
            STORE_F32(out + j * LANES * 8 + LANES * 4, SECOND(a, b));
        } else {
            STORE_F16(out + j * LANES * 4, FIRST(a, b));
            STORE_F16(out + j * LANES * 4 + LANES * 2, SECOND(a, b));
        }
    }
}

TARGET static inline __attribute__((always_inline)) uint64_t NAME(token)(const at_sum *s, int kind) {
    uint64_t column = 0;
    for (; kind == AT_ROW_BF16 && column + TILE * LANES <= s->hidden; column += TILE * LANES) NAME(pairs)(s, column, TILE / 2);
    for (; column + TILE * LANES <= s->hidden; column += TILE * LANES) NAME(tile)(s, column, kind, TILE);
    for (; column + LANES <= s->hidden; column += LANES) NAME(tile)(s, column, kind, 1);
    return column;
}

TARGET uint64_t NAME(at_sum)(const at_sum *sum) {
    if (sum->src_kind == AT_ROW_F32) return NAME(token)(sum, AT_ROW_F32);
    if (sum->src_kind == AT_ROW_BF16) return NAME(token)(sum, AT_ROW_BF16);
    return NAME(token)(sum, AT_ROW_F16);
}

#undef AHEAD
