/* What the machine can do: copies between two mappings and into another process, timed without any Python in between. */
#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>
#include <time.h>
#ifdef __linux__
#include <sys/uio.h>
#include <unistd.h>
#endif

#include "bench/decls.h"
#include "rows/copy.h"

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

#ifdef __linux__
#define IOVECS 512u

static int put(int pid, int mem_fd, struct iovec *there, struct iovec *here, uint64_t k) {
    if (mem_fd < 0) return process_vm_writev(pid, here, k, there, k, 0) > 0;
    int ok = 1;
    for (uint64_t i = 0; i < k; i++) ok &= pwrite(mem_fd, here[i].iov_base, here[i].iov_len, (off_t)(uintptr_t)there[i].iov_base) > 0;
    return ok;
}

double at_bench_foreign(int pid, int mem_fd, uint64_t va, const void *src, uint64_t n, uint64_t repeats, const int64_t *dst_idx,
                        const int64_t *src_idx, uint64_t page) {
    struct iovec here[IOVECS], there[IOVECS];
    uint8_t *from = (uint8_t *)(uintptr_t)src, *to = (uint8_t *)(uintptr_t)va;
    double start = now();
    for (uint64_t r = 0; r < repeats; r++) {
        uint64_t units = page != 0 ? n : 1, k = 0;
        for (uint64_t i = 0; i < units; i++) {
            here[k] = page != 0 ? (struct iovec){from + (uint64_t)src_idx[i] * page, page} : (struct iovec){from, n};
            there[k] = page != 0 ? (struct iovec){to + (uint64_t)dst_idx[i] * page, page} : (struct iovec){to, n};
            if (++k != IOVECS && i + 1 != units) continue;
            if (!put(pid, mem_fd, there, here, k)) return -1.0;
            k = 0;
        }
    }
    return now() - start;
}
#else
double at_bench_foreign(int pid, int mem_fd, uint64_t va, const void *src, uint64_t n, uint64_t repeats, const int64_t *dst_idx,
                        const int64_t *src_idx, uint64_t page) {
    (void)pid, (void)mem_fd, (void)va, (void)src, (void)n, (void)repeats, (void)dst_idx, (void)src_idx, (void)page;
    return -1.0;
}
#endif

void at_bench_once(void *dst, const void *src, uint64_t n, int mode) {
    if (mode == 0) at_copy(dst, src, n);
    else at_copy_cold(dst, src, n);
}
