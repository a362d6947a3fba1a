/* What the threads of a lane do. A lane is told at its birth (at_lane_new), so that what starts them knows neither. */
#ifndef AT_THREADS_H
#define AT_THREADS_H

#include "lane.h"

void *at_thread_main(void *lane); /* mover.c: of the native thread, on Linux */
/* jobs.c, with the lock, which it drops: what one copier does, with `mover` as its active word. Without an operation: it finds out how the
 * peer's memory is reached. *since: when the part began that it is inside of. */
void at_copier_job(at_lane *lane, at_peer *peer, at_op *op, int risk, int mover, uint64_t *since);

#endif
