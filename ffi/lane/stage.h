/* Local memory that can block the thread that touches it, for ports that only post: see stage.c. All with the lock. */
#ifndef AT_STAGE_H
#define AT_STAGE_H

#include "lane.h"

#define AT_STAGED_BYTES ((uint64_t)32 << 20) /* copies that one peer's operations have at a time: none is begun beyond that */

int at_stage_may(const at_op *op); /* may a copier begin with it now? */
int at_stage_new(at_op *op);       /* AT_OK or AT_ENOMEM */
int at_stage_copy(const at_op *op); /* NO LOCK: what has been read goes to memory, or the next part of what is written comes from there. Its status */
int at_stage_is_over(const at_op *op); /* of a read: all of it is where it belongs */
void at_stage_show(at_op *op);   /* the port sees the copy from here on */
int at_stage_landed(at_op *op);  /* all that was posted of it has landed. 1: a copier goes on with it, it is to be queued; 0: the port does */
void at_stage_drop(at_op *op);   /* its local memory is its region's again; nothing of it is posted */
void at_stage_free(at_stage *stage); /* of a lane that ends */

#endif
