/* What a measurement asks of the device that does nothing (stub_verbs.c). */
#ifndef STUB_VERBS_H
#define STUB_VERBS_H

#include <infiniband/verbs.h>
#include <stdatomic.h>
#include <stdint.h>

typedef struct {
    uint64_t requests, calls; /* work requests posted, and in how many calls */
    uint64_t stamped, stamp;  /* when the call of this number was made, CLOCK_MONOTONIC in ns */
} stub_counts;
extern stub_counts stub;

extern struct ibv_context *stub_context; /* of the device that was opened last */

/* n writes with this immediate have landed by the queue pair of this number. How many: each uses up a receive. */
uint32_t stub_arrive(struct ibv_context *context, uint32_t number, uint32_t imm, uint32_t n);
/* Where the far side of that queue pair gives back the receives that were used up; it does so at once. */
void stub_gives_credit(struct ibv_context *context, uint32_t number, _Atomic uint64_t *word);

#endif
