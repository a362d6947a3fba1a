/* Shared segments and foreign memory.
 *
 * A segment is sealed against shrinking, growing and unsealing before any other process sees it, and fully allocated, so that no
 * access to it can raise SIGBUS; the mapper verifies both. Foreign memory (buffers we did not allocate) is reached through
 * the kernel: process_vm_writev copies once, /proc/PID/mem through a bounce page but survives yama when it was opened with
 * the peer's blessing.
 *
 * A pid names the program that runs there now: after an exec of the peer its addresses are another program's. A descriptor of
 * /proc/PID/mem stays with the memory that it was opened for, and reads and writes nothing once that is gone. So small copies go through
 * it, where it is as fast; before each of the others, of 1 MiB at most, it is asked whether that memory is still there. A program may
 * be replaced just after the answer. So the kernel call itself begins with the peer's control cookie (at_shm_copy_by_pid): the kernel
 * takes hold of one program's memory for the whole call and copies in order. A read takes the cookie from the same memory as the data
 * and compares it. A write stores the cookie where it lies anyway: in another program that address holds no memory, unless chance put
 * some at the same random address, and the call ends there. */
#define _GNU_SOURCE
#include "shm.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define STEP ((uint64_t)32 << 20) /* pages are made so many bytes at a time */
#define TMPFS 0x01021994 /* TMPFS_MAGIC of <linux/magic.h> */
#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static uint64_t whole_pages(uint64_t nbytes) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    return nbytes == 0 ? page : (nbytes + page - 1) / page * page;
}

/* Signals wait between the steps: fallocate gives up at any that is pending and gives back what it had, so that under a fast timer it
 * would never end. */
static int reserve(int fd, uint64_t size) {
    sigset_t all, before;
    sigfillset(&all);
    int rc = 0;
    for (uint64_t at = 0; at < size && rc == 0; at += STEP) {
        (void)pthread_sigmask(SIG_SETMASK, &all, &before);
        do rc = fallocate(fd, 0, (off_t)at, (off_t)(size - at < STEP ? size - at : STEP));
        while (rc != 0 && errno == EINTR); /* stopped and continued */
        int saved = errno;
        (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
        errno = saved;
    }
    return rc;
}

int at_segment_new(uint64_t nbytes, void **base, int *fd_out) {
    if (nbytes > (uint64_t)INT64_MAX / 2) return -ENOMEM;
    uint64_t size = whole_pages(nbytes);
    int fd = memfd_create("aiotransfer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return -errno;
    int rc = 0;
    if (ftruncate(fd, (off_t)size) != 0 || reserve(fd, size) != 0 || fcntl(fd, F_ADD_SEALS, SEALS) != 0) {
        rc = -errno;
    } else {
        void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (at == MAP_FAILED) rc = -errno;
        else *base = at;
    }
    if (rc != 0) close(fd);
    else *fd_out = fd;
    return rc;
}

int at_shm_is_memory(int fd) {
    struct statfs system;
    return fstatfs(fd, &system) == 0 && system.f_type == TMPFS;
}

int at_segment_map(int fd, uint64_t nbytes, void **base) {
    struct stat info;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & SEALS) != SEALS || !at_shm_is_memory(fd)) return -EPERM;
    if (fstat(fd, &info) != 0) return -errno;
    if (nbytes > (uint64_t)INT64_MAX / 2 || (uint64_t)info.st_size != whole_pages(nbytes)) return -ERANGE;
    if ((uint64_t)info.st_blocks * 512 < (uint64_t)info.st_size) return -ENODATA; /* touching it would be paid for by us */
    void *at = mmap(NULL, (size_t)info.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) return -errno;
    *base = at;
    return 0;
}

int at_segment_touch(void *base, uint64_t nbytes) {
    uint64_t size = whole_pages(nbytes);
    for (uint64_t at = 0; at < size; at += STEP) {
        uint64_t n = size - at < STEP ? size - at : STEP;
        if (madvise((uint8_t *)base + at, n, MADV_POPULATE_WRITE) != 0) return -errno;
    }
    return 0;
}

int at_segment_unmap(void *base, uint64_t nbytes) { return munmap(base, whole_pages(nbytes)) == 0 ? 0 : -errno; }

int at_memory_mapped(void *base, uint64_t nbytes) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), start = (uintptr_t)base & ~(page - 1);
    if (nbytes == 0) return 0;
    if (nbytes > UINTPTR_MAX - (uintptr_t)base) return -ENOMEM;
    return msync((void *)start, (size_t)((uintptr_t)base + nbytes - start), MS_ASYNC) == 0 ? 0 : -errno;
}

/* Whether the control cookie is seen where the peer said: in the memory behind mem_fd, or in that of the process that has the pid now. */
static int sees(const at_shm *shm, int by_fd) {
    uint8_t seen[16] = {0};
    struct iovec here = {seen, sizeof seen}, there = {(void *)(uintptr_t)shm->probe_va, sizeof seen};
    ssize_t n = by_fd ? pread(shm->mem_fd, seen, sizeof seen, (off_t)shm->probe_va) : process_vm_readv(shm->pid, &here, 1, &there, 1, 0);
    if (n < 0) return 0;
    errno = ESRCH; /* readable, but another program */
    return n == (ssize_t)sizeof seen && memcmp(seen, shm->probe_cookie, sizeof seen) == 0;
}

int at_shm_probe(at_shm *shm) {
    int direct = sees(shm, 0), why = direct ? 0 : errno;
    if (shm->mem_fd >= 0 && !sees(shm, 1)) { /* of another program: the pid had been given away, or taken by exec, before it was opened */
        int fd = shm->mem_fd;
        shm->mem_fd = -1;
        close(fd);
    }
    shm->foreign_why = why;
    return direct ? 1 : shm->mem_fd >= 0 ? 2 : 0;
}

int at_shm_gone(const at_shm *shm) {
    struct pollfd p = {.fd = shm->pidfd, .events = POLLIN};
    return shm->pidfd >= 0 && poll(&p, 1, 0) > 0;
}

int at_shm_unchanged(const at_shm *shm) {
    uint8_t seen;
    if (at_shm_gone(shm)) return 0;
    return shm->mem_fd >= 0 ? pread(shm->mem_fd, &seen, 1, (off_t)shm->probe_va) == 1 : sees(shm, 0);
}

/* Copies that are cheap that way go through mem_fd, which stays with the memory it was opened for. */
static ssize_t by_fd(const at_shm *shm, uint8_t *local, uint64_t va, uint64_t nbytes, int read) {
    ssize_t n = read ? pread(shm->mem_fd, local, nbytes, (off_t)va) : pwrite(shm->mem_fd, local, nbytes, (off_t)va);
    if (n < 0 && errno == EIO) errno = EFAULT; /* nothing is mapped there, in the words of process_vm */
    if (n == 0) errno = ESRCH; /* that memory is gone: its program has ended, or another one has taken its place */
    return n == 0 ? -1 : n;
}

ssize_t at_shm_copy_by_pid(const at_shm *shm, struct iovec *here, struct iovec *there, uint32_t k, int read) {
    uint8_t cookie[sizeof shm->probe_cookie];
    if (!at_shm_unchanged(shm)) {
        errno = ESRCH;
        return -1;
    }
    memcpy(cookie, shm->probe_cookie, sizeof cookie);
    here[0] = (struct iovec){cookie, sizeof cookie};
    there[0] = (struct iovec){(void *)(uintptr_t)shm->probe_va, sizeof cookie};
    ssize_t n = read ? process_vm_readv(shm->pid, here, k, there, k, 0) : process_vm_writev(shm->pid, here, k, there, k, 0);
    ssize_t moved = n - (ssize_t)sizeof cookie;
    if (n >= 0 && (moved < 0 || memcmp(cookie, shm->probe_cookie, sizeof cookie) != 0)) errno = ESRCH; /* another program's memory */
    else if (n >= 0 && moved == 0) errno = EFAULT;
    else if (n < 0 && errno == EFAULT && !at_shm_unchanged(shm)) errno = ESRCH;
    else return n < 0 ? -1 : moved;
    return -1;
}

static ssize_t by_pid(const at_shm *shm, uint8_t *local, uint64_t va, uint64_t nbytes, int read) {
    struct iovec here[2] = {[1] = {local, nbytes}}, there[2] = {[1] = {(void *)(uintptr_t)va, nbytes}};
    return at_shm_copy_by_pid(shm, here, there, 2, read);
}

int at_shm_foreign_copy(at_shm *shm, uint8_t *local, uint64_t va, uint64_t nbytes, int read) {
    int may = atomic_load(&shm->foreign) == 1, direct = may && (shm->mem_fd < 0 || nbytes > AT_SHM_SMALL);
    while (nbytes > 0) {
        ssize_t n = direct ? by_pid(shm, local, va, nbytes, read) : by_fd(shm, local, va, nbytes, read);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EFAULT && may && !direct) { /* a page that its owner makes on demand: only the other way waits for it */
            direct = 1;
            continue;
        }
        if (n < 0) return errno;
        local += n;
        va += (uint64_t)n;
        nbytes -= (uint64_t)n;
    }
    return 0;
}
