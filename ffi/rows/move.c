/* Moving rows: a gather, a scatter, or both, by tables of row numbers.
 *
 * Rows sorted by where they go lie side by side more often than not, so neighbours on both sides are one copy. Whether streaming
 * stores are used is decided by what is moved in all (copy.c says why): a row alone always fits the cache. */
#include "rows/copy.h"
#include "rows/rows.h"

#include <string.h>

static uint64_t row(const int64_t *rows, uint64_t i) { return rows == NULL ? i : (uint64_t)rows[i]; }

/* How many rows from i on lie side by side in both memories. */
static uint64_t run_of(const int64_t *dst_rows, const int64_t *src_rows, uint64_t i, uint64_t n) {
    uint64_t run = 1;
    while (i + run < n && row(dst_rows, i + run) == row(dst_rows, i) + run && row(src_rows, i + run) == row(src_rows, i) + run) run++;
    return run;
}

void at_rows_move(uint8_t *dst, uint64_t dst_stride, const int64_t *dst_rows, const uint8_t *src, uint64_t src_stride,
                  const int64_t *src_rows, uint64_t n, uint64_t nbytes) {
    if (nbytes == 0) return;
    int cold = at_copy_prefers_cold(n * nbytes), gapless = dst_stride == nbytes && src_stride == nbytes;
    for (uint64_t i = 0, run; i < n; i += run) {
        run = gapless ? run_of(dst_rows, src_rows, i, n) : 1;
        uint8_t *to = dst + row(dst_rows, i) * dst_stride;
        const uint8_t *from = src + row(src_rows, i) * src_stride;
        if (cold && i + run < n) at_copy_ahead(src + row(src_rows, i + run) * src_stride, nbytes);
        if (cold) at_copy_part(to, from, run * nbytes);
        else memcpy(to, from, run * nbytes);
    }
    if (cold) at_copy_end();
}
