/* What the rest of the lane knows of copiers, see copiers.c. All with the lock but for the last. */
#ifndef AT_COPIERS_H
#define AT_COPIERS_H

#include "lane.h"

/* AT_RISK_* of a resolved operation, on a synchronous path. */
static inline int at_risk(const at_op *op) {
    if (op->remote == NULL || !(op->remote->foreign | op->region->slow) || op->nbytes == 0) return AT_RISK_NONE;
    return op->remote->foreign ? AT_RISK_FOREIGN : AT_RISK_SLOW;
}

int at_copiers_ready(at_lane *lane);   /* there is a copier: AT_OK, AT_ENOMEM, or AT_EIO with lane->oserror */
void at_copiers_call(at_lane *lane);   /* there may be something for them */
void at_copiers_ask(at_lane *lane);    /* they leave soon: thread_stop is set */
void at_copiers_join(at_lane *lane);   /* all have left; without the lock */

#endif
