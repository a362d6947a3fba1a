/* Moving bytes: one chunk at a time, each between two looks at the grant's epoch (see shm.h). */
#define _GNU_SOURCE
#include "shm.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "lane/own.h"
#include "rows/copy.h"

#define FOREIGN_CHUNK ((uint64_t)1 << 20) /* a system call each: larger chunks than plain stores */
#define BATCH 512u                        /* pages per process_vm_writev (the kernel takes up to 1024 iovecs) */

static _Atomic int hold_wanted, hold_reached;

void at_shm_hold(int on) {
    atomic_store(&hold_wanted, on);
    if (!on) atomic_store(&hold_reached, 0);
}

int at_shm_held(void) { return atomic_load(&hold_reached); }

static void hold(const at_remote *remote) {
    int wanted = atomic_load_explicit(&hold_wanted, memory_order_relaxed); /* order: alone: tests, and any time will do */
    if (wanted == 0 || (wanted == 2 && remote->base != NULL)) return;
    atomic_store(&hold_reached, 1);
    while (atomic_load(&hold_wanted)) (void)usleep(200);
}

/* After a read: were the bytes still ours to read when the last of them was? */
static int revoked(const at_remote *remote) {
    atomic_thread_fence(memory_order_acquire); /* order: alone: what was read, before the look at the word */
    return atomic_load(remote->word) != remote->epoch;
}

#define UNCHECKED ((uint64_t)1 << 20)

/* The owner of a segment cannot shrink it, but can punch holes into it. A process that touches a hole pays for a new page, or is killed
 * for it. That cannot be prevented, only noticed soon. */
static int is_punched(at_remote *remote, uint64_t n) {
    struct stat info;
    if (remote->segment_fd < 0) return 0;
    uint64_t unchecked = atomic_load_explicit(&remote->unchecked, memory_order_relaxed) + n; /* order: alone: an estimate */
    uint64_t next = unchecked < UNCHECKED ? unchecked : 0;
    atomic_store_explicit(&remote->unchecked, next, memory_order_relaxed); /* order: alone: an estimate */
    if (unchecked < UNCHECKED) return 0;
    return fstat(remote->segment_fd, &info) == 0 && (uint64_t)info.st_blocks * 512 < remote->segment_bytes;
}

static int withdrawn(const at_op *op) {
    return atomic_load_explicit(&op->withdrawn, memory_order_relaxed); /* order: alone: seen a chunk later is soon enough */
}

/* Whether [from, from + n) of the operation's local memory was taken away (its file was shortened). */
static int is_gone(const at_op *op, uint64_t from, uint64_t n) { return op->region->file && !at_own_readable(op->local + from, n); }

static int failed(int error, int local, int *oserror) {
    *oserror = error;
    if (local) return AT_EMEMORY;
    return error == ESRCH ? AT_EPEER : AT_EIO;
}

static int move_bytes(at_shm *shm, const at_op *op, uint64_t first, uint64_t n, at_active *active, uint64_t *moved, int *oserror) {
    at_remote *remote = op->remote;
    int cold = at_copy_prefers_cold(op->footprint);
    uint64_t chunk = remote->base == NULL || cold ? FOREIGN_CHUNK : AT_CHUNK;
    int reads = op->kind & AT_OP_READ;
    while (*moved < n) {
        uint64_t k = n - *moved < chunk ? n - *moved : chunk, from = first + *moved, to = op->remote_offset + from;
        active->begin = to, active->nbytes = k;
        if (is_punched(remote, k)) return AT_EPROTO;
        int rc = at_shm_enter(shm, active, remote), error = 0;
        if (rc != AT_OK) return rc;
        hold(remote);
        uint8_t *here = op->local + from, *there = remote->base != NULL ? remote->base + to : NULL;
        if (there == NULL) error = at_shm_foreign_copy(shm, here, remote->va + to, k, reads);
        else if (op->region->file) error = at_own_copy(reads ? here : there, reads ? there : here, k);
        else if (cold) at_copy_cold(reads ? here : there, reads ? there : here, k);
        else at_copy(reads ? here : there, reads ? there : here, k);
        at_shm_leave(active);
        if (error != 0) return failed(error, there != NULL || (error == EFAULT && is_gone(op, from, k)), oserror);
        if (reads && revoked(remote)) return AT_ESTALE; /* what was read may be of the memory's next user */
        *moved += k;
        if (*moved < n && withdrawn(op)) return AT_OK;
    }
    return AT_OK;
}

#define SHORT 16384u /* bytes that are always one chunk */

/* The usual case: few bytes of plain memory, all with one look at the grant, to where the peer's memory is mapped. */
static int is_short(const at_op *op, uint64_t n) {
    return op->kind == AT_OP_WRITE && n <= SHORT && op->remote->base != NULL && !op->region->file && !at_copy_prefers_cold(op->footprint);
}

static int move_short(at_shm *shm, const at_op *op, uint64_t first, uint64_t n, at_active *active, uint64_t *moved) {
    at_remote *remote = op->remote;
    uint64_t to = op->remote_offset + first;
    active->begin = to, active->nbytes = n;
    if (is_punched(remote, n)) return AT_EPROTO;
    int rc = at_shm_enter(shm, active, remote);
    if (rc != AT_OK) return rc;
    hold(remote);
    memcpy(remote->base + to, op->local + first, n);
    at_shm_leave(active);
    *moved = n;
    return AT_OK;
}

static int foreign_pages(at_shm *shm, const at_op *op, uint64_t first, uint64_t n) {
    struct iovec memory[2][BATCH + 1], *here = memory[0] + 1, *there = memory[1] + 1; /* the first are at_shm_copy_by_pid's */
    uint64_t at = 0, page = op->nbytes, va = op->remote->va + op->remote_offset;
    int reads = op->kind & AT_OP_READ;
    while (at < n) {
        uint32_t k = n - at < BATCH ? (uint32_t)(n - at) : BATCH;
        for (uint32_t i = 0; i < k; i++) {
            uint64_t unit = first + at + i;
            here[i] = (struct iovec){(void *)(uintptr_t)(op->local + (uint64_t)op->local_pages[unit] * op->local_stride), page};
            there[i] = (struct iovec){(void *)(uintptr_t)(va + (uint64_t)op->remote_pages[unit] * op->remote_stride), page};
        }
        uint64_t whole = 0;
        if (atomic_load(&shm->foreign) == 1 && (shm->mem_fd < 0 || k * page > AT_SHM_SMALL)) {
            ssize_t moved = at_shm_copy_by_pid(shm, memory[0], memory[1], k + 1, reads);
            if (moved < 0 && errno == ESRCH) return errno;
            whole = moved < 0 ? 0 : (uint64_t)moved / page;
        }
        for (uint64_t i = whole; i < k; i++) { /* what a short call left, and all of it by /proc/PID/mem */
            int error = at_shm_foreign_copy(shm, here[i].iov_base, (uint64_t)(uintptr_t)there[i].iov_base, page, reads);
            if (error != 0) return error;
        }
        at += k;
    }
    return 0;
}

static int pages_gone(const at_op *op, uint64_t first, uint64_t n) {
    for (uint64_t i = first; i < first + n; i++)
        if (is_gone(op, (uint64_t)op->local_pages[i] * op->local_stride, op->nbytes)) return 1;
    return 0;
}

/* Pages [at, at + k), where the remote memory is mapped: 0 or an errno. */
static int mapped_pages(const at_op *op, uint64_t at, uint64_t k, int cold) {
    uint8_t *there = op->remote->base + op->remote_offset;
    const int64_t *here_pages = op->local_pages + at, *there_pages = op->remote_pages + at;
    uint64_t page = op->nbytes, here_stride = op->local_stride, there_stride = op->remote_stride;
    if (op->region->file && op->kind & AT_OP_READ) return at_own_copy_pages(op->local, there, here_pages, there_pages, k, page, here_stride, there_stride);
    if (op->region->file) return at_own_copy_pages(there, op->local, there_pages, here_pages, k, page, there_stride, here_stride);
    if (op->kind & AT_OP_READ) at_copy_pages(op->local, there, here_pages, there_pages, k, page, here_stride, there_stride, cold);
    else at_copy_pages(there, op->local, there_pages, here_pages, k, page, there_stride, here_stride, cold);
    return 0;
}

static int move_pages(at_shm *shm, const at_op *op, uint64_t first, uint64_t n, at_active *active, uint64_t *moved, int *oserror) {
    at_remote *remote = op->remote;
    uint64_t page = op->nbytes, chunk = remote->base != NULL ? AT_CHUNK : FOREIGN_CHUNK;
    uint64_t most = page >= chunk ? 1 : chunk / page;
    int cold = at_copy_prefers_cold(op->footprint);
    while (*moved < n) {
        uint64_t k = n - *moved < most ? n - *moved : most, at = first + *moved;
        active->begin = op->remote_offset, active->nbytes = remote->nbytes - op->remote_offset;
        if (is_punched(remote, k * page)) return AT_EPROTO;
        int rc = at_shm_enter(shm, active, remote), error = 0;
        if (rc != AT_OK) return rc;
        hold(remote);
        error = remote->base == NULL ? foreign_pages(shm, op, at, k) : mapped_pages(op, at, k, cold);
        at_shm_leave(active);
        if (error != 0) return failed(error, remote->base != NULL || (error == EFAULT && pages_gone(op, at, k)), oserror);
        if (op->kind & AT_OP_READ && revoked(remote)) return AT_ESTALE;
        *moved += k;
        if (*moved < n && withdrawn(op)) return AT_OK;
    }
    return AT_OK;
}

int at_shm_move(at_peer *peer, const at_op *op, uint64_t first, uint64_t n, int mover, uint64_t *moved, int *oserror) {
    at_shm *shm = peer->impl;
    if (op->kind == AT_OP_SIGNAL || op->nbytes == 0) { /* nothing to copy, but a stale grant counts nothing either */
        if (op->remote != NULL && atomic_load(op->remote->word) != op->remote->epoch) return AT_ESTALE;
        if (atomic_load(&shm->outbound->barred) != 0) return AT_EPEER;
        *moved = n;
        return AT_OK;
    }
    at_active *active = &shm->outbound->active[mover];
    if (is_short(op, n)) return move_short(shm, op, first, n, active, moved);
    if (op->remote->base == NULL && atomic_load(&shm->foreign) == AT_FOREIGN_UNKNOWN) atomic_store(&shm->foreign, at_shm_probe(shm));
    if (op->remote->base == NULL && atomic_load(&shm->foreign) == 0) return failed(shm->foreign_why, 0, oserror);
    return op->kind & AT_OP_PAGES ? move_pages(shm, op, first, n, active, moved, oserror)
                                   : move_bytes(shm, op, first, n, active, moved, oserror);
}
