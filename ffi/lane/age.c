/* For tests: a lane that has been used for years.
 *
 * Ids are made of a slot and of how often that was used (lane.h, ops.c). No test uses a slot so often that this count comes near its end;
 * this function sets it there, so that an ordinary test sees what happens then. Nothing else calls it. */
#include "lane.h"

int at_lane_age(at_lane *lane, uint64_t generation) {
    uint32_t narrow = generation < AT_MOST_LIVES - 1 ? (uint32_t)generation : AT_MOST_LIVES - 1;
    at_lock(lane);
    int rc = at_ops_age(lane, generation);
    if (rc == AT_OK) rc = at_regions_age(lane, narrow);
    if (rc == AT_OK) rc = at_remotes_age(lane, narrow);
    if (rc == AT_OK) rc = at_watches_age(lane, narrow);
    if (rc == AT_OK) rc = at_imm_age(lane, narrow);
    uint64_t most = (UINT64_C(1) << (63 - AT_PEER_BITS)) - 1 - AT_AGED;
    if (lane->peer_serial < generation) lane->peer_serial = generation < most ? generation : most;
    for (uint32_t slot = lane->grant_top; slot < AT_GRANTS; slot++) atomic_store(&lane->control->epoch[slot], generation & ~UINT64_C(1));
    at_unlock(lane);
    return rc;
}
