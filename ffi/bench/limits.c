/* What the machine can do: copies between two mappings, timed without any Python in between. */
#include "native.h"

#include <string.h>
#include <time.h>

#include "shm/copy.h"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

double at_bench_copy(void *dst, const void *src, uint64_t n, uint64_t repeats, uint64_t step, uint64_t wrap, int cold) {
    double start = now();
    uint64_t at = 0;
    for (uint64_t i = 0; i < repeats; i++) {
        if (cold) at_copy_cold((uint8_t *)dst + at, (const uint8_t *)src + at, n);
        else memcpy((uint8_t *)dst + at, (const uint8_t *)src + at, n);
        __asm__ volatile("" ::: "memory");
        at = at + step + n <= wrap ? at + step : 0;
    }
    return now() - start;
}

double at_bench_pages(void *dst, const void *src, const int64_t *dst_idx, const int64_t *src_idx, uint64_t n, uint64_t page,
                      int cold) {
    double start = now();
    at_copy_pages(dst, src, dst_idx, src_idx, n, page, page, page, cold);
    return now() - start;
}

void at_bench_once(void *dst, const void *src, uint64_t n, int mode) {
    if (mode == 0) at_copy(dst, src, n);
    else at_copy_cold(dst, src, n);
}
