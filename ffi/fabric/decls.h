/* fabric: peers on other hosts, by libfabric (ofi/decls.h) or libibverbs (verbs/decls.h), which open its rails. See fabric.h for how it
 * works. */

typedef struct at_fab at_fab;

enum at_fab_flags {
    AT_FAB_DELIVERY = 1,  /* a plain completion is no proof here: every write asks for delivery to be confirmed */
    AT_FAB_ORDERED = 2,   /* the writes of one connection land and count in the order in which they were posted */
    AT_FAB_MARKS = 4,     /* 64 bits travel with a write: the value, its sender, and how many pages it covers */
    AT_FAB_PRIVATE = 8,   /* an endpoint for each peer: closing it fences that peer alone */
    AT_FAB_LOCAL_MR = 16, /* local memory must be registered too */
    AT_FAB_VIRTUAL = 32,  /* remote memory is named by its address, not by an offset */
    AT_FAB_KEYS = 64,     /* the provider chooses the keys */
    AT_FAB_FD = 128,      /* the completion queue has a descriptor: no thread needs to poll it */
    AT_FAB_DEVICE = 256,  /* memory of a GPU may be registered */
    AT_FAB_SENDERS = 512  /* the queue says whose a write is, and a completion stands for all that were posted before */
};

typedef struct {
    uint32_t flags;       /* at_fab_flags */
    uint32_t version;     /* of the library: major << 16 | minor */
    uint32_t most_posted; /* work requests of the rail */
    uint32_t iov;         /* pieces of memory that one work request takes */
    uint64_t most_bytes;  /* of one work request */
    char provider[64], fabric[64], domain[64];
} at_fab_facts;

/* What one side of a connection tells the other. */
typedef struct {
    uint8_t address[256];
    uint32_t address_bytes;
    uint32_t mark;           /* by which the receiver of this offer marks what it sends here */
    uint64_t signal_target, signal_target_key; /* where signals go: memory of no bytes */
    uint64_t arrived;        /* work requests with immediates that were counted here in the connection before this one */
    uint32_t generation;     /* how often it was opened, this time included */
    uint32_t marks;          /* whether 64 bits travel with a write: both sides must agree */
} at_fab_offer;

/* The reason why a library could not be loaded or a rail not be opened, the last time that this happened in this thread. */
const char *at_fab_why(void);

/* Memory to be registered. cuda: the ordinal of its GPU, or -1. dmabuf_fd: what the driver handed out for the range from dmabuf_start, or -1. */
typedef struct {
    uint64_t address, nbytes;
    int cuda, dmabuf_fd;
    uint64_t dmabuf_start;
} at_fab_memory;
/* The rail's own thread runs on these CPUs from here on, and the threads of the lane as at_lane_pin says. Any thread. */
int at_fab_pin(at_lane *lane, at_fab *fab, const int32_t *cpus, uint32_t count);

/* A peer on this rail, without a connection yet: its id, or AT_E*. Freed by at_peer_free. */
int64_t at_fab_peer(at_lane *lane, at_fab *fab);
/* Open this side of the connection, for the first time or again. Again: what was posted is fenced first, what has arrived is counted.
 * `generation` is the one that is wanted; a side that has it open already answers with the offer it made. AT_EIO: see at_lane_errno. */
int at_fab_offer_make(at_lane *lane, int64_t peer, uint32_t generation, at_fab_offer *out);
/* Take the other side's offer of the same generation: work requests that it has counted are over, the others are posted again. Exactly
 * one of the two sides is `first`: it begins to post, and the other once it has heard of it. */
int at_fab_offer_take(at_lane *lane, int64_t peer, const at_fab_offer *theirs, int first);
/* The generation that is open or being opened; 0: none yet. *up: 1: something of the other side has come by it; -1: both sides have
 * joined, and nothing has come yet; 0: neither. */
uint32_t at_fab_generation(at_lane *lane, int64_t peer, int *up);
/* Give the connection up: fence it, and count what has arrived. Then settle with what the other side has counted; what is left goes to
 * another path (at_reroute). AT_ERAIL: this fabric cannot tell. */
int at_fab_retire(at_lane *lane, int64_t peer, uint64_t *arrived);
int at_fab_settle(at_lane *lane, int64_t peer, uint64_t arrived);

/* Several connections to one peer, by as many rails, taken as one: a peer of the lane without rails yet, and one more connection of it by
 * this rail, which is opened, lends memory and breaks as any other does. Where a fabric cannot tell what was counted, what breaks ends with
 * AT_ERAIL. All are there before the first operation. To end it: at_peer_fail, then at_peer_free for each connection, then for itself. */
int64_t at_fab_multirail_new(at_lane *lane);
int64_t at_fab_multirail_add(at_lane *lane, int64_t multirail, at_fab *fab);
/* What the other side calls one of its connections: its peer's id there. */
int at_fab_multirail_joins(at_lane *lane, int64_t peer, int64_t theirs);
/* Memory that the peer has lent to each of its connections: address and key by peers[i]. A remote region, or AT_E*. */
int64_t at_fab_multirail_import_keys(at_lane *lane, int64_t multirail, uint32_t n, const int64_t *peers, const uint64_t *addresses, const uint64_t *keys,
                             uint64_t nbytes, int access, uint32_t slot, uint64_t epoch);
/* One of them has broken: fence what is open up to this generation, and count what has arrived. Then at_fab_member_reconcile, with what the other
 * side has counted: what is left goes out by the others. AT_EAGAIN: a later connection is open. */
int at_fab_member_failed(at_lane *lane, int64_t peer, uint32_t generation, uint64_t *arrived);
int at_fab_member_reconcile(at_lane *lane, int64_t peer, uint32_t generation, uint64_t arrived);
/* Post nothing by this multirail peer any more: called before its connections are given up one after the other. */
int at_fab_multirail_retire(at_lane *lane, int64_t multirail);

/* Hand out what has arrived by now: before a peer is failed, whose arrivals count still. */
int at_fab_flush(at_lane *lane, int64_t peer);

/* Memory of ours for one peer, under a live grant: what its descriptor stands for. AT_ESTALE: the grant or the region is over.
 * AT_EDEVICE: it is memory of a GPU, which this rail does not take. AT_EFILE: it is a mapping of a file (shared memory is none here), and this rail does not pin pages. */
int at_fab_export_key(at_lane *lane, int64_t peer, int64_t slot, uint64_t epoch, int64_t region, uint64_t offset, uint64_t nbytes, int access,
                uint64_t *address, uint64_t *key);
/* Memory of a peer that has lent it: a remote region, or AT_E*. */
int64_t at_fab_import_key(at_lane *lane, int64_t peer, uint64_t address, uint64_t key, uint64_t nbytes, int access, uint32_t slot,
                      uint64_t epoch);
/* The owner says that a grant of its is over, by another way than this fabric: nothing more is posted under it. */
int at_fab_revoked(at_lane *lane, int64_t peer, uint32_t slot, uint64_t epoch);
/* Tests: the connection breaks as if an error had come. */
int at_fab_break(at_lane *lane, int64_t peer);
/* Tests: nothing of this side gets through any more, and neither side is told: a network that drops everything. */
int at_fab_mute(at_lane *lane, int64_t peer);
