/* The simulator: a network between lanes of one process, seeded, on a virtual clock. Portable C.
 *
 * All chances are per mille. A net lives until at_net_free was called and its last lane is gone. Calls may come from any thread;
 * with one thread and one seed the same calls give the same trace. */

typedef struct at_net at_net;

typedef struct {
    uint64_t seed;
    uint64_t delay_min, delay_max; /* ns from post to delivery, drawn for each work request; a range reorders */
    uint32_t refuse;               /* a post is refused for now */
    uint32_t split;                /* a work request lands in two halves, the second after another delay */
} at_net_config;

typedef struct {
    uint64_t posted, delivered, refused, delayed, reordered, split, stale, lost, fenced, held, killed;
    uint64_t waiting; /* work requests under way now */
    uint64_t now;     /* virtual ns */
    uint64_t trace;   /* a hash over every decision so far */
} at_net_counts;

at_net *at_net_new(const at_net_config *config); /* copies config; NULL without memory */
void at_net_free(at_net *net);
void at_net_configure(at_net *net, const at_net_config *config); /* from now on; the seed stays */
/* A lane may be in one net; it leaves when it is freed. */
int at_net_join(at_net *net, at_lane *lane);
/* A peer of `lane` for the lane with incarnation `to` in the same net; each side connects. AT_EPEER: it is not there. */
int64_t at_sim_connect(at_lane *lane, uint64_t to);

/* Deliver the next work request, moving the clock to it. 1; 0 when nothing is under way. */
int at_net_step(at_net *net);
/* Deliver what is due within the next `ns`, then move the clock there. How many. */
int64_t at_net_advance(at_net *net, uint64_t ns);
/* Virtual ns until the next work request is due; -1: nothing is under way (what is held does not count). */
int64_t at_net_next(at_net *net);
/* Hold a lane, or let go: while it is held, nothing of or for it is delivered. */
int at_net_hold(at_net *net, uint64_t incarnation, int on);
/* The lane dies without a goodbye: what was for it fails, what was from it never lands, its peers get AT_EV_PEER. */
int at_net_kill(at_net *net, uint64_t incarnation);
/* The connection breaks: what is under way fails with AT_ERAIL, and has landed wholly, by half or not at all. How many. */
int64_t at_net_break(at_net *net, uint64_t from, uint64_t to);
void at_net_counts_get(at_net *net, at_net_counts *out);
