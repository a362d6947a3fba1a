/* Which instructions the kernels of this folder use: the best that the processor has, or fewer for tests. */
#include "rows/rows.h"

#include <pthread.h>

static int best, level;
static pthread_once_t chosen = PTHREAD_ONCE_INIT;

static void choose(void) {
#if defined(__x86_64__)
    int widest = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    best = widest ? 2 : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") ? 1 : 0;
#endif
    level = best;
}

int at_rows_level(void) {
    (void)pthread_once(&chosen, choose);
    return level;
}

int at_rows_limit(int limit) {
    (void)pthread_once(&chosen, choose);
    level = limit < best ? limit : best;
    return level;
}
