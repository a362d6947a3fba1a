/* Index tables of one call, as they were when they were copied: other threads may change the caller's at any time, and what is
 * checked has to be what is used. */
#ifndef AT_TABLES_H
#define AT_TABLES_H

#include <stdint.h>

typedef struct at_lane at_lane;

typedef struct {
    int64_t *pages; /* the local ones, then the remote ones */
    uint64_t room;  /* of both */
} at_tables;

/* With the lock: room for n pages of two tables, AT_OK or AT_ENOMEM. To be given back when the call is over, also where this failed: what
 * goes on has a copy of its own by then (at_op_keep). */
int at_tables_take(at_lane *lane, uint64_t n, at_tables *tables);
void at_tables_give(at_lane *lane, at_tables *tables);

#endif
