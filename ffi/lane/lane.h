/* The lane: the hot loop that all providers share.
 *
 * One lane belongs to one engine. It owns local regions, grants (epoch words), remote regions, peers, operations in
 * flight, the immediate table and the queue of events; a provider owns none of these: it moves bytes when told.
 *
 * Two kinds of provider live behind struct at_port:
 *   - synchronous (window == 0): move() copies bytes itself. Small operations run inside the submitting call; large ones
 *     are queued and the native thread moves them chunk by chunk.
 *   - asynchronous (window > 0): post() hands single work requests to a queue; completions come back later through
 *     at_op_complete(). The lane keeps at most `window` work requests per peer posted and refills on each completion.
 *
 * Locking. lane->lock guards everything in here. move() runs without it, also inside the submitting call (the operation, or what it
 * uses, is marked and not freed meanwhile); every other port function runs with it unless its line says otherwise. A port that reaches into another
 * lane (the simulator) must drop this lock first: never two lane locks at once.
 *
 * Life of an operation: waiting -> (running | posted) -> ended; it ends exactly once, after its last work request has
 * retired, and only then does its event appear: an await that ends means that the source is free. */
#ifndef AT_LANE_H
#define AT_LANE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "lane/tables.h"
#include "native.h"

#define AT_CHUNK ((uint64_t)256 << 10) /* bytes moved between two looks at epoch, cancellation and peer */
#define AT_RECENT 8u                   /* destinations remembered to tell fresh memory from what is written again and again */
#define AT_GRANTS 65536u               /* epoch words per lane */
#define AT_DETACHED 1
#define AT_PEER_BITS 20 /* of a peer's id, for its place; the other 43 are its number among all of the lane */
#define AT_MOST_CPUS 1024

typedef struct at_peer at_peer;
typedef struct at_op at_op;
typedef struct at_copiers at_copiers;

/* A set of CPUs. Empty: any. */
typedef struct {
    uint64_t bits[AT_MOST_CPUS / 64];
} at_cpus;

/* What an asynchronous provider shares between all its peers of a lane: a place in a simulated network, the domain of a NIC. */
typedef struct at_rail at_rail;
enum at_turn { /* who lets a rail make progress */
    AT_TURN_POST,  /* a submitting call, also of another thread */
    AT_TURN_LOOP,  /* at_poll */
    AT_TURN_FIRST, /* at_poll_first: the rail may leave off once there are events, when it sets lane->more */
};
struct at_rail {
    at_rail *next; /* set once, before it is linked: the list may be walked without the lock from a head read with it */
    at_lane *lane;
    const char *name;
    void (*progress)(at_rail *rail, int turn); /* AT_TURN_*: retire what has completed, deliver what has arrived. NO LOCK (takes what it needs) */
    int (*stop)(at_rail *rail, uint64_t until); /* nothing of it moves bytes any more or begins to: 1; 0: not yet. NO LOCK. NULL: nothing does by itself */
    void (*leave)(at_rail *rail);   /* from here on it does not reach the lane any more. NO LOCK, once */
    void (*destroy)(at_rail *rail); /* after its last peer; NULL: it goes by itself */
    void (*drain)(at_rail *rail);   /* hand out all that has arrived. NO LOCK. NULL: nothing lies about */
    void (*grant_over)(at_rail *rail, uint32_t slot);    /* the grant is over and proved to be; NULL: of no interest */
    void (*region_over)(at_rail *rail, uint32_t region); /* nothing uses the local region any more; NULL: of no interest */
};

/* First page(s) of every engine: read by its peers, written by the engine alone. On Linux a memfd that others can only map
 * read-only; elsewhere plain memory. */
typedef struct {
    uint64_t magic;
    uint64_t incarnation;
    uint8_t cookie[16];
    _Alignas(64) _Atomic uint32_t armed;    /* somebody waits for a count: ring the doorbell */
    _Alignas(64) _Atomic uint64_t epoch[AT_GRANTS];
} at_control;

/* Keeps a control segment alive for those of this process that look at its epoch words (the simulator). */
typedef struct {
    at_control *memory;
    int fd; /* memfd, or -1 */
    _Atomic uint32_t users;
} at_control_ref;

typedef struct {
    uint8_t *base;
    uint64_t nbytes;
    uint32_t generation; /* odd: in use */
    uint32_t users;      /* operations that read or write it */
    int open;
    int slow;            /* a page of it can hold up the thread that touches it: see copiers.c */
    int cuda;            /* the ordinal of the GPU that it is on, or -1: only rails that say `device` may be given it */
    int dmabuf_fd;       /* what the driver handed out for the range from dmabuf_start, or -1 */
    uint64_t dmabuf_start;
} at_region;

typedef struct {
    uint64_t va, key;
} at_remote_part;

typedef struct {
    at_peer *peer;
    uint8_t *base;                   /* mapping, or NULL for foreign memory */
    uint64_t va;                     /* address in the peer, or what its provider names it by */
    uint64_t key;                    /* for providers that need one */
    at_remote_part *parts;           /* by each connection of a peer that has several, owned; NULL: va and key are all */
    uint64_t nbytes;
    const _Atomic uint64_t *word;    /* the grant's epoch word in the peer's control segment */
    uint64_t epoch;                  /* the value that makes it valid */
    uint32_t slot;
    uint32_t generation;             /* odd: in use */
    uint32_t users;
    int access;
    int open;
    int foreign;                     /* a page of it can hold up the thread that touches it: see copiers.c */
} at_remote;

enum at_op_kind { AT_OP_WRITE, AT_OP_PAGES, AT_OP_SIGNAL, AT_OP_READ, AT_OP_BATCH };

/* What shall be done, in ids and offsets: from the arguments of a call, or kept in a plan. Resolving it makes an at_op. */
typedef struct {
    int kind;
    int64_t remote, region; /* a signal: the peer in `remote` */
    uint64_t local_offset, remote_offset;
    uint64_t nbytes, units; /* of the write or read, or of one page */
    uint64_t local_stride, remote_stride;
    const int64_t *local_pages, *remote_pages;
    int64_t imm; /* -1: the one given when it is posted */
} at_order;

/* Several operations that end as one: the targets of a scatter. */
typedef struct {
    uint32_t count, open; /* open: children that have not ended, and 1 while they are still being posted */
    int over;             /* its event is queued; the results wait for at_batch_take */
    uint64_t landed_bytes;
    int32_t *results;     /* of each child */
    int64_t *children;    /* cookies; 0: never went on */
} at_batch;

struct at_op {
    at_op *next;
    at_peer *peer;
    at_remote *remote;      /* NULL for a signal */
    at_region *region;      /* NULL for a signal */
    uint32_t remote_index, region_index;
    int64_t cookie;
    int64_t imm;            /* -1: none */
    uint8_t *local;         /* region base + offset: read from, but for AT_OP_READ, which writes here */
    uint64_t remote_offset; /* in the remote region */
    uint64_t nbytes;        /* of the write, or of one page */
    uint64_t local_stride, remote_stride;
    const int64_t *local_pages, *remote_pages; /* the submitting call's or a plan's, or its own (table != NULL); never the caller's */
    int64_t *table;
    uint64_t footprint;     /* bytes written lately to different places, this operation included: too many for a cache? */
    uint64_t units;         /* 1, or the number of pages */
    uint64_t piece;         /* asynchronous: bytes of one step, where the port cuts units into several */
    uint64_t extent;        /* what it is moved in. Synchronous: pages, or bytes (1 where there are none); else the port's steps */
    uint64_t cursor;        /* first of `extent` that is not posted, or that nobody has claimed */
    uint64_t moved;         /* how many of `extent` have landed: in any order */
    uint64_t bytes;         /* asynchronous: bytes that have landed */
    uint64_t landed;        /* units that have landed */
    uint64_t counted;       /* units whose immediate was counted at the target */
    uint64_t precounted;    /* so many of them before it came to this path: its first units, then, carry none */
    uint32_t posted;        /* work requests at the provider */
    int kind;
    int status;
    int oserror;            /* of a move inside the submitting call */
    int running;            /* how many threads move parts of it now, without the lock */
    int risk;               /* AT_RISK_*: which queue it is for */
    int queued;             /* linked in peer->lines[risk] */
    uint64_t tail;          /* asynchronous: so many of its last steps wait until all others have landed */
    int soon;               /* counted in lane->soon */
    int detached;           /* AT_DETACHED: another thread's, ends as a record for at_thread_wait, without an event */
    int over;               /* such a record: nothing is left but its status */
    at_batch *batch;        /* AT_OP_BATCH: its own; a child: NULL */
    int64_t parent;         /* cookie of the batch it belongs to, or 0 */
    uint32_t child;         /* which result of that is its own */
    _Atomic int withdrawn;
};

/* Who moves bytes, each with an active word of its own: the loop's thread, another submitting thread, the native thread, the one that
 * helps it, and a copier (copiers.c) for each risk. */
enum { AT_MOVER_CALLER, AT_MOVER_OTHER, AT_MOVER_THREAD, AT_MOVER_HELPER, AT_MOVER_FOREIGN, AT_MOVER_SLOW, AT_MOVERS };

/* What may hold up a thread that moves an operation, for any time: a page of a peer's own memory, or one of ours that is not plain memory. */
enum { AT_RISK_NONE, AT_RISK_FOREIGN, AT_RISK_SLOW, AT_RISKS };

typedef struct {
    at_op *head, *tail;
} at_line;

/* The port: what a provider must do. */
typedef struct at_port {
    const char *name;
    uint32_t window; /* most work requests posted per peer; 0: synchronous */
    int foreign;     /* synchronous: remote memory without a mapping is touched in the peer's own address space */

    /* Synchronous. Move [first, first + n) of op->extent, re-reading the epoch around every chunk; *moved says how many were,
     * fewer than n only with an error or once `withdrawn` is set. AT_ESTALE, AT_EIO (errno in *oserror), AT_EPEER: the operation
     * fails. NO LOCK, and several threads at once: each has a `mover` of its own (AT_MOVER_*). */
    int (*move)(at_peer *peer, const at_op *op, uint64_t first, uint64_t n, int mover, uint64_t *moved, int *oserror);
    /* Synchronous. Publish n arrivals of imm, of bytes written to `remote` (NULL: a signal). AT_EAGAIN: try again later. AT_ESTALE,
     * AT_EPEER: no longer allowed, nothing was published. */
    int (*count)(at_peer *peer, const at_remote *remote, uint32_t imm, uint64_t n);

    /* Asynchronous. Cut a kept operation into steps: sets extent and tail. Steps of pages are pages. NULL: one for each unit. */
    void (*cut)(at_peer *peer, at_op *op);
    /* Asynchronous. Post one work request, from step op->cursor on; how many steps it covers. 0: a completion will come
     * first. AT_EAGAIN: refused, nobody knows for how long. */
    int64_t (*post)(at_peer *peer, at_op *op);
    void (*flush)(at_peer *peer);                    /* what post has only gathered goes out. NULL: it does not gather */

    void (*drain)(at_peer *peer);                    /* hand arrivals to at_imm_arrive */
    void (*rung)(at_peer *peer);                     /* its doorbell was heard, before the drain. NULL: it has none */
    int (*active)(at_peer *peer, uint32_t slot);     /* may something of that peer still land under this grant of ours? */
    void (*revoke)(at_peer *peer, uint32_t slot);    /* the grant was revoked: tell it. NULL: it sees the epoch word itself */
    void (*expel)(at_peer *peer);                    /* nothing that it has posted can land any more, at any price. NULL: no way */
    void (*bar)(at_peer *peer);                      /* it was given up: nothing of it begins any more. NULL: needless */
    int (*inside)(at_peer *peer);                    /* afterwards: is it still inside something it began? NULL: never */
    void (*fence)(at_peer *peer);                    /* break: afterwards nothing posted touches memory; retire it all */
    void (*forget)(at_peer *peer);                   /* its operations have gone to another path. NULL: it remembers none */
    void (*probe)(at_peer *peer);                    /* synchronous: find out how foreign memory is reached. NO LOCK, a copier's */
    void (*ping)(at_peer *peer, uint64_t seq);
    void (*pong)(at_peer *peer, uint64_t *native, uint64_t *loop);
    void (*answer)(at_peer *peer, int from_loop);    /* answer its pings */
    void (*destroy)(at_peer *peer);                  /* free peer->impl; nothing uses it any more */
} at_port;

struct at_peer {
    at_lane *lane;
    const at_port *port;
    void *impl;
    int64_t id;
    uint32_t index;
    int status;                 /* AT_OK, or why it takes nothing more */
    int freed, lingers;         /* lingers: freed while it was inside a write; kept until it has left or died */
    int dead;                   /* its process is gone: nothing of it can land any more */
    int broke;                  /* it broke the protocol, or was freed: nothing of it is counted any more */
    uint32_t users;             /* operations and remote regions */
    uint32_t posted;            /* work requests at the provider */
    int stalled;                /* the provider refused a post: counted in lane->stalled */
    int device;                 /* its rail takes memory of a GPU */
    int paused;                 /* its connection is being opened again: nothing is posted until then */
    uint64_t queued_ops, queued_bytes;
    at_line lines[AT_RISKS];    /* waiting operations, oldest first; those with a risk are for copiers */
    int64_t process;            /* whose memory is foreign: engines of one process share its copier. 0: unknown */
    int probe;                  /* AT_PROBE_* */
    uint32_t early;             /* distinct unopened values from this sender */
    uint32_t overflowed;        /* and those past that bound */
    uint64_t ping;
    const at_control *control;  /* the peer's control segment, as mapped here */
};

enum { AT_PROBE_NONE, AT_PROBE_WANTED, AT_PROBE_RUNS };

typedef struct {
    uint32_t imm;
    uint32_t generation;
    int state;          /* AT_IMM_* */
    uint64_t total, taken, want; /* want 0: nobody waits */
    int64_t sender;     /* the peer that brought it first, for the bound */
    int armed;          /* counted in lane->armed */
} at_imm_record;

enum { AT_IMM_FREE, AT_IMM_OPEN, AT_IMM_EARLY, AT_IMM_OVERFLOWN, AT_IMM_SPENT /* its generations are used up */ };

typedef struct {
    uint32_t imm;
    int32_t value; /* record index, or AT_IMM_RETIRED / AT_IMM_LOST */
} at_imm_entry;

enum { AT_IMM_EMPTY = -1, AT_IMM_RETIRED = -2, AT_IMM_LOST = -3 };

typedef struct {
    uint64_t id, count;
    int32_t status, kind;
} at_event;

typedef struct {
    const _Atomic uint64_t *word; /* NULL: free */
    uint64_t told;                /* the value that was handed out last */
    uint32_t generation;
    int armed;
} at_watch;

struct at_lane {
    pthread_mutex_t lock;
    pthread_t owner;
    uint32_t fork_generation;
    _Atomic int shut; /* written with the lock; at_check_process looks at it without */
    at_lane_config config;
    uint64_t incarnation;

    at_control *control;
    at_control_ref *control_ref;
    at_rail *rails;
    uint32_t *grant_free;
    uint32_t grant_free_count, grant_top;

    at_region **regions;
    uint32_t region_count, region_capacity, region_hint;
    at_remote **remotes;
    uint32_t remote_count, remote_capacity, remote_hint;
    at_peer **peers;
    uint32_t peer_count, peer_capacity;
    uint64_t peer_serial;
    at_op **ops;
    uint64_t *op_generation;
    uint32_t op_count, op_capacity;
    at_op *op_spare; /* memory of operations that have ended, for the next ones: allocating it costs as much as all else of a short one */
    uint32_t op_spare_count;
    at_tables tables; /* of the call before, for the next one */
    at_op *kept; /* of the scatter that is being posted, see plan.c */
    uint32_t kept_capacity;
    uint32_t *op_free;
    uint32_t op_free_count;

    at_imm_record *imm;
    uint32_t imm_count, imm_capacity, imm_free;
    at_imm_entry *imm_table;
    uint32_t imm_used, imm_mask;
    _Atomic uint32_t neighbours; /* peers in other processes whose counts come without a system call of ours */
    uint32_t spin_skip, spin_pause; /* the loop's: waits until the next look, and how many there were before the last */
    int cores;
    uint64_t imm_orphans; /* unopened values of peers that have gone */
    uint32_t armed;
    int imm_blind;

    at_event *queue;
    uint32_t queue_head, queue_count, queue_capacity;
    int signalled;
    at_events out;

    int epoll_fd, wake_fd; /* the loop's side */

    pthread_t thread, helper;
    int thread_started, thread_stop, helper_started;
    uint32_t threads; /* of these, that have not left */
    int over; /* at_lane_end was here */
    at_cpus cpus; /* of both */
    pthread_cond_t help; /* the native thread has found more than it should move alone */
    int thread_epoll_fd, thread_wake_fd, pulse_fd;
    uint32_t thread_turn;
    int thread_work;
    int moving_here;  /* the loop's thread moves an operation now without the lock: its active word is taken */
    uint32_t here_waited; /* threads that wait until it has */
    int moving_other; /* the same of another submitting thread */
    uint32_t risky;   /* queued operations for copiers, and probes */
    at_copiers *copiers; /* NULL until there is something that may hold up a thread */
    uint32_t soon;                   /* large operations whose last parts are being moved */
    uint32_t lingering;              /* peers kept for that */
    _Atomic uint32_t stalled;        /* peers whose next post was refused and must be tried again; at_stalled has no lock */
    pthread_cond_t ended; /* a detached operation has ended, or a thread */
    uint32_t waiters;     /* threads in at_thread_wait */

    at_watch *watches;
    uint32_t watch_count, watch_capacity;
    uint64_t watch_pause; /* ns between two looks */
    int pulse_heard; /* a ping was answered natively: the loop shall answer too */
    int again;       /* a rail was not through: the loop shall poll once more */
    int more;        /* a rail has left off: the loop polls once more by itself */
    uint64_t pulse_answered; /* when the native thread did so last */

    uint64_t written;
    struct {
        uint64_t where, nbytes, stamp; /* stamp: what had been written when it ended */
    } recent[AT_RECENT]; /* the last larger destinations, each once */
    uint32_t recent_next;
    uint64_t recent_bytes;

    uint64_t turn_start, turn_bytes;
    uint32_t turn_ops;
    int turn_due;

    int64_t detail;
    int oserror;
    at_lane_stats stats;
};

/* lane.c */
void at_control_release(at_control_ref *ref);
void at_lock(at_lane *lane);
void at_unlock(at_lane *lane);
uint64_t at_now(void); /* CLOCK_MONOTONIC, ns */
int at_is_forked(const at_lane *lane);     /* it is of a parent of this process */
void at_lane_destroy(at_lane *lane);       /* frees what at_lane_end has left, and the lane */
int at_check_owner(const at_lane *lane);   /* this process, this thread, not shut */
int at_check_process(const at_lane *lane); /* this process, not shut */
/* With the lock: a new peer; takes no ownership of impl until it succeeds. */
at_peer *at_peer_add(at_lane *lane, const at_port *port, void *impl, const at_control *control);
at_peer *at_peer_find(at_lane *lane, int64_t id); /* NULL when unknown or freed */
void at_rail_add(at_lane *lane, at_rail *rail);   /* with the lock; gone with the lane */
void at_rails_progress(at_rail *first, int turn); /* without the lock; AT_TURN_* */
void at_peer_release(at_peer *peer);              /* drop one use; destroys a freed peer with the last */
void at_peer_end(at_peer *peer, int status);      /* with the lock: what at_peer_fail does */
void at_peer_broke(at_peer *peer);                /* with the lock: it broke the protocol, the loop is told once */
void at_peers_reap(at_lane *lane);                /* with the lock: let go of lingering peers that have left */

/* Room for one more pointer; existing ones never move, so that ids and pointers stay good. */
int at_grow(void ***items, uint32_t *capacity, uint32_t count);
int64_t at_make_id(uint32_t generation, uint32_t index);

/* A slot whose generations are used up stays out of use: ids come never again. An odd one is in use, and this is what ends it. */
#define AT_MOST_LIVES 0x7fffffffu
static inline uint32_t at_life_over(uint32_t generation) { return generation < AT_MOST_LIVES ? generation + 1 : AT_MOST_LIVES + 2; }

/* memory.c, with the lock */
at_region *at_region_use(at_lane *lane, int64_t id); /* NULL when closed or unknown */
void at_region_release(at_lane *lane, uint32_t index);
at_remote *at_remote_use(at_lane *lane, int64_t id);
void at_remote_release(at_lane *lane, uint32_t index);

/* What an operation uses outlives it. */
static inline void at_op_hold(at_op *op) {
    if (op->region != NULL) op->region->users++;
    if (op->remote != NULL) op->remote->users++;
    op->peer->users++;
}

/* No more: it may be gone afterwards. */
static inline void at_op_let_go(at_lane *lane, at_op *op) {
    if (op->region != NULL && (op->region->users > 1 || op->region->open)) op->region->users--;
    else if (op->region != NULL) at_region_release(lane, op->region_index);
    if (op->remote != NULL && (op->remote->users > 1 || op->remote->open)) op->remote->users--;
    else if (op->remote != NULL) at_remote_release(lane, op->remote_index);
    if (op->peer->users > 1) op->peer->users--;
    else at_peer_release(op->peer);
}

/* ops.c, with the lock */
at_op *at_op_find(at_lane *lane, int64_t cookie);
/* Copy a finished description into an operation of its own and queue it: its cookie, or AT_E*. */
int64_t at_op_keep(at_lane *lane, const at_op *template);
int64_t at_op_new_batch(at_lane *lane, uint32_t count); /* its cookie, or AT_E* */
void at_batch_ended(at_lane *lane, int64_t parent, uint32_t child, int status, uint64_t bytes); /* also: posting is over */
/* Stop an operation: nothing more of it is posted; it ends now or when the rest has retired. */
void at_op_stop(at_op *op, int status);
void at_op_enqueue(at_op *op);                               /* behind the others of its peer */
void at_op_dequeue(at_op *op);
void at_ops_close(at_lane *lane);
void at_op_end(at_op *op);                                   /* everything is retired: tell whoever asked */
void at_stall(at_peer *peer, int stalled);
/* One posted work request retired: what of it has landed. */
void at_op_complete(at_op *op, uint64_t steps, uint64_t bytes, uint64_t counted, int status);
void at_op_unpost(at_op *op); /* one posted work request is in no queue any more, and whether it has landed is to be found out */
void at_refill(at_peer *peer);                               /* post what the window allows */
/* move.c, with the lock */
/* One round over the peers' queues, for at most `budget` bytes each. */
void at_move_queued(at_lane *lane, uint64_t budget, int mover);
/* Move [cursor, cursor + n) of it as `mover`, without the lock meanwhile. Returns AT_OK or why the operation fails. */
int at_op_move(at_op *op, uint64_t n, int mover, int *oserror);
void at_op_moved(at_op *op, uint64_t n); /* n of its extent were moved */
int at_op_publish(at_op *op);                                /* the immediates of what has landed */
/* Parts of one operation, for at most `budget` bytes; *since: when the part began that is being moved (NULL: nobody asks). */
void at_move_one(at_lane *lane, at_peer *peer, at_op *op, uint64_t budget, int mover, uint64_t *since);
int at_queued_work(const at_lane *lane, int refused);        /* is anything left for at_move_queued, also counts refused just now? */
int at_queued_for_two(const at_lane *lane);                  /* so much that two threads are faster? */
void at_head_start(at_lane *lane, at_op *op);                /* move some of it while the native thread wakes up */
void at_count_turn(at_lane *lane, uint64_t nbytes);          /* inline work was done: is a loop turn due? */

/* submit.c, with the lock */
int at_resolve(at_lane *lane, const at_order *order, int64_t imm, at_op *op); /* everything that may have changed since it was checked */
/* Bounds, and the page tables, which are copied to `tables` while they are checked; NULL: they cannot change. */
int at_check(at_lane *lane, const at_order *order, at_op *op, const at_tables *tables);
/* Only decides: AT_HERE: at_move_here may move it; AT_OK: there is nothing to move; AT_EAGAIN: it has to be queued; else it fails. */
enum { AT_HERE = 2 };
int at_submit_here(at_lane *lane, at_op *op);
/* With the lock, which it may drop: another thread than the loop's is about to close something. Not while that one moves bytes. */
void at_wait_here(at_lane *lane);
/* Move ops[0..n), of the loop's thread, inside the submitting call, without the lock meanwhile. Each one's status: AT_OK; AT_EAGAIN when it has to be queued (it may have landed); else it failed. */
void at_move_here(at_lane *lane, at_op *ops, uint32_t n);
int64_t at_submit(at_lane *lane, at_op *op); /* a resolved one: as at_write answers */
/* What was queued for synchronous ports finds somebody to move it; cookie: an operation that the caller may begin itself, or 0. */
void at_wake_mover(at_lane *lane, int64_t cookie);

int64_t at_unlock_and_progress(at_lane *lane, int64_t result); /* the end of a submitting call */
int at_pages_make_sense(uint64_t n, uint64_t page_bytes, uint64_t local_stride, uint64_t remote_stride);

/* watch.c, with the lock */
uint64_t at_watch_look(at_lane *lane); /* tell of changes; ns until the next look, 0: nobody watches */

/* For tests, with the lock: what is unused, and AT_AGED more of each kind, is as if it had been used so often. */
#define AT_AGED 64u
int at_ops_age(at_lane *lane, uint64_t generation);
int at_regions_age(at_lane *lane, uint32_t generation);
int at_remotes_age(at_lane *lane, uint32_t generation);
int at_watches_age(at_lane *lane, uint32_t generation);
int at_imm_age(at_lane *lane, uint32_t generation);

/* imm.c, with the lock */
int at_imm_init(at_lane *lane); /* AT_OK or AT_ENOMEM */
void at_imm_arrive(at_peer *peer, uint32_t imm, uint64_t n);
void at_imm_departed(at_peer *peer); /* it was freed: its unopened values fall under the bound of all who have gone */
void at_imm_destroy(at_lane *lane);

/* events.c */
int at_events_open(at_lane *lane);
void at_events_close(at_lane *lane);
/* with the lock */
int at_events_reserve(at_lane *lane); /* room for the end of one more operation: AT_OK or AT_ENOMEM */
void at_event_push(at_lane *lane, int kind, uint64_t id, int status, uint64_t count);
void at_event_signal(at_lane *lane);
int at_watch_fd(at_lane *lane, int fd, uint64_t tag, int edge); /* Linux: add to the lane's private epoll */
void at_unwatch_fd(at_lane *lane, int fd);

enum { AT_TAG_WAKE = 1, AT_TAG_DOORBELL = 2, AT_TAG_DEATH = 3, AT_TAG_RAIL = 4 };
#define AT_TAG(kind, index) (((uint64_t)(kind) << 32) | (uint64_t)(index))

/* thread.c */
int at_thread_start(at_lane *lane); /* with the lock; idempotent */
void at_thread_kick(at_lane *lane); /* with the lock: there is queued work */
void at_thread_ask(at_lane *lane);  /* with the lock: its threads leave soon, and none begins */
void at_thread_join(at_lane *lane); /* without the lock, after at_thread_ask */
void at_thread_left(at_lane *lane); /* with the lock, the last that a thread does with the lane but giving that back */
/* Start a thread of the lane that takes no signals. stack 0: as large as the system says. 0, or an errno. */
int at_thread_new(at_lane *lane, pthread_t *thread, void *(*body)(void *), void *argument, const char *name, size_t stack);
void at_cpus_add(at_cpus *cpus, const int32_t *more, uint32_t count);
void at_cpus_give(const at_cpus *cpus, pthread_t thread); /* it runs on these; none: nothing changes */

#endif
