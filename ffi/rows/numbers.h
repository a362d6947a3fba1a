/* Numbers by their bits, in plain C: what the vectors of vectors.c do, one at a time. */
#ifndef AT_NUMBERS_H
#define AT_NUMBERS_H

#include "rows/rows.h"

#include <string.h>

#define QUIET 0x7FC00000u

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float load32(const uint8_t *at) {
    float value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint32_t load16(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return bits;
}

static inline float from_half(uint32_t half) {
    uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7FFFu;
    if (rest >= 0x7C00u) return float_of(sign | 0x7F800000u | rest << 13);
    if (rest >= 0x0400u) return float_of(sign | ((rest << 13) + (112u << 23)));
    float tiny = (float)rest * 0x1p-24f; /* subnormal: exact, and a normal float32 */
    return float_of(sign | bits_of(tiny));
}

static inline float load(const uint8_t *at, int kind) {
    return kind == AT_ROW_F32 ? load32(at) : kind == AT_ROW_BF16 ? float_of(load16(at) << 16) : from_half(load16(at));
}

/* To nearest, ties to even; no NaN but the quiet one comes here. */
static inline uint16_t to_half(float value) {
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

static inline uint16_t to_bfloat(float value) {
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

/* float8_e4m3fn, to nearest, ties to even; what lies above 448, its largest, becomes 448. No NaN comes here.
 *
 * The magnitude is added to a power of two so large that the last bit of the sum is the last bit that float8 has at this size (in
 * what is below 2^-6, 2^-9: those are its subnormal numbers): so the sum rounds as the conversion must. */
#define E4M3_MOST 448.0f
#define E4M3_NORMAL 0x1p-6f
#define E4M3_LIFT (20u << 23) /* 2^e to 2^(e+20), whose last bit is 2^(e-3) */
#define E4M3_BIAS ((127u - 6u) << 3)

static inline uint8_t to_e4m3(float value) {
    uint32_t sign = bits_of(value) >> 24 & 0x80u;
    uint32_t size = bits_of(value) & 0x7FFFFFFFu, most = bits_of(E4M3_MOST), normal = bits_of(E4M3_NORMAL);
    size = size > most ? most : size; /* bits of magnitudes are in the order of the magnitudes */
    uint32_t power = (size < normal ? normal : size) & 0x7F800000u, lifted = power + E4M3_LIFT;
    uint32_t units = bits_of(float_of(size) + float_of(lifted)) - lifted; /* 8 to 16 of 2^(e-3), below 8 where it is subnormal */
    return (uint8_t)(sign | ((power >> 20) - E4M3_BIAS + units));
}

#endif
