/* Which pages of registered memory are there. A missing page may block the thread that touches it (userfaultfd): it is left to a copier.
 *
 * Memory that we did not allocate is looked at when it is first used, a block of it at a time (mincore, which never waits for a page).
 * Blocks that are there as a whole are remembered and cost a bit each from then on, a region that is there as a whole nothing. An
 * application that takes pages away again while the memory is registered takes that risk; so does the system when it swaps. */
#ifdef __linux__
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/uio.h>
#endif
#include "copiers.h"

#include <stdlib.h>
#include <unistd.h>

#define BLOCK ((uint64_t)2 << 20)
#define LEAST_PAGE 4096u
#define MOST_LOOKS 32u /* blocks looked at for one operation: what needs more is left to a copier */

int at_region_lazy(at_lane *lane, int64_t id) {
    int result = AT_ECLOSED;
    at_lock(lane);
    at_region *region = at_region_use(lane, id);
    if (region != NULL) {
        uint64_t blocks = (region->nbytes + BLOCK - 1) / BLOCK;
        region->there = blocks > 64 ? calloc((size_t)((blocks + 63) / 64), sizeof *region->there) : NULL;
        region->first_there = 0;
        result = blocks > 64 && region->there == NULL ? AT_ENOMEM : AT_OK;
        if (result == AT_OK && !(lane->config.flags & AT_LANE_NO_THREAD)) region->absent = blocks;
    }
    at_unlock(lane);
    return result;
}

#ifdef __linux__

/* Whether all of [from, to), of one block, is there. A block that is there as a whole is remembered. */
static int look(at_region *region, uint64_t block, uint64_t from, uint64_t to) {
    unsigned char seen[BLOCK / LEAST_PAGE + 1];
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), begin = block * BLOCK, end = begin + BLOCK;
    uint64_t base = (uint64_t)(uintptr_t)region->base;
    end = end < region->nbytes ? end : region->nbytes;
    uint64_t start = (base + begin) / page * page;
    if (mincore((void *)(uintptr_t)start, (size_t)(base + end - start), seen) != 0) return 0;
    int whole = 1, part = 1;
    for (uint64_t at = start, i = 0; at < base + end; at += page, i++) {
        if (seen[i] & 1u) continue;
        whole = 0;
        part &= at + page <= base + from || at >= base + to;
    }
    if (whole) {
        uint64_t *words = region->there != NULL ? region->there : &region->first_there;
        words[block / 64] |= UINT64_C(1) << (block % 64);
        region->absent--;
    }
    return part;
}

static int is_there(at_region *region, uint64_t from, uint64_t to, uint32_t *looks) {
    for (uint64_t block = from / BLOCK; block * BLOCK < to && region->absent != 0; block++) {
        const uint64_t *words = region->there != NULL ? region->there : &region->first_there;
        if (words[block / 64] >> (block % 64) & 1) continue;
        if (++*looks > MOST_LOOKS || !look(region, block, from, to)) return 0;
    }
    return 1;
}

int at_is_there(const at_op *op) {
    at_region *region = op->region;
    uint64_t at = (uint64_t)(op->local - region->base);
    uint32_t looks = 0;
    if (!(op->kind & AT_OP_PAGES)) return is_there(region, at, at + op->nbytes, &looks);
    for (uint64_t i = 0; i < op->units; i++) {
        uint64_t from = at + (uint64_t)op->local_pages[i] * op->local_stride;
        if (!is_there(region, from, from + op->nbytes, &looks)) return 0;
    }
    return 1;
}

void at_fetch_local(const at_op *op) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    for (uint64_t i = 0; i < op->units && !atomic_load(&op->withdrawn); i++) {
        const uint8_t *from = op->kind & AT_OP_PAGES ? op->local + (uint64_t)op->local_pages[i] * op->local_stride : op->local;
        uint64_t start = (uint64_t)(uintptr_t)from, end = start + op->nbytes;
        for (uint64_t at = start; at < end && !atomic_load(&op->withdrawn); at = (at / page + 1) * page) {
            uint8_t seen; /* by the kernel, which answers EFAULT where a signal would be raised; the copy says what is wrong */
            struct iovec here = {&seen, 1}, there = {(void *)(uintptr_t)at, 1};
            (void)process_vm_readv(getpid(), &here, 1, &there, 1, 0);
        }
    }
}

#else

void at_fetch_local(const at_op *op) { (void)op; }

int at_is_there(const at_op *op) {
    (void)op;
    return 1;
}

#endif
