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

#include "lane/decls.h"
#include "lane/tables.h"
#include "values.h"

#define AT_CHUNK ((uint64_t)256 << 10) /* bytes moved between two looks at epoch, cancellation and peer */
#define AT_RECENT 8u                   /* destinations remembered to tell fresh memory from what is written again and again */
#define AT_GRANTS 65536u               /* epoch words per lane */
#define AT_DETACHED 1
#define AT_PEER_BITS 20 /* of a peer's id, for its place; the other 43 are its number among all of the lane */
#define AT_MOST_CPUS 1024

typedef struct at_peer at_peer;
typedef struct at_op at_op;
typedef struct at_copiers at_copiers;
typedef struct at_stage at_stage;

/* A set of CPUs. Empty: any. */
typedef struct {
    uint64_t bits[AT_MOST_CPUS / 64];
} at_cpus;

/* What an asynchronous provider shares between all its peers of a lane: a place in a simulated network, the domain of a NIC. */
typedef struct at_rail at_rail;
enum at_turn { /* which call lets a rail make progress */
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
    _Alignas(64) _Atomic uint32_t armed;    /* the owner waits for a count: ring the doorbell */
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
    int file;            /* it is a mapping of a file: a page of it may be taken away, see own.c */
    int slow;            /* a page of it can hold up the thread that touches it: see copiers.c */
    uint64_t absent;     /* blocks of it that may have pages which are not there: see resident.c */
    uint64_t *there;     /* owned: a bit for each block that is; NULL: in first_there */
    uint64_t first_there;
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
    int file;                        /* of this process too (the simulator), and a page of it may be taken away: see own.c */
    int foreign;                     /* a page of it can hold up the thread that touches it: see copiers.c */
    int segment_fd;                  /* of the mapping, lent; -1: none that could be punched */
    uint64_t segment_bytes;
    _Atomic uint64_t unchecked;      /* bytes moved since its pages were counted */
} at_remote;

/* Bits, of which the first two are asked for one by one: it is moved in pages, it reads. */
enum at_op_kind { AT_OP_WRITE = 0, AT_OP_PAGES = 1, AT_OP_READ = 2, AT_OP_SIGNAL = 4, AT_OP_BATCH = 8 };

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
    uint8_t *local;         /* region base + offset: read from, but for reads, which write here */
    uint64_t remote_offset; /* in the remote region */
    uint64_t nbytes;        /* of the write, or of one page */
    uint64_t local_stride, remote_stride;
    const int64_t *local_pages, *remote_pages; /* the submitting call's or a plan's, or its own (table != NULL); never the caller's */
    int64_t *table;
    uint64_t footprint;     /* bytes written lately to different places, this operation included: too many for a cache? */
    uint64_t units;         /* 1, or the number of pages */
    uint64_t piece;         /* asynchronous: bytes of one step, where the port cuts units into several */
    uint64_t extent;        /* what it is moved in. Synchronous: pages, or bytes (1 where there are none); else the port's steps */
    uint64_t cursor;        /* first of `extent` that is not posted, or that no thread has claimed */
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
    int waits;              /* local memory of it may block the thread that touches it */
    int queued;             /* linked in peer->lines[risk] */
    uint64_t tail;          /* asynchronous: so many of its last steps wait until all others have landed */
    int soon;               /* counted in lane->soon */
    int detached;           /* AT_DETACHED: another thread's, ends as a record for at_thread_wait, without an event */
    int over;               /* such a record: nothing is left but its status */
    at_batch *batch;        /* AT_OP_BATCH: its own; a child: NULL */
    int64_t parent;         /* cookie of the batch it belongs to, or 0 */
    uint32_t child;         /* which result of that is its own */
    _Atomic int withdrawn;
    at_stage *stage;        /* asynchronous, owned: a copy of local memory that can block the thread that touches it; NULL: none */
};

/* The threads that move bytes, each with an active word of its own: the loop's thread, another submitting thread, the native thread, its
 * helper, and copiers (copiers.c): one for foreign memory, several for slow memory of ours. */
#define AT_SLOW_WORDS 8
enum { AT_MOVER_CALLER, AT_MOVER_OTHER, AT_MOVER_THREAD, AT_MOVER_HELPER, AT_MOVER_FOREIGN, AT_MOVER_SLOW, AT_MOVERS = AT_MOVER_SLOW + AT_SLOW_WORDS };

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
     * first. AT_EAGAIN: refused, for an unknown time. */
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
    int pins;                   /* its rail registers local memory with a device: pages stay where they are */
    uint64_t staged;            /* bytes of copies that its operations have, see stage.c */
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
    uint64_t id, count;
    int32_t status, kind;
} at_event;

typedef struct {
    const _Atomic uint64_t *word; /* NULL: free */
    uint64_t told;                /* the value that was handed out last */
    uint32_t generation;
    int armed;
    int file; /* in a mapping of a file, whose pages may be taken away */
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

    at_imm_values values;
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
    _Atomic int moving_here; /* the loop's thread moves an operation now without the lock: its active word is taken. 2: it is waited for */
    int moving_other; /* the same of another submitting thread */
    uint32_t risky;   /* queued operations for copiers, and probes */
    at_copiers *copiers; /* NULL until there is something that may hold up a thread */
    void *(*thread_main)(void *lane); /* see threads.h */
    void (*copier_job)(at_lane *lane, at_peer *peer, at_op *op, int risk, int mover, uint64_t *since);
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

#include "functions.h"

#endif
