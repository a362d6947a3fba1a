/* Matrices as float8_e4m3fn with a scale for each block.
 *
 * A block is read twice, the second time from the cache: for its greatest magnitude, then for its numbers. While it is written the
 * next one is fetched: its rows may lie far apart, which the processor does not foresee.
 *
 * A number is divided by its scale. Its product with the reciprocal would be another float32 now and then, and the division costs
 * no time: the memory is slower. */
#include "rows/mode.h"
#include "rows/numbers.h"

#include <string.h>

/* What has these bits or more is infinite or no number. */
static uint32_t beyond(int kind) { return kind == AT_ROW_F32 ? 0x7F800000u : kind == AT_ROW_BF16 ? 0x7F80u : 0x7C00u; }

static uint32_t magnitude(const uint8_t *at, int kind) {
    return kind == AT_ROW_F32 ? bits_of(load32(at)) & 0x7FFFFFFFu : load16(at) & 0x7FFFu;
}

/* The bits of the greatest magnitude in the block. */
static uint32_t most_of(const at_block *b, int level) {
    uint32_t most = 0;
    uint64_t begin = 0;
#if defined(__x86_64__)
    if (b->src_column != at_row_width(b->kind)) level = 0;
    if (level == 2) begin = at_most_avx512(b, &most);
    else if (level == 1) begin = at_most_avx2(b, &most);
#endif
    (void)level; /* elsewhere there is one way */
    for (uint64_t r = 0; begin < b->columns && r < b->rows; r++) {
        const uint8_t *src = b->src + r * b->src_row;
        for (uint64_t j = begin; j < b->columns; j++) {
            uint32_t one = magnitude(src + j * b->src_column, b->kind);
            most = one > most ? one : most;
        }
    }
    return most;
}

/* Not inline, see mode.h. */
static __attribute__((noinline)) float scale_of(uint32_t most, int kind) {
    float size = kind == AT_ROW_F32 ? float_of(most) : kind == AT_ROW_BF16 ? float_of(most << 16) : from_half(most);
    float scale = size / E4M3_MOST;
    return scale == 0.0f ? 1.0f : scale; /* also where the quotient is too small for a float32: those numbers become zeros */
}

/* With `kind` a constant the compiler makes vectors of it. */
static inline __attribute__((always_inline)) void narrow_plain(const at_block *b, uint64_t begin, int kind, uint64_t step) {
    uint64_t columns = b->columns;
    float scale = b->scale;
    for (uint64_t r = 0; begin < columns && r < b->rows; r++) {
        const uint8_t *restrict src = b->src + r * b->src_row;
        uint8_t *restrict dst = b->dst + r * b->dst_row;
        for (uint64_t j = begin; j < columns; j++) dst[j] = to_e4m3(load(src + j * step, kind) / scale);
    }
}

static __attribute__((noinline)) void narrow(const at_block *b, int level) {
    uint64_t begin = 0;
    size_t width = at_row_width(b->kind);
#if defined(__x86_64__)
    if (b->src_column != width) level = 0;
    if (level == 2) begin = at_narrow_avx512(b);
    else if (level == 1) begin = at_narrow_avx2(b);
#endif
    (void)level;
    if (b->src_column != width) narrow_plain(b, 0, b->kind, b->src_column);
    else if (b->kind == AT_ROW_F32) narrow_plain(b, begin, AT_ROW_F32, 4);
    else if (b->kind == AT_ROW_BF16) narrow_plain(b, begin, AT_ROW_BF16, 2);
    else narrow_plain(b, begin, AT_ROW_F16, 2);
}

/* The first number of these rows that is not finite; there is one. */
static uint64_t not_finite(const uint8_t *src, uint64_t src_row, uint64_t src_column, int kind, uint64_t columns) {
    for (uint64_t r = 0;; r++)
        for (uint64_t j = 0; j < columns; j++)
            if (magnitude(src + r * src_row + j * src_column, kind) >= beyond(kind)) return r * columns + j;
}

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* One row of blocks. Returns whether all numbers are finite. */
static int quantise_band(at_block b, uint8_t *scales, uint64_t columns, uint64_t block_columns, int level) {
    const uint8_t *below = b.src + b.rows * b.src_row, *end = b.src + columns * b.src_column;
    for (uint64_t left = columns; left > 0; left -= b.columns, scales += sizeof b.scale) {
        b.columns = least(left, block_columns);
        uint32_t most = most_of(&b, level);
        if (most >= beyond(b.kind)) return 0;
        b.scale = scale_of(most, b.kind);
        memcpy(scales, &b.scale, sizeof b.scale);
        b.next = b.src + b.columns * b.src_column;
        if (b.next == end) b.next = below; /* most often; else what is fetched is of no use */
        narrow(&b, level);
        b.src += b.columns * b.src_column, b.dst += b.columns;
    }
    return 1;
}

int64_t at_rows_quantise(uint8_t *dst, uint64_t dst_matrix, uint64_t dst_row, uint8_t *scales, uint64_t scales_matrix,
                         uint64_t scales_row, const uint8_t *src, uint64_t src_matrix, uint64_t src_row, uint64_t src_column,
                         int kind, uint64_t matrices, uint64_t rows, uint64_t columns, uint64_t block_rows, uint64_t block_columns) {
    int level = at_rows_level();
    int64_t found = -1;
    if (columns == 0) return found;
    at_mode before = at_mode_strict();
    for (uint64_t m = 0; m < matrices && found < 0; m++)
        for (uint64_t r = 0, band = 0; r < rows && found < 0; r += block_rows, band++) {
            at_block b = {.dst = dst + m * dst_matrix + r * dst_row, .src = src + m * src_matrix + r * src_row, .next = NULL,
                          .dst_row = dst_row, .src_row = src_row, .src_column = src_column, .rows = least(rows - r, block_rows),
                          .columns = 0, .kind = kind, .scale = 1.0f};
            if (!quantise_band(b, scales + m * scales_matrix + band * scales_row, columns, block_columns, level))
                found = (int64_t)((m * rows + r) * columns + not_finite(b.src, src_row, src_column, kind, columns));
        }
    at_mode_restore(before);
    return found;
}
