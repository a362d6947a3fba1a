/* Mistakes on purpose, one of each kind that a sanitizer must catch: a run in which these pass proves nothing. Compiled and called by
 * tests/sanitize.py only. */
#include <pthread.h>
#include <stdlib.h>

static int shared;

/* Nothing wrong: must pass. */
int clean(int n) {
    volatile char *memory = malloc((size_t)n);
    memory[n - 1] = 1;
    free((void *)memory);
    return 0;
}

/* One byte behind the end of a block. */
int overflow(int n) {
    volatile char *memory = malloc((size_t)n);
    memory[n] = 1;
    free((void *)memory);
    return 0;
}

/* A byte of a block that was given back. */
int use_after_free(int n) {
    volatile char *memory = malloc((size_t)n);
    free((void *)memory);
    return memory[0] == 0;
}

/* n is INT_MAX. */
int undefined(int n) {
    volatile int next = n;
    next = next + 1;
    return next;
}

static void *count(void *times) {
    for (int i = 0; i < *(int *)times; i++) *(volatile int *)&shared += 1;
    return NULL;
}

/* Two threads, one plain int. */
int race(int n) {
    pthread_t other;
    if (pthread_create(&other, NULL, count, &n) != 0) return 1;
    count(&n);
    (void)pthread_join(other, NULL);
    return 0;
}
