/* Local memory that can hold up whoever touches it, for ports that only post: see stage.c. All with the lock. */
#ifndef AT_STAGE_H
#define AT_STAGE_H

#include "lane.h"

#define AT_STAGED_BYTES ((uint64_t)32 << 20) /* copies that one peer's operations have at a time: none is begun beyond that */

int at_stage_may(const at_op *op); /* may a copier begin with it now? */
/* A copier's, of an operation that `waits`; drops the lock meanwhile. Afterwards it is queued for its port, or it has ended. */
void at_stage_next(at_lane *lane, at_op *op);
int at_stage_landed(at_op *op);  /* all that was posted of it has landed. 1: a copier goes on with it; 0: the port does */
void at_stage_drop(at_op *op);   /* its local memory is its region's again; nothing of it is posted */
void at_stage_free(at_stage *stage); /* of a lane that ends */

#endif
