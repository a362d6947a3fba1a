/* What our extension asks the allocator and the operating system for, and the n-th such request after failing_arm is refused, as a
 * machine with nothing left would. Requests of other libraries pass. Preloaded by tests/native/refused.py, never part of the library. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/types.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);

static _Atomic uintptr_t low, high;
static _Atomic long left;
static const char *_Atomic struck = "";

/* Refuse the nth request (0: none) of code in [from, to). */
void failing_arm(uintptr_t from, uintptr_t to, long nth) {
    low = from;
    high = to;
    struck = "";
    left = nth;
}

const char *failing_struck(void) { return struck; } /* which function was refused; "": none */

static int refused(const void *caller, const char *name, int error) {
    uintptr_t at = (uintptr_t)caller;
    if (at < low || at >= high) return 0;
    if (left == 0 || --left != 0) return 0;
    struck = name;
    errno = error;
    return 1;
}

#define REFUSED(name, error) refused(__builtin_return_address(0), name, error)
#define NEXT(result, name, ...)                                                                                                        \
    static result (*next)(__VA_ARGS__);                                                                                                \
    if (next == NULL) next = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

void *malloc(size_t n) { return REFUSED("malloc", ENOMEM) ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t size) { return REFUSED("calloc", ENOMEM) ? NULL : __libc_calloc(n, size); }
void *realloc(void *old, size_t n) { return REFUSED("realloc", ENOMEM) ? NULL : __libc_realloc(old, n); }

int memfd_create(const char *name, unsigned flags) {
    NEXT(int, memfd_create, const char *, unsigned);
    return REFUSED("memfd_create", EMFILE) ? -1 : next(name, flags);
}

int eventfd(unsigned count, int flags) {
    NEXT(int, eventfd, unsigned, int);
    return REFUSED("eventfd", EMFILE) ? -1 : next(count, flags);
}

int epoll_create1(int flags) {
    NEXT(int, epoll_create1, int);
    return REFUSED("epoll_create1", EMFILE) ? -1 : next(flags);
}

int epoll_ctl(int epoll, int op, int fd, struct epoll_event *event) {
    NEXT(int, epoll_ctl, int, int, int, struct epoll_event *);
    return op == EPOLL_CTL_ADD && REFUSED("epoll_ctl", ENOMEM) ? -1 : next(epoll, op, fd, event);
}

void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset) {
    NEXT(void *, mmap, void *, size_t, int, int, int, off_t);
    return REFUSED("mmap", ENOMEM) ? (void *)-1 : next(at, n, protection, flags, fd, offset);
}

int ftruncate(int fd, off_t n) {
    NEXT(int, ftruncate, int, off_t);
    return REFUSED("ftruncate", ENOMEM) ? -1 : next(fd, n);
}

int fallocate(int fd, int mode, off_t at, off_t n) {
    NEXT(int, fallocate, int, int, off_t, off_t);
    return REFUSED("fallocate", ENOMEM) ? -1 : next(fd, mode, at, n);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument) {
    NEXT(int, pthread_create, pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    return REFUSED("pthread_create", EAGAIN) ? EAGAIN : next(thread, attributes, body, argument);
}
