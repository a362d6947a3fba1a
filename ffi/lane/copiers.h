/* What the rest of the lane knows of copiers, see copiers.c. All with the lock but for the last. */
#ifndef AT_COPIERS_H
#define AT_COPIERS_H

#include "lane.h"

int at_risk(const at_op *op);          /* AT_RISK_* of a resolved operation, on the path that it is on */
int at_copiers_ready(at_lane *lane);   /* there is a copier: AT_OK, AT_ENOMEM, or AT_EIO with lane->oserror */
void at_copiers_call(at_lane *lane);   /* there may be something for them */
void at_copiers_ask(at_lane *lane);    /* they leave soon: thread_stop is set */
void at_copiers_join(at_lane *lane);   /* all have left; without the lock */
int64_t at_unlock_and_progress(at_lane *lane, int64_t result); /* the end of a submitting call */
int at_pages_make_sense(uint64_t n, uint64_t page_bytes, uint64_t local_stride, uint64_t remote_stride);

#endif
