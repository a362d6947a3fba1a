/* Conversions by vectors: included once for each instruction set, after tile.h, with what that needs and
 *
 *   DIV MIN MAX(a, b)      of floats; no NaN comes here
 *   AS_V(i) AS_I(a)        the same bits as a vector of floats, as a RAW
 *   SPLAT_I(i) AND OR PLUS MINUS(i, j) UP DOWN(i, n)        LANES integers of 32 bits; shifts to the left and to the right
 *   MOST32 MOST16(i, j)    the greater ones, as unsigned numbers of 32 and of 16 bits
 *   STORE_HALF STORE_QUARTER(at, i)                         the lower 16, the lower 8 bits of each of LANES integers
 *
 * What these do is what numbers.h does to one number, to the bit. */

/* ---- casts ---- */

TARGET static inline __attribute__((always_inline)) uint64_t NAME(cast)(uint8_t *dst, const uint8_t *src, uint64_t n, int to, int of) {
    size_t wide = at_row_width(to), width = at_row_width(of);
    uint64_t done = 0;
    for (; done + 4 * LANES <= n; done += 4 * LANES) {
        V now[4];
        UNROLLED for (size_t j = 0; j < 4; j++) now[j] = NAME(load)(of, src + (done + j * LANES) * width);
        NAME(store)(to, dst + done * wide, now, 4);
    }
    for (; done + LANES <= n; done += LANES) {
        V now = NAME(load)(of, src + done * width);
        NAME(store)(to, dst + done * wide, &now, 1);
    }
    return done;
}

TARGET uint64_t NAME(at_cast)(uint8_t *dst, const uint8_t *src, uint64_t n, int to, int of) {
    if (of == AT_ROW_F32 && to == AT_ROW_BF16) return NAME(cast)(dst, src, n, AT_ROW_BF16, AT_ROW_F32);
    if (of == AT_ROW_F32) return NAME(cast)(dst, src, n, AT_ROW_F16, AT_ROW_F32);
    if (of == AT_ROW_BF16 && to == AT_ROW_F32) return NAME(cast)(dst, src, n, AT_ROW_F32, AT_ROW_BF16);
    if (of == AT_ROW_BF16) return NAME(cast)(dst, src, n, AT_ROW_F16, AT_ROW_BF16);
    if (to == AT_ROW_F32) return NAME(cast)(dst, src, n, AT_ROW_F32, AT_ROW_F16);
    return NAME(cast)(dst, src, n, AT_ROW_BF16, AT_ROW_F16);
}

/* ---- the greatest magnitude of a block ---- */

TARGET static inline __attribute__((always_inline)) uint64_t NAME(most)(const at_block *b, uint32_t *most, size_t width) {
    size_t step = LANES * 4 / width; /* numbers in a RAW */
    uint64_t whole = b->columns / step * step;
    RAW magnitude = SPLAT_I(width == 4 ? 0x7FFFFFFF : 0x7FFF7FFF), now[4];
    UNROLLED for (size_t j = 0; j < 4; j++) now[j] = SPLAT_I(0);
    for (uint64_t r = 0; r < b->rows; r++) {
        const uint8_t *at = b->src + r * b->src_row, *end = at + whole * width;
        for (; (size_t)(end - at) >= 16 * LANES; at += 16 * LANES) {
            UNROLLED for (size_t j = 0; j < 4; j++) {
                RAW bits = AND(LOAD_RAW(at + j * 4 * LANES), magnitude);
                now[j] = width == 4 ? MOST32(now[j], bits) : MOST16(now[j], bits);
            }
        }
        for (; at < end; at += 4 * LANES) {
            RAW bits = AND(LOAD_RAW(at), magnitude);
            now[0] = width == 4 ? MOST32(now[0], bits) : MOST16(now[0], bits);
        }
    }
    UNROLLED for (size_t j = 1; j < 4; j++) now[0] = width == 4 ? MOST32(now[0], now[j]) : MOST16(now[0], now[j]);
    uint32_t found[LANES];
    memcpy(found, &now[0], sizeof found);
    for (size_t j = 0; j < LANES; j++) {
        uint32_t high = found[j] >> 16, low = found[j] & 0xFFFF, one = width == 4 ? found[j] : high > low ? high : low;
        if (one > *most) *most = one;
    }
    return whole;
}

TARGET uint64_t NAME(at_most)(const at_block *b, uint32_t *most) {
    return b->kind == AT_ROW_F32 ? NAME(most)(b, most, 4) : NAME(most)(b, most, 2);
}

/* ---- a block as float8_e4m3fn ---- */

/* The bits of magnitudes, without the sign. */
TARGET static inline __attribute__((always_inline)) RAW NAME(e4m3)(V size) {
    size = MIN(size, SPLAT(E4M3_MOST));
    RAW power = AND(AS_I(MAX(size, SPLAT(E4M3_NORMAL))), SPLAT_I(0x7F800000)), lifted = PLUS(power, SPLAT_I((int)E4M3_LIFT));
    RAW units = MINUS(AS_I(ADD(size, AS_V(lifted))), lifted);
    return PLUS(MINUS(DOWN(power, 20), SPLAT_I((int)E4M3_BIAS)), units);
}

/* Two neighbours of bfloat16 to a lane: the codes of both are its lower 16 bits. */
TARGET static inline __attribute__((always_inline)) void NAME(narrow_pairs)(uint8_t *dst, const uint8_t *src, V scale) {
    RAW raw = LOAD_RAW(src), size = AND(raw, SPLAT_I(0x7FFF7FFF));
    RAW even = NAME(e4m3)(DIV(EVEN(size), scale)), odd = NAME(e4m3)(DIV(ODD(size), scale));
    RAW signs = OR(AND(DOWN(raw, 8), SPLAT_I(0x80)), AND(DOWN(raw, 16), SPLAT_I(0x8000)));
    STORE_HALF(dst, OR(OR(even, UP(odd, 8)), signs));
}

TARGET static inline __attribute__((always_inline)) void NAME(narrow_one)(uint8_t *dst, const uint8_t *src, V scale, int kind) {
    RAW bits = AS_I(NAME(load)(kind, src)), sign = AND(DOWN(bits, 24), SPLAT_I(0x80));
    STORE_QUARTER(dst, OR(NAME(e4m3)(DIV(AS_V(AND(bits, SPLAT_I(0x7FFFFFFF))), scale)), sign));
}

TARGET static inline __attribute__((always_inline)) uint64_t NAME(quantise)(const at_block *b, int kind) {
    size_t width = at_row_width(kind), step = kind == AT_ROW_BF16 ? 2 * LANES : LANES;
    uint64_t whole = b->columns / step * step;
    V scale = SPLAT(b->scale);
    for (uint64_t r = 0; r < b->rows; r++) {
        const uint8_t *src = b->src + r * b->src_row;
        uint8_t *dst = b->dst + r * b->dst_row;
        if (b->next != NULL) NAME(ahead)(b->next + r * b->src_row, b->columns * width);
        for (uint64_t j = 0; j < whole; j += step) {
            if (kind == AT_ROW_BF16) NAME(narrow_pairs)(dst + j, src + j * width, scale);
            else NAME(narrow_one)(dst + j, src + j * width, scale, kind);
        }
    }
    return whole;
}

TARGET uint64_t NAME(at_narrow)(const at_block *b) {
    if (b->kind == AT_ROW_F32) return NAME(quantise)(b, AT_ROW_F32);
    if (b->kind == AT_ROW_BF16) return NAME(quantise)(b, AT_ROW_BF16);
    return NAME(quantise)(b, AT_ROW_F16);
}

#undef NAME
#undef TARGET
#undef V
#undef LANES
#undef TILE
#undef ZERO
#undef SPLAT
#undef ADD
#undef MUL
#undef CANON
#undef LOAD_F32
#undef LOAD_BF16
#undef LOAD_F16
#undef STORE_F32
#undef STORE_BF16
#undef STORE_F16
#undef RAW
#undef LOAD_RAW
#undef EVEN
#undef ODD
#undef STORE_RAW
#undef FIRST
#undef SECOND
#undef DIV
#undef MIN
#undef MAX
#undef AS_V
#undef AS_I
#undef SPLAT_I
#undef AND
#undef OR
#undef PLUS
#undef MINUS
#undef UP
#undef DOWN
#undef MOST32
#undef MOST16
#undef STORE_HALF
#undef STORE_QUARTER
