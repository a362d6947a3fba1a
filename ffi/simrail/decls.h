/* simrail: rails of the fabric provider over a simulated network, for tests of what breaks when. Two lanes of one thread and one process;
 * nothing happens but in at_simrail_step, in an order that the seed decides. */

typedef struct at_simrail at_simrail;

at_simrail *at_simrail_new(uint64_t seed); /* NULL: no memory */
void at_simrail_free(at_simrail *net);    /* after the lanes */
/* A rail, whose own cable to the network has this number (below 64): AT_OK or AT_E*. Flags: AT_FAB_MARKS or AT_FAB_SENDERS, and AT_FAB_ORDERED. */
int at_simrail_rail(at_lane *lane, at_simrail *net, uint32_t cable, uint32_t flags, uint64_t most_bytes, uint32_t iov, at_fab **out);
/* So many steps: something lands, is confirmed, or is noticed to be lost. How many did anything. */
int at_simrail_step(at_simrail *net, uint32_t steps);
/* Nothing gets through a dead cable, from either end of a connection, in either direction, nor can a connection be opened by it. */
void at_simrail_cut(at_simrail *net, uint32_t cable, int dead);
/* What would have been a write into memory that was not lent, or an answer that was not asked for: 0. */
int at_simrail_violations(const at_simrail *net);
