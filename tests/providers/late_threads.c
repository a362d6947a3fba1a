/* Every thread is held up for LATE_MS as soon as it asks who it is, as on a machine that has no core for it. CPython asks that when it has
 * looked whether the interpreter ends, and before it takes the thread's state. Preloaded by test_elsewhere.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

typedef struct {
    void *(*body)(void *);
    void *argument;
} start;

static __thread int fresh;

static void *begin(void *given) {
    start one = *(start *)given;
    free(given);
    fresh = 1;
    return one.body(one.argument);
}

pthread_t pthread_self(void) {
    static pthread_t (*next)(void);
    if (next == NULL) next = (pthread_t (*)(void))dlsym(RTLD_NEXT, "pthread_self");
    if (fresh) {
        fresh = 0;
        const char *ms = getenv("LATE_MS");
        long n = ms != NULL ? strtol(ms, NULL, 10) : 0;
        struct timespec span = {n / 1000, n % 1000 * 1000000};
        (void)nanosleep(&span, NULL);
    }
    return next();
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument) {
    int (*next)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) =
        (int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *))dlsym(RTLD_NEXT, "pthread_create");
    start *one = malloc(sizeof *one);
    if (one == NULL) return ENOMEM;
    *one = (start){body, argument};
    return next(thread, attributes, begin, one);
}
