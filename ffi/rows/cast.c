/* Numbers of one kind to another, row by row.
 *
 * What is written in all decides, as in move.c, whether it goes by streaming stores: then through a buffer that stays in the first
 * cache. Numbers of the same kind are copied, whatever their bits. */
#include "rows/copy.h"
#include "rows/numbers.h"

#include <string.h>

#define BUFFER 8192u /* bytes */

static void convert(uint8_t *dst, const uint8_t *src, uint64_t n, int to, int of, int level) {
    uint64_t done = 0;
#if defined(__x86_64__)
    if (level == 2) done = at_cast_avx512(dst, src, n, to, of);
    else if (level == 1) done = at_cast_avx2(dst, src, n, to, of);
#endif
    (void)level; /* elsewhere there is one way */
    for (; done < n; done++) {
        float value = load(src + done * at_row_width(of), of);
        if (value != value) value = float_of(QUIET);
        uint16_t small = to == AT_ROW_BF16 ? to_bfloat(value) : to == AT_ROW_F16 ? to_half(value) : 0;
        if (to == AT_ROW_F32) memcpy(dst + 4 * done, &value, sizeof value);
        else memcpy(dst + 2 * done, &small, sizeof small);
    }
}

static void convert_cold(uint8_t *dst, const uint8_t *src, uint64_t n, int to, int of, int level) {
    uint8_t buffer[BUFFER];
    uint64_t most = BUFFER / at_row_width(to);
    for (uint64_t done = 0, now; done < n; done += now) {
        now = n - done < most ? n - done : most;
        convert(buffer, src + done * at_row_width(of), now, to, of, level);
        at_copy_part(dst + done * at_row_width(to), buffer, (size_t)(now * at_row_width(to)));
    }
}

void at_rows_cast(uint8_t *dst, uint64_t dst_matrix, uint64_t dst_row, int dst_kind, const uint8_t *src, uint64_t src_matrix,
                  uint64_t src_row, int src_kind, uint64_t matrices, uint64_t rows, uint64_t columns) {
    uint64_t width = columns * at_row_width(dst_kind);
    int level = at_rows_level(), cold = at_copy_prefers_cold(matrices * rows * width);
    for (uint64_t m = 0; m < matrices; m++)
        for (uint64_t r = 0; r < rows; r++) {
            uint8_t *to = dst + m * dst_matrix + r * dst_row;
            const uint8_t *from = src + m * src_matrix + r * src_row;
            if (dst_kind != src_kind) (cold ? convert_cold : convert)(to, from, columns, dst_kind, src_kind, level);
            else if (cold) at_copy_part(to, from, (size_t)width);
            else memcpy(to, from, (size_t)width);
        }
    if (cold) at_copy_end();
}
