/* Sharing out: which rail carries the next run of an operation, and how large the pieces of a write are. Pure; core/rails.py says the same
 * in Python, and a property test holds the two to each other.
 *
 * A run goes to the rail that has the least under way, and among equals to the next one in turn: small operations rotate, a slow rail is
 * asked for less, and one that is closed for nothing. */
#include "lane.h"

int32_t at_share_pick(const uint64_t *load, const int32_t *open, uint32_t n, uint32_t turn) {
    int32_t best = -1;
    for (uint32_t k = 0; k < n; k++) {
        uint32_t i = (turn + k) % n;
        if (open[i] && (best < 0 || load[i] < load[best])) best = (int32_t)i;
    }
    return best;
}

uint64_t at_share_piece(uint64_t nbytes, uint32_t rails, uint64_t most) {
    if (rails < 2 || nbytes <= AT_STRIPE_LEAST) return most;
    uint64_t piece = (nbytes - 1) / (rails * (uint64_t)AT_STRIPES_EACH) + 1;
    piece = (piece + AT_STRIPE_STEP - 1) / AT_STRIPE_STEP * AT_STRIPE_STEP;
    if (piece < AT_STRIPE_STEP) piece = AT_STRIPE_STEP;
    if (piece > AT_STRIPE_MOST) piece = AT_STRIPE_MOST;
    return piece < most ? piece : most;
}
