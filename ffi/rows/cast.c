/* Numbers of one kind to another, row by row.
 *
 * What is written in all decides, as in move.c, whether it goes by streaming stores: then through a buffer that stays in the first
 * cache. Numbers of the same kind are copied bit by bit. */
#include "rows/copy.h"
#include "rows/mode.h"
#include "rows/numbers.h"

#include <string.h>

#define BUFFER 8192u /* bytes */

static void store(uint8_t *at, float value, int kind) {
    uint16_t small = kind == AT_ROW_BF16 ? to_bfloat(value) : kind == AT_ROW_F16 ? to_half(value) : 0;
    if (kind == AT_ROW_F32) memcpy(at, &value, sizeof value);
    else memcpy(at, &small, sizeof small);
}

/* Towards zero, and the last bit set where that left something away: what is rounded from this to 16 bits is what would be rounded
 * from the number itself. Rounded to the nearest twice, some numbers go the wrong way. */
static float to_odd(double value) {
    float near = (float)value;
    double back = (double)near;
    if (back == value || value != value) return near;
    uint32_t bits = bits_of(near);
    if (back > value ? value > 0 : value < 0) bits--; /* it is the one farther from zero */
    return float_of(bits | 1);
}

/* float64, which no model needs to be fast: one at a time. */
static __attribute__((noinline)) void convert_wide(uint8_t *dst, const uint8_t *src, uint64_t step, uint64_t n, int to, int of) {
    for (uint64_t j = 0; j < n; j++) {
        double value;
        if (of == AT_ROW_F64) memcpy(&value, src + j * step, sizeof value);
        else value = (double)load(src + j * step, of);
        if (value != value) value = (double)float_of(QUIET);
        if (to == AT_ROW_F64) memcpy(dst + 8 * j, &value, sizeof value);
        else store(dst + j * at_row_width(to), to == AT_ROW_F32 ? (float)value : to_odd(value), to);
    }
}

/* step: bytes from one number of src to the next. */
static void convert(uint8_t *dst, const uint8_t *src, uint64_t step, uint64_t n, int to, int of, int level) {
    if (to == of) {
        size_t width = at_row_width(of);
        for (uint64_t j = 0; j < n; j++) memcpy(dst + j * width, src + j * step, width);
        return;
    }
    if (to == AT_ROW_F64 || of == AT_ROW_F64) {
        convert_wide(dst, src, step, n, to, of);
        return;
    }
    uint64_t done = 0;
#if defined(__x86_64__)
    if (step != at_row_width(of)) level = 0;
    if (level == 2) done = at_cast_avx512(dst, src, n, to, of);
    else if (level == 1) done = at_cast_avx2(dst, src, n, to, of);
#endif
    (void)level; /* elsewhere there is one way */
    for (; done < n; done++) {
        float value = load(src + done * step, of);
        if (value != value) value = float_of(QUIET);
        store(dst + done * at_row_width(to), value, to);
    }
}

static void convert_cold(uint8_t *dst, const uint8_t *src, uint64_t step, uint64_t n, int to, int of, int level) {
    uint8_t buffer[BUFFER];
    uint64_t most = BUFFER / at_row_width(to);
    for (uint64_t done = 0, now; done < n; done += now) {
        now = n - done < most ? n - done : most;
        convert(buffer, src + done * step, step, now, to, of, level);
        at_copy_part(dst + done * at_row_width(to), buffer, (size_t)(now * at_row_width(to)));
    }
}

void at_rows_cast(uint8_t *dst, uint64_t dst_matrix, uint64_t dst_row, int dst_kind, const uint8_t *src, uint64_t src_matrix,
                  uint64_t src_row, uint64_t src_column, int src_kind, uint64_t matrices, uint64_t rows, uint64_t columns) {
    uint64_t width = columns * at_row_width(dst_kind);
    int level = at_rows_level(), cold = at_copy_prefers_cold(matrices * rows * width);
    at_mode before = at_mode_strict();
    for (uint64_t m = 0; m < matrices; m++)
        for (uint64_t r = 0; r < rows; r++) {
            uint8_t *to = dst + m * dst_matrix + r * dst_row;
            const uint8_t *from = src + m * src_matrix + r * src_row;
            if (dst_kind != src_kind || src_column != at_row_width(src_kind))
                (cold ? convert_cold : convert)(to, from, src_column, columns, dst_kind, src_kind, level);
            else if (cold) at_copy_part(to, from, (size_t)width);
            else memcpy(to, from, (size_t)width);
        }
    if (cold) at_copy_end();
    at_mode_restore(before);
}
