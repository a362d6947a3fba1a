/* What the rest of the lane knows of copiers, see copiers.c. All with the lock but for the last. */
#ifndef AT_COPIERS_H
#define AT_COPIERS_H

#include "lane.h"

int at_is_there(const at_op *op);   /* resident.c: are all pages of local memory that it needs? */
void at_fetch_local(const at_op *op); /* wait for them. NO LOCK, a copier's */
static inline int at_may_wait(const at_region *region) { return region->slow | (region->absent != 0); }

/* AT_RISK_* of a resolved operation; sets op->waits. */
static inline int at_risk(at_op *op) {
    if (op->remote == NULL || !(op->remote->foreign | at_may_wait(op->region)) || op->nbytes == 0) return AT_RISK_NONE;
    op->waits = at_may_wait(op->region) && (op->region->slow || !at_is_there(op));
    return op->remote->foreign ? AT_RISK_FOREIGN : op->waits ? AT_RISK_SLOW : AT_RISK_NONE;
}

int at_copiers_ready(at_lane *lane);   /* there is a copier: AT_OK, AT_ENOMEM, or AT_EIO with lane->oserror */
void at_copiers_call(at_lane *lane);   /* there may be something for them */
void at_copiers_pin(at_lane *lane);    /* to lane->cpus */
void at_copiers_ask(at_lane *lane);    /* they leave soon: thread_stop is set */
void at_copiers_join(at_lane *lane);   /* all have left; without the lock */

#endif
