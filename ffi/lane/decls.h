/* The lane: what Python may call. Read by cffi and by our own C, so drift is a compile error.
 *
 * Conventions. A negative result is one of AT_E*; outputs go by pointer. "Lent until return" means that the memory is not
 * touched after the call; "lent until the end" means until the operation's AT_EV_OP event. Calls marked [loop] belong to the
 * thread that created the lane and answer AT_ETHREAD elsewhere; the others may be made from any thread. */

enum at_status {
    AT_OK = 0,
    AT_DUE = 1,            /* done, and the loop has not had a turn for a while: yield soon */
    AT_FIRST_COOKIE = 1 << 20, /* results from here on are cookies of operations that go on; no cookie is ever given twice */
    AT_ESRC = -1,          /* outside the local region */
    AT_EDST = -2,          /* outside the remote region */
    AT_ECLOSED = -3,       /* the local region is closed or unknown */
    AT_ESTALE = -4,        /* the remote region was revoked or is unknown */
    AT_EPEER = -5,         /* the peer is lost or closed */
    AT_EGRANT = -6,       /* the remote region does not grant this access */
    AT_EBUSY = -7,         /* a bound of ours */
    AT_EFORK = -8,         /* called in a forked child */
    AT_ETHREAD = -9,       /* called from another thread */
    AT_ENOMEM = -10,
    AT_ESHUT = -11,        /* the lane is shut */
    AT_ESIZE = -12,        /* page_bytes, strides or offsets make no sense */
    AT_EINDEX_SRC = -13,   /* a page index outside the local region; see at_lane_detail */
    AT_EINDEX_DST = -14,   /* a page index outside the remote region; see at_lane_detail */
    AT_ECANCELED = -15,    /* withdrawn by at_cancel */
    AT_ETIMEOUT = -16,     /* withdrawn by at_cancel for a deadline */
    AT_EIO = -17,          /* the operating system refused; see at_lane_errno */
    AT_EIMM = -18,         /* the immediate is out of range */
    AT_EOVERFLOW = -19,    /* too many early values: this one was not kept */
    AT_EUNKNOWN = -20,     /* no such peer, record or operation */
    AT_ERAIL = -21,        /* the rail broke and was fenced */
    AT_EAGAIN = -22,       /* a provider could not take more now (never leaves the lane) */
    AT_EDEVICE = -24,      /* the local region is memory of a GPU, which this path does not take */
    AT_EMEMORY = -25,      /* the local memory is not there any more: its file was shortened, or it was unmapped */
    AT_EFILE = -26,        /* the memory is a mapping of a file, which this path does not lend */
    AT_EPROTO = -23        /* the peer broke the protocol of the shared memory */
};

enum at_event_kind {
    AT_EV_OP = 1,      /* id: cookie, status: AT_OK or AT_E*, count: bytes landed */
    AT_EV_COUNT = 2,   /* id: immediate record, count: arrivals not yet taken */
    AT_EV_PEER = 3,    /* id: peer, status: why (AT_EPEER: its process is gone, AT_EPROTO) */
    AT_EV_REGION = 4,  /* id: region that was closed and is free now */
    AT_EV_WATCH = 5,   /* id: watch, count: the word's new value */
    AT_EV_GRANT = 7,   /* id: grant that was revoked; a peer has confirmed it */
    AT_EV_UP = 8,      /* id: peer: the first sign that bytes get through to it */
    AT_EV_RAIL = 6     /* id: peer, count: errno: its connection broke and wants to be opened again; 0: now that may be possible */
};

enum at_access { AT_ACCESS_WRITE = 1, AT_ACCESS_READ = 2 };

enum at_bounds { AT_EVENTS = 256, AT_IMM_RESERVED = 0xF0000000 };

typedef struct at_lane at_lane;

/* Filled by at_poll; valid until the next at_poll. */
typedef struct {
    uint64_t id[256];
    uint64_t count[256];
    int32_t status[256];
    int32_t kind[256];
    int32_t stalled; /* at any time: a post was refused, for an unknown time: poll again within a millisecond */
    int32_t more;    /* of at_poll_first: a rail was left as it was when its first events came, poll again before sleeping */
} at_events;

typedef struct {
    uint64_t inline_bytes;   /* larger operations go to the native thread */
    uint64_t turn_ns;        /* inline work per loop turn before AT_DUE */
    uint64_t spin_ns;        /* how long at_imm_take_soon looks before it arms */
    uint64_t max_ops;        /* queued operations per peer before AT_EBUSY */
    uint64_t max_bytes;      /* queued bytes per peer before AT_EBUSY; one operation alone may have more */
    uint32_t early_values;   /* distinct unopened immediates kept per sender */
    uint32_t flags;          /* AT_LANE_* */
} at_lane_config;

enum at_lane_flags {
    AT_LANE_NO_THREAD = 1, /* nothing runs behind the caller's back: tests on virtual time */
    AT_LANE_LOOP = 2,      /* at_poll makes the queued copies, but for those that copiers make; the native thread only answers and watches */
    AT_LANE_THREAD = 4     /* the native thread makes them from their first byte */
};

typedef struct {
    uint64_t ops_inline, ops_queued, ops_ended, bytes_written, units_written;
    uint64_t arrivals, strays, early_values, overflowed;
    uint64_t doorbells_rung, doorbells_heard, polls, pulses_answered;
    uint64_t spins, spins_found; /* looks of at_imm_take_soon, and those that found what they were for */
    uint64_t unknown_completions, thread_chunks, refused_posts;
    uint64_t regions, remote_regions, peers, grants, pending_ops;
} at_lane_stats;

/* Copies config. Returns NULL with errno on failure. */
at_lane *at_lane_new(uint64_t incarnation, const at_lane_config *config);
/* The end, see end.c. Any thread. Refuses new work, withdraws what is under way, shuts peers out, and waits for at most `timeout_ns` until
 * the lane's threads have left: AT_OK; AT_EAGAIN: some have not (call again, or leave them what they use for ever); AT_EFORK. *inside: how
 * many peers may still be inside a write to memory of this process. */
int at_lane_stop(at_lane *lane, uint64_t timeout_ns, int *inside);
/* After at_lane_stop was AT_OK, and while no other thread is in a call: closes and frees what the lane has, but not the lane. */
void at_lane_end(at_lane *lane);
/* Frees the lane, after both of them. Twice: undefined. */
void at_lane_free(at_lane *lane);
/* From here on at_write and friends answer AT_ESHUT, and the operations of other threads end in it. */
void at_lane_shut(at_lane *lane);
/* Readable when at_poll has something to say; -1 where the platform has none. */
int at_lane_fd(at_lane *lane);
at_events *at_lane_events(at_lane *lane);
/* The offending page index or offset of the last AT_EINDEX_*, and the errno of the last AT_EIO. */
int64_t at_lane_detail(at_lane *lane);
int at_lane_errno(at_lane *lane);
void at_lane_stats_get(at_lane *lane, at_lane_stats *out);

/* The native thread and its helper, running already or not, run on these CPUs from here on, and on those of earlier calls. CPUs past
 * 1023 are passed over; what the system refuses leaves the threads where they are. Any thread. */
int at_lane_pin(at_lane *lane, const int32_t *cpus, uint32_t count);

/* [loop] Up to AT_EVENTS events; more may be waiting when it returns AT_EVENTS. Starts a new loop turn. */
int at_poll(at_lane *lane);
/* The same, sooner: what is there first is handed out before a rail has looked for the rest and made its descriptor tell of it. */
int at_poll_first(at_lane *lane);
/* [loop] A new loop turn began. */
void at_turn(at_lane *lane);

/* Local memory. base is lent until the AT_EV_REGION event (or until at_region_close returns 0). */
int64_t at_region_add(at_lane *lane, void *base, uint64_t nbytes);
/* Before it is used: it is memory of this GPU, and base an address there. dmabuf_fd: of the range from dmabuf_start, or -1; lent as base is. */
int at_region_on_device(at_lane *lane, int64_t region, int cuda, int dmabuf_fd, uint64_t dmabuf_start);
/* Before it is used: we have not allocated it, so its pages may not be there, and a process may withhold them: AT_OK or AT_ENOMEM. */
int at_region_lazy(at_lane *lane, int64_t region);
/* Before it is used: look whether it is a mapping of a file, whose pages a process may take away. */
int at_region_look(at_lane *lane, int64_t region);
int at_region_is_file(at_lane *lane, int64_t region); /* what that look has found: 1 or 0; AT_ECLOSED */
int at_region_close(at_lane *lane, int64_t region); /* 0: free now; 1: an AT_EV_REGION event will come */

/* Grants: one epoch word each. *epoch receives the value that makes a descriptor valid. */
int64_t at_grant_new(at_lane *lane, uint64_t *epoch);
/* Makes every descriptor of the grant stale, at once. Returns how many peers are inside a write under it now. */
int at_grant_revoke(at_lane *lane, int64_t slot);
/* The same count, asked again later; 0 is proof that nothing under the grant can land any more. */
int at_grant_active(at_lane *lane, int64_t slot);
/* Break the connections of those peers, where that is possible: afterwards they are not inside any more. The count that is left. */
int at_grant_expel(at_lane *lane, int64_t slot);
int at_grant_free(at_lane *lane, int64_t slot); /* after the count was 0 */
/* Whether (slot, epoch) is a live grant. */
int at_grant_valid(at_lane *lane, int64_t slot, uint64_t epoch);

/* Remote memory of one peer. base: where it is mapped here (NULL: foreign, at address va in the peer). nbytes and access
 * bound every later use. */
int64_t at_remote_add(at_lane *lane, int64_t peer, void *base, uint64_t va, uint64_t nbytes, int access, uint32_t slot,
                      uint64_t epoch);
/* Before it is used: it is a mapping of this segment of `nbytes` bytes; the descriptor is lent as base is. Its owner is given up when pages
 * of it are missing, as making them again would be paid for by us: that is looked at after every 1 MiB that is moved. */
int at_remote_guard(at_lane *lane, int64_t remote, int fd, uint64_t nbytes);
/* Before it is used: it is memory of this process that may be taken away, as at_region_is_file says of its owner's region. */
int at_remote_is_file(at_lane *lane, int64_t remote);
/* For a reader with a mapping of its own: AT_OK when all that was read before this call was the owner's to give, AT_ESTALE
 * when it may be of the memory's next user. */
int at_remote_valid(at_lane *lane, int64_t remote);
/* 0 when freed, 1 when operations still use it (freed with the last one). */
int at_remote_close(at_lane *lane, int64_t remote);

/* [loop] Moving bytes. imm < 0: none. Results: AT_OK or AT_DUE (finished), a cookie >= AT_FIRST_COOKIE (local memory and remote
 * lent until its AT_EV_OP), or AT_E* (nothing was posted). "Local" is the source, but for a read, whose target it is. */
int64_t at_write(at_lane *lane, int64_t remote, uint64_t remote_offset, int64_t region, uint64_t local_offset, uint64_t nbytes,
                 int64_t imm);
int64_t at_read(at_lane *lane, int64_t remote, uint64_t remote_offset, int64_t region, uint64_t local_offset, uint64_t nbytes);
/* Index tables are lent until return (copied when the operation goes on). */
int64_t at_write_pages(at_lane *lane, int64_t remote, int64_t region, const int64_t *local_pages, const int64_t *remote_pages,
                       uint64_t n, uint64_t page_bytes, uint64_t local_stride, uint64_t remote_stride, uint64_t local_offset,
                       uint64_t remote_offset, int64_t imm);
/* The other way: the remote stride may be 0, the local one may not. */
int64_t at_read_pages(at_lane *lane, int64_t remote, int64_t region, const int64_t *local_pages, const int64_t *remote_pages,
                      uint64_t n, uint64_t page_bytes, uint64_t local_stride, uint64_t remote_stride, uint64_t local_offset,
                      uint64_t remote_offset);
int64_t at_signal(at_lane *lane, int64_t peer, int64_t imm);

/* Plans: checked when made (NULL: *status says why, and at_lane_detail which target of a scatter), then posted any number of
 * times. Arrays are lent until return. A plan is memory of its own, to be freed in any state of the lane, once. */
typedef struct at_plan at_plan;
/* Of a scatter of pages: which part of the tables goes to one target, and how. All are at least 0. */
typedef struct {
    int64_t begin, count;
    int64_t local_stride, remote_stride, local_offset, remote_offset;
} at_page_target;
at_plan *at_plan_copy(at_lane *lane, int read, int64_t remote, uint64_t remote_offset, int64_t region, uint64_t local_offset,
                      uint64_t nbytes, int *status);
at_plan *at_plan_pages(at_lane *lane, int64_t remote, int64_t region, const int64_t *local_pages, const int64_t *remote_pages,
                       uint64_t n, uint64_t page_bytes, uint64_t local_stride, uint64_t remote_stride, uint64_t local_offset,
                       uint64_t remote_offset, int *status);
at_plan *at_plan_scatter(at_lane *lane, int64_t region, uint64_t n, const int64_t *remotes, const uint64_t *local_offsets,
                         const uint64_t *remote_offsets, const uint64_t *nbytes, int *status);
/* Any number of targets; they are as of at_scatter_pages. */
at_plan *at_plan_scatter_pages(at_lane *lane, int64_t region, uint64_t offset, uint64_t nbytes, uint64_t n, const int64_t *remotes,
                               const uint64_t *bases, const uint64_t *limits, const at_page_target *targets, const int64_t *local_pages,
                               const int64_t *remote_pages, uint64_t rows, uint64_t page_bytes, int *status);
/* Writes from several regions to places that each post names anew. Row: `nbytes` bytes from local_offset in the limits[source] bytes at
 * bases[source] of regions[source], to remote_offset of a place. */
typedef struct {
    int64_t source, local_offset, nbytes, place, remote_offset;
} at_place_row;
at_plan *at_plan_places(at_lane *lane, uint64_t sources, const int64_t *regions, const uint64_t *bases, const uint64_t *limits, uint64_t n,
                        const at_place_row *rows, uint64_t places, int *status);
at_plan *at_plan_signals(at_lane *lane, uint64_t n, const int64_t *peers, const uint32_t *imms, int *status);
void at_plan_free(at_plan *plan);
/* [loop] Results as of at_write; AT_EUNKNOWN for NULL. Those of a scatter: AT_OK or AT_DUE when every target has landed, AT_E* when one was refused and
 * nothing was posted, else a cookie; its event's status is the first that was not AT_OK, and each target's waits for at_batch_take. */
int64_t at_plan_post(at_lane *lane, const at_plan *plan, int64_t imm);
/* [loop] The same for a plan of at_plan_places: place k is the limits[k] bytes at bases[k] of remotes[k]. When one was refused, at_lane_detail
 * is its row, or -1 - k for place k. */
int64_t at_plan_post_places(at_lane *lane, const at_plan *plan, uint64_t places, const int64_t *remotes, const uint64_t *bases,
                            const uint64_t *limits, int64_t imm);
/* [loop] A scatter without a plan, of at most 1024 targets (more: AT_ESIZE): sizes[i] bytes from local_offsets[i] in the `nbytes` bytes
 * at `offset` of the region, to remote_offsets[i] in the limits[i] bytes at bases[i] of the remote region (NULL: to all of them).
 * Arrays are lent until return. Results as of at_plan_post, but AT_ENOMEM and AT_EBUSY may come after targets before
 * at_lane_detail have landed. *total: bytes of all targets, when none was refused. */
int64_t at_scatter(at_lane *lane, int64_t region, uint64_t offset, uint64_t nbytes, uint64_t n, const int64_t *remotes,
                   const uint64_t *bases, const uint64_t *limits, const int64_t *local_offsets, const int64_t *sizes,
                   const int64_t *remote_offsets, int64_t imm, uint64_t *total);
/* [loop] The same for pages: target i gets targets[i].count of them, those from targets[i].begin on in tables of `rows` pages. Offsets are in the
 * part of the region, and in that of the remote region. Strides, tables and immediates are as for at_write_pages, results and targets as for
 * at_scatter. */
int64_t at_scatter_pages(at_lane *lane, int64_t region, uint64_t offset, uint64_t nbytes, uint64_t n, const int64_t *remotes,
                         const uint64_t *bases, const uint64_t *limits, const at_page_target *targets, const int64_t *local_pages,
                         const int64_t *remote_pages, uint64_t rows, uint64_t page_bytes, int64_t imm, uint64_t *total);
int at_batch_take(at_lane *lane, int64_t cookie, int32_t *results, uint64_t n); /* once, after the event */

/* The same from any thread, for plans that are no scatters: AT_OK, AT_E*, or a cookie for at_thread_wait; no event comes. */
int64_t at_thread_post(at_lane *lane, const at_plan *plan, int64_t imm);
/* Wait at most ns: AT_OK or AT_E* when it has ended, 1 when it goes on. AT_EUNKNOWN after at_thread_drop. */
int at_thread_wait(at_lane *lane, int64_t cookie, uint64_t ns);
int at_thread_drop(at_lane *lane, int64_t cookie); /* forget it: AT_OK; 1: not yet, it goes on */

/* [loop] Watched words: 8 aligned bytes that other code changes, lent until at_watch_close. *value: what it is now.
 * AT_EMEMORY, also of the event, when the page is gone: its file was shortened. */
int64_t at_watch_add(at_lane *lane, const void *word, uint64_t *value);
/* 1: it has changed since it was told last, to *value. 0: it has not; an AT_EV_WATCH comes when it has. */
int at_watch_next(at_lane *lane, int64_t watch, uint64_t *value);
int at_watch_close(at_lane *lane, int64_t watch);

/* Withdraws what is unposted; the AT_EV_OP (with this status, unless it completed) comes when the source is free.
 * Returns the units still posted, or AT_EUNKNOWN when the operation has ended. */
int64_t at_cancel(at_lane *lane, int64_t cookie, int status);
/* Break the connections that still carry the operation and re-open them: nothing of it can touch memory afterwards. */
int at_fence(at_lane *lane, int64_t cookie);
/* Bytes of a running operation that have landed; AT_EUNKNOWN when it has ended. */
int64_t at_progress(at_lane *lane, int64_t cookie);

/* Immediates. A record is the open counter of one value. */
int64_t at_imm_open(at_lane *lane, uint32_t imm);   /* record, or AT_EOVERFLOW; an open value gives the same record */
int at_imm_known(at_lane *lane, uint32_t imm);      /* was ever opened, closed or arrived */
/* 1: n arrivals are taken; 2: the same, and the loop has not had a turn for a while; 0: not so many. With `arm` an AT_EV_COUNT
 * will then come once, with n arrivals taken for the waiter; a later call replaces the wish. */
int at_imm_take(at_lane *lane, int64_t record, uint64_t n, int arm);
/* The same with `arm`, by the loop: where counts usually come at once, it looks for them for a while before it arms. */
int at_imm_take_soon(at_lane *lane, int64_t record, uint64_t n);
/* wanted[i] arrivals of each of n records, where they are there and no wish is armed; taken[i]: whether they were. 1: some; 2: the same,
 * and the loop has not had a turn for a while; 0: none. */
int at_imm_take_each(at_lane *lane, uint32_t n, const int64_t *records, const uint64_t *wanted, int32_t *taken);
int at_imm_give(at_lane *lane, int64_t record, uint64_t n); /* taken, but no waiter had them */
int at_imm_disarm(at_lane *lane, int64_t record);           /* no task waits; an event may already be under way */
int at_imm_value(at_lane *lane, int64_t record, uint64_t *total, uint64_t *taken);
int at_imm_close(at_lane *lane, int64_t record);

/* How many operations use a remote region; AT_ESTALE when it is not known. */
int64_t at_remote_uses(at_lane *lane, int64_t remote);
/* Everything that waits for the peer `from` goes to `to`, another path to the same engine, from its beginning but for what was counted
 * already. Nothing of `from` may be posted (its provider has fenced and settled it). olds[i] on the one is news[i] on the other. How many
 * went; those that could not end with AT_ERAIL. */
int64_t at_reroute(at_lane *lane, int64_t from, int64_t to, uint64_t n, const int64_t *olds, const int64_t *news);

/* Sharing out, where a peer has several rails; see share.c. A write of more than AT_STRIPE_LEAST bytes is striped. */
enum at_share { AT_STRIPE_LEAST = 131072, AT_STRIPE_STEP = 65536, AT_STRIPE_MOST = 1048576, AT_STRIPES_EACH = 4 };
/* The rail of n that the next run goes to: open[i] and the least load[i]; of equals the first from `turn` on. -1: none is open. */
int32_t at_share_pick(const uint64_t *load, const int32_t *open, uint32_t n, uint32_t turn);
/* Bytes of one piece of a write of so many, over so many rails, of which the smallest takes `most` at once. */
uint64_t at_share_piece(uint64_t nbytes, uint32_t rails, uint64_t most);

/* Peers (made by a provider). */
int at_peer_fail(at_lane *lane, int64_t peer, int status); /* its operations end with status, later ones are refused */
int at_peer_free(at_lane *lane, int64_t peer);             /* fails it; memory goes when the last operation has */
/* Ask for a sign of life; answers come natively. */
int at_peer_ping(at_lane *lane, int64_t peer);
/* Last ping sent, last answered by its native thread, last seen by its loop. */
int at_peer_pong(at_lane *lane, int64_t peer, uint64_t *sent, uint64_t *native, uint64_t *loop);
int64_t at_peer_queued(at_lane *lane, int64_t peer);

/* Tests: what is unused of each table (and some more of it) is as if it had been used `generation` times, or as often as its ids allow
 * but for one, where that is less; the values of the epoch words too. AT_OK, or AT_ENOMEM. */
int at_lane_age(at_lane *lane, uint64_t generation);
/* Tests: the most entries of the immediate table that one call has moved. */
uint64_t at_imm_moved(at_lane *lane);

const char *at_version(void);
const char *at_strerror(int status);
