/* Memory of ours whose pages may be taken away while it is registered: a mapping of a file that a process shortens (a checkpoint that is
 * replaced while it is served). Touching such a page raises SIGBUS, which ends the process.
 *
 * A handler for this signal would be the whole process's, and others have theirs (faulthandler, sanitizers, other languages). So such
 * memory is copied by the kernel, which answers EFAULT: process_vm_readv of ourselves, or /proc/self/mem where that is forbidden. It costs
 * a system call for each copy, about 2 us, and large copies take as long as to memory that a peer has registered. Memory of the heap and
 * of our own segments is never copied so. */
#define _GNU_SOURCE
#include "own.h"

#include <errno.h>
#include <string.h>

#ifndef __linux__

int at_own_kind(const void *base, uint64_t nbytes) {
    (void)base, (void)nbytes;
    return AT_FILE_NONE;
}

int at_own_copy(void *to, const void *from, uint64_t n) {
    memcpy(to, from, (size_t)n);
    return 0;
}

int at_own_copy_pages(uint8_t *to, const uint8_t *from, const int64_t *to_pages, const int64_t *from_pages, uint64_t n, uint64_t page,
                      uint64_t to_stride, uint64_t from_stride) {
    for (uint64_t i = 0; i < n; i++) memcpy(to + (uint64_t)to_pages[i] * to_stride, from + (uint64_t)from_pages[i] * from_stride, (size_t)page);
    return 0;
}

int at_own_readable(const void *base, uint64_t n) {
    (void)base, (void)n;
    return 1;
}

#else

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#define BATCH 512u /* iovecs at once (the kernel takes up to 1024) */
#define NAME 256u

/* ---- what it is ---- */

/* PROCMAP_QUERY of Linux 6.11: one mapping without the text of all of them. */
struct query {
    uint64_t size, flags, at, start, end, rights, page, offset, inode;
    uint32_t major, minor, name_bytes, build_bytes;
    uint64_t name, build;
};
#define QUERY _IOWR('f', 17, struct query)
#define NEXT_OF_A_FILE UINT64_C(0x30) /* the mapping of a file that covers the address, or the first one behind it */

static int starts(const char *name, const char *with) { return strncmp(name, with, strlen(with)) == 0; }

/* Kernel objects without a file that others could shorten, devices, and our own segments, whose size is sealed, are none. */
static int kind_of(const char *name) {
    if (name[0] != '/' || starts(name, "/SYSV") || starts(name, "/anon_hugepage") || starts(name, "/dmabuf")) return AT_FILE_NONE;
    if (starts(name, "/memfd:")) return starts(name, "/memfd:aiotransfer") ? AT_FILE_NONE : AT_FILE_MEMORY;
    if (starts(name, "/dev/shm/")) return AT_FILE_MEMORY;
    return starts(name, "/dev/") && !starts(name, "/dev/hugepages/") ? AT_FILE_NONE : AT_FILE_SLOW;
}

/* By asking for mappings one by one: the kind, or -1 where the kernel does not know that. */
static int ask(int maps, uint64_t start, uint64_t end) {
    int kind = AT_FILE_NONE;
    for (uint64_t at = start; at < end && kind != AT_FILE_SLOW;) {
        char name[NAME] = "";
        struct query query = {.size = sizeof query, .flags = NEXT_OF_A_FILE, .at = at, .name_bytes = NAME, .name = (uint64_t)(uintptr_t)name};
        if (ioctl(maps, QUERY, &query) != 0) {
            if (errno == ENOENT) return kind; /* no further one */
            if (errno != ENAMETOOLONG) return -1;
            return AT_FILE_SLOW; /* devices and memory have short names */
        }
        if (query.start >= end) return kind;
        int this = kind_of(name);
        kind = this > kind ? this : kind;
        at = query.end;
    }
    return kind;
}

static int read_all(uint64_t start, uint64_t end) {
    FILE *maps = fopen("/proc/self/maps", "re");
    int kind = AT_FILE_NONE, whole = 1;
    if (maps == NULL) return AT_FILE_SLOW; /* nothing is known: the careful way */
    for (char line[512]; fgets(line, sizeof line, maps) != NULL && kind != AT_FILE_SLOW;) {
        int begins = whole, name = 0;
        uint64_t low = 0, high = 0;
        whole = strchr(line, '\n') != NULL;
        if (!begins || sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %*s %*s %*s %n", &low, &high, &name) < 2) continue;
        if (low >= end) break;
        int this = high > start && name != 0 ? kind_of(line + name) : AT_FILE_NONE;
        kind = this > kind ? this : kind;
    }
    (void)fclose(maps);
    return kind;
}

int at_own_kind(const void *base, uint64_t nbytes) {
    uint64_t start = (uint64_t)(uintptr_t)base;
    if (nbytes == 0) return AT_FILE_NONE;
    int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC), kind = -1;
    if (maps >= 0) {
        kind = ask(maps, start, start + nbytes);
        (void)close(maps);
    }
    return kind >= 0 ? kind : read_all(start, start + nbytes);
}

/* ---- copying ---- */

static int by_file(void *to, const void *from, uint64_t n) {
    int memory = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    if (memory < 0) { /* no way to be careful */
        memcpy(to, from, (size_t)n);
        return 0;
    }
    ssize_t done = 1;
    for (uint64_t at = 0; at < n && done > 0; at += (uint64_t)done) {
        do done = pread(memory, (uint8_t *)to + at, (size_t)(n - at), (off_t)((uintptr_t)from + at));
        while (done < 0 && errno == EINTR);
    }
    (void)close(memory);
    return done > 0 ? 0 : EFAULT;
}

/* All of `to` from all of `from`, which have k pieces of equal lengths. */
static int copy_pieces(const struct iovec *to, const struct iovec *from, uint32_t k) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < k; i++) bytes += to[i].iov_len;
    ssize_t done = process_vm_readv(getpid(), to, k, from, k, 0);
    if (done >= 0 && (uint64_t)done == bytes) return 0;
    if (done >= 0 || errno == EFAULT) return EFAULT;
    int error = 0;
    for (uint32_t i = 0; i < k && error == 0; i++) error = by_file(to[i].iov_base, from[i].iov_base, from[i].iov_len);
    return error;
}

static void *writable(const void *at) { return (void *)(uintptr_t)at; } /* an iovec says nothing of that */

int at_own_copy(void *to, const void *from, uint64_t n) {
    for (uint64_t at = 0; at < n; at += (uint64_t)1 << 30) { /* one call moves less than 2 GiB */
        uint64_t k = n - at < (uint64_t)1 << 30 ? n - at : (uint64_t)1 << 30;
        struct iovec here = {(uint8_t *)to + at, (size_t)k}, there = {writable((const uint8_t *)from + at), (size_t)k};
        int error = copy_pieces(&here, &there, 1);
        if (error != 0) return error;
    }
    return 0;
}

int at_own_copy_pages(uint8_t *to, const uint8_t *from, const int64_t *to_pages, const int64_t *from_pages, uint64_t n, uint64_t page,
                      uint64_t to_stride, uint64_t from_stride) {
    struct iovec here[BATCH], there[BATCH];
    uint64_t most = page >> 20 != 0 ? 1 : BATCH; /* together less than 2 GiB */
    int error = 0;
    for (uint64_t at = 0; at < n && error == 0; at += most) {
        uint32_t k = (uint32_t)(n - at < most ? n - at : most);
        for (uint32_t i = 0; i < k; i++) {
            here[i] = (struct iovec){to + (uint64_t)to_pages[at + i] * to_stride, (size_t)page};
            there[i] = (struct iovec){writable(from + (uint64_t)from_pages[at + i] * from_stride), (size_t)page};
        }
        error = most == 1 ? at_own_copy(here[0].iov_base, there[0].iov_base, page) : copy_pieces(here, there, k);
    }
    return error;
}

int at_own_readable(const void *base, uint64_t n) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), at = (uint64_t)(uintptr_t)base, end = at + n;
    struct iovec here[BATCH], there[BATCH];
    uint8_t seen[BATCH];
    while (at < end) {
        uint32_t k = 0;
        for (; k < BATCH && at < end; k++, at = (at / page + 1) * page) {
            here[k] = (struct iovec){&seen[k], 1};
            there[k] = (struct iovec){writable((const void *)(uintptr_t)at), 1};
        }
        if (copy_pieces(here, there, k) != 0) return 0;
    }
    return 1;
}

#endif
