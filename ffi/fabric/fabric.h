/* The fabric provider: peers by completion queues, one endpoint for each where the fabric allows it.
 *
 * Everything here is common to what moves the bytes: libfabric (ofi/ofi.h) or libibverbs (verbs/verbs.h), each a table of functions
 * (at_fab_driver) that posts, reads completions, registers and closes, and decides nothing.
 *
 * A rail (at_fab) is one domain with one completion queue and one address vector. A connection (at_fab_conn) is this lane's side of one
 * to one peer: an endpoint of its own, so that closing it fences that peer and no other. A work request (at_fab_wr) is the provider's
 * context while it is posted, and therefore never freed before the rail.
 *
 * Locks, in this order: fab->progress_lock (held to make progress: to read the queue and hand out what was read), the lane's lock
 * (everything the lane knows, connections and work requests), fab->lock (each call into the library). A fence is called with the lane's
 * lock and closes an endpoint while another thread may hold completions of it that it has read and not handed out: the work requests of
 * a closed endpoint go into limbo, and are used again only after a whole turn that began later.
 *
 * Granting. A fabric cannot tell whether a peer is inside a write under some key, and closing a memory region does not stop a write
 * whose header was accepted. So keys are exported to one peer after the other on request (at_fab_export_key remembers to whom), a
 * revocation is a control message to each of them, and each answers when nothing of it is posted under that grant any more. Both are
 * written and answered by the thread that makes progress, without the event loop. What does not answer is fenced by closing its endpoint.
 *
 * Counting. A marked immediate names its sender. Each side numbers its work requests that carry immediates, and counts those that have
 * arrived. When a connection breaks, both sides close their endpoints, hand out what has arrived, tell each other how many that were,
 * and post again what was not among them: the order of one connection makes a number enough.
 *
 * Progress. The loop serves the queue through its descriptor. On software providers nothing moves while no thread calls into the library,
 * so a thread stands in when the loop has not come round for a millisecond; where the queue has no descriptor, it does all the work. */
#ifndef AT_FABRIC_H
#define AT_FABRIC_H

#include "lane/lane.h"

#include "fabric/decls.h"

#define AT_FAB_WINDOW 64u                       /* work requests posted per peer */
#define AT_FAB_MOST_BYTES ((uint64_t)32 << 20)  /* posted per peer, once something is: what a cancel has to wait for */
#define AT_FAB_BOUNCES 4u
#define AT_FAB_RAIL_BYTES ((uint64_t)8 << 20)  /* the same, of each of several: a slow one shall not hold up what others could carry */
#define AT_FAB_PIECE ((uint64_t)4 << 20)        /* of a larger write */
#define AT_FAB_BLOCK 64u                        /* work requests that are made at once */
#define AT_FAB_IOV 4u
#define AT_FAB_PAIRS 16u                        /* of grants in a control message */
#define AT_FAB_FAILED 4u                         /* broken connections in a control message */
#define AT_FAB_RECEIVES 4u                      /* posted for control messages, per connection */
#define AT_FAB_MOST_PEERS (1u << 20)            /* what a mark can name */
#define AT_FAB_MOST_COUNT (1u << 12)            /* pages that one mark can count */
#define AT_FAB_MOST_RAILS 16u                   /* connections to one peer that are taken as one */

typedef struct at_fab_conn at_fab_conn;
typedef struct at_fab_wr at_fab_wr;
typedef struct at_fab_multirail at_fab_multirail;

/* One message between two connections. At most one is under way in each direction. */
typedef struct {
    uint32_t mark, generation;
    uint64_t ping, pong_native, pong_loop;
    uint32_t revoked, over; /* how many of the pairs: grants that are taken back, and then grants that are not used any more */
    struct {
        uint64_t epoch;
        uint32_t slot, unused;
    } pairs[AT_FAB_PAIRS];
    uint32_t failed_count, unused; /* how many of these: other connections that have broken, by their peers in the lane that reads this */
    struct {
        int64_t peer;
        uint64_t generation, arrived;
    } failed[AT_FAB_FAILED];
} at_fab_ctrl;

enum at_fab_wr_state {
    AT_WR_FREE,
    AT_WR_POSTED,
    AT_WR_UNCONFIRMED, /* its connection broke: did it land? */
    AT_WR_REPOST,     /* it did not: to be posted again */
    AT_WR_LIMBO,     /* its endpoint is closed: a late completion may still name it */
    AT_WR_ORPHAN     /* its connection is gone, the shared endpoint is not: its completion will come */
};
enum at_fab_wr_kind { AT_WR_WORK, AT_WR_CTRL_OUT, AT_WR_CTRL_IN };

struct at_fab_wr {
    void *context[8]; /* first: what a completion names, and the library's to use (struct fi_context2) */
    at_fab_wr *next, *previous;
    at_fab_conn *conn;
    at_op *op;               /* while posted */
    int64_t cookie;          /* of it: afterwards it may have ended */
    uint64_t first, steps, bytes;
    uint64_t counts;         /* units that it counts at the target */
    uint64_t serial;         /* among the work requests that count; 0: it does not, or has been posted by no connection yet */
    void *desc;              /* of the memory that this lies in */
    uint8_t *bounce;         /* owned: the bytes of local memory that may be taken away, see at_fab_bounce; NULL: none */
    int pooled;              /* it has AT_FAB_PIECE bytes and may be a spare one afterwards */
    uint8_t *lands;          /* where they go when they have been read; NULL: they are written */
    int state, kind;
    at_fab_ctrl ctrl;
};

typedef struct {
    at_fab_wr *head, *tail;
} at_fab_list;

/* In what state a connection is, one generation after the other: `ep`, `joined`, `begun` and `heard` say it together. There are no others.
 *
 *   state    ep joined begun heard
 *   CLOSED   -    any   any   any   never opened, or broken: the rest is of the generation that is over, until the next one is made
 *   MADE     x     -     -     -    our offer goes to the other side
 *   EARLY    x     -     -     x    its first control message has overtaken its offer
 *   JOINED   x     x     -     -    its offer was taken, and it is the other side that begins: we post nothing yet
 *   BEGUN    x     x     x     -    its offer was taken, and we begin: control messages go out, and posts of a connection that is the only one
 *   UP       x     x     x     x    a control message has come: bytes get through
 *
 *   from     to       by
 *   CLOSED   MADE     at_fab_offer_make
 *   MADE     EARLY    a control message, see ctrl_in of queue.c
 *   MADE     JOINED   at_fab_offer_take, `first` is 0
 *   MADE     BEGUN    at_fab_offer_take, `first` is 1
 *   EARLY    UP       at_fab_offer_take
 *   JOINED   UP       a control message
 *   BEGUN    UP       a control message
 *   each     CLOSED   at_fab_conn_close, mostly by at_fab_conn_break
 *
 * at_fab_stepped stands where a step is over; builds with a sanitizer check it there. What else is said of a connection goes beside this, in each
 * state: `retired` (not opened again), `troubled` (it broke by itself), `owes` (the other side is to be told), `alone` (the door is shut). */
enum at_fab_state { AT_CONN_CLOSED, AT_CONN_MADE, AT_CONN_EARLY, AT_CONN_JOINED, AT_CONN_BEGUN, AT_CONN_UP };

enum at_fab_hold { AT_HOLD_NONE, AT_HOLD_LENT, AT_HOLD_TELL, AT_HOLD_TOLD };

struct at_fab_conn {
    at_fab *fab;
    at_peer *peer;
    at_fab_multirail *multirail; /* that it is one of, or NULL */
    uint32_t place;        /* in it */
    uint32_t out;          /* work requests posted */
    int64_t their_peer;    /* the other side's number of it, 0: not known */
    int owes;              /* it has broken, and the other side may not know yet what was counted by it */
    void *ep;            /* the driver's. NULL: none, or broken. The rail's own where that is shared */
    uint64_t to;         /* the driver's: where it leads */
    uint64_t unique;     /* among all connections there ever were: a completion may name one that has gone */
    uint32_t mark;       /* ours: the index among the rail's connections */
    uint32_t their_mark;  /* theirs for us: what we send carries it */
    uint32_t generation;
    int joined;          /* the other side's offer of this generation was taken */
    int begun;           /* and it is our turn to post */
    int heard;           /* a control message has come: bytes do get through */
    int state;           /* AT_CONN_*: what these said after the last step. Only builds with a sanitizer look at it */
    uint64_t closed_as;  /* which closing its last one was; see at_fab.closings */
    int troubled;        /* its connection broke by itself: the other side may be making another one */
    int retired;         /* given up: it is not opened again */
    int mute;            /* tests: it posts nothing */
    int door, first;     /* the driver's: the descriptor by which the other side may come in, -1: none that is known of; and the number
                          * that was free first when it was made: a connection that came since has that one or a greater one */
    int alone;           /* the driver's: no connection can come in any more, not even the other side again: see at_fab_refused */
    uint64_t refused_first, refused_last; /* posts that were put off while nothing was posted */
    uint32_t refusals;
    uint64_t signal_target, signal_target_key; /* theirs */
    uint64_t posted_bytes;
    uint64_t serial, arrived;      /* work requests with immediates: posted (less those that never arrived), counted here */
    uint64_t arrived_before;       /* what of these the offer of this generation says */
    at_fab_list posted, unconfirmed, repost, ctrls;
    at_control *words;   /* the epochs of its grants, as far as they are known here */

    int telling;         /* a control message is under way */
    uint64_t ping, answered_native, answered_loop; /* ours, and what came back */
    uint64_t asked, pong_loop;                     /* theirs: the last they asked, and the last our loop has answered */
    uint64_t signs;      /* what else has come of it, as good as an answer: on a slow link a control message waits behind much data */
    int news;            /* a ping or an answer is to be told */
    uint8_t *hold;       /* by slot: what of ours it holds (AT_HOLD_*) */
    uint32_t hold_room;
    uint32_t to_tell;    /* how many of them are AT_HOLD_TELL */
    uint64_t *over;      /* a bit for each slot: grants that they took back, to be confirmed when nothing is posted under them */
    uint32_t over_count; /* how many bits are set */
};

/* Several connections to one peer, by as many rails, taken as one: a peer of the lane whose operations are shared out over them, run by
 * run. Each connection is a peer of the lane too, with control messages, counts and fences of its own; operations name the multirail peer. When one breaks,
 * both sides fence it and tell each other what they have counted by it (at_fab_member_failed), and the rest goes out by the others. */
struct at_fab_multirail {
    at_peer *peer;     /* NULL: gone, and kept for the connections that are left */
    at_control *words; /* of all of them */
    at_fab_conn *members[AT_FAB_MOST_RAILS]; /* NULL: gone */
    uint32_t count, users;
    uint32_t next_rail;
    int retired;       /* given up: nothing is posted any more */
    at_fab_list repost; /* notes of what is to be posted again, by whichever */
};

typedef struct {
    void *mr; /* the driver's */
    uint64_t key, base;
} at_fab_mr;

enum at_fab_use { AT_USE_LOCAL = 1, AT_USE_REMOTE_WRITE = 2, AT_USE_REMOTE_READ = 4, AT_USE_CTRL = 8 }; /* what memory is registered for */

/* The pieces of one work request. */
typedef struct {
    uint8_t *here[AT_FAB_IOV];
    uint64_t there[AT_FAB_IOV], nbytes[AT_FAB_IOV];
    uint64_t key;
    void *desc;
    int device; /* it is memory of a GPU, which the processor cannot read */
    uint32_t count;
    uint64_t bytes;
} at_fab_vector;

/* One thing that the queue tells. */
typedef struct {
    at_fab_wr *wr; /* what has completed; of an arrival, the receive that it used up, if any */
    int arrival;       /* a write with an immediate has landed: */
    uint64_t data;     /* its value, and a mark in the upper half where there are such */
    int error;         /* errno, 0: it went well */
    uint32_t mark;     /* AT_FAB_SENDERS: whose it is */
    uint64_t unique;
} at_fab_entry;

/* What moves the bytes. With fab->lock unless the line says otherwise; what fails says so by an errno (positive), 0 is success. */
typedef struct {
    int (*open)(at_fab_conn *conn);  /* an endpoint for it: conn->ep */
    void (*close)(at_fab_conn *conn); /* afterwards nothing of it touches memory, and conn->ep is NULL */
    void (*settle)(at_fab_conn *conn); /* both sides are in: no other is let in from now on. NULL: no other ever is */
    int (*name)(at_fab_conn *conn, at_fab_offer *out); /* what the other side joins by */
    int (*join)(at_fab_conn *conn, const at_fab_offer *theirs);
    int (*receive)(at_fab_conn *conn, at_fab_wr *wr); /* NULL: the driver keeps receives of its own */
    int (*send)(at_fab_conn *conn, at_fab_wr *wr);    /* its control message. EAGAIN: later */
    int (*post)(at_fab_conn *conn, at_fab_wr *wr, const at_fab_vector *v, int read, int counts, uint64_t data); /* EAGAIN: later */
    int (*flush)(at_fab_conn *conn); /* what post has gathered; NULL: it gathers nothing */
    int (*read)(at_fab *fab, at_fab_entry *entries, int most); /* how many */
    void (*handed_out)(at_fab *fab); /* with the lane's lock INSTEAD: a batch was. NULL: of no interest */
    void (*look)(at_fab *fab);       /* with the turn INSTEAD: before the queue is armed. NULL: of no interest */
    int (*arm)(at_fab *fab);         /* 1: a thread that sleeps on its descriptor will be woken; 0: there is more to read */
    int (*enroll)(at_fab *fab, const at_fab_memory *memory, unsigned use, at_fab_mr *out);
    void (*dismiss)(at_fab *fab, void *mr);
    void *(*desc)(void *mr); /* what work requests name local memory by */
    const char *(*text)(int error);
    void (*quit)(at_fab *fab); /* NO LOCK: before memory goes, what may still use it. NULL: nothing */
    void (*free)(at_fab *fab); /* NO LOCK: after all else */
    int by_itself;             /* what is posted moves without a call, and an armed descriptor tells of its end: a post needs no turn */
} at_fab_driver;

struct at_fab {
    at_rail rail; /* first */
    pthread_mutex_t progress_lock, lock;
    const at_fab_driver *driver;
    void *shared; /* the endpoint of all peers, where they cannot have one each */
    int fd;       /* of the queue, or -1 */
    _Atomic int news_fd; /* of what the device says of itself (look), or -1 */
    uint64_t uniques;
    at_fab_facts facts;
    uint64_t next_key;
    uint8_t signal_target[64];
    at_fab_mr signal_target_mr;
    void *signal_target_desc;

    at_fab_conn **conns;
    uint32_t conn_count, conn_room;
    at_fab_mr *exported; /* by grant */
    uint32_t exported_room;
    void **local; /* by region */
    uint32_t local_room;
    uint8_t *bounces[AT_FAB_BOUNCES]; /* spare ones: memory that is taken anew each time costs as much as the copy */
    uint32_t bounce_count;
    at_fab_wr **blocks;
    void **block_mrs;
    uint32_t block_count, block_room;
    at_fab_wr *free;
    at_fab_wr *limbo;
    uint64_t closings, read_up_to; /* endpoints that were closed; those of which everything that had arrived has been handed out */
    uint32_t posted; /* work requests, of the rail */
    int saturated;   /* a post was refused for that */
    int gathering;       /* a batch of completions is handed out: what they make room for goes out together */
    int eager;       /* a connection has something to post or to tell although nothing has completed */

    pthread_t thread;
    at_cpus cpus; /* of the thread */
    int kick_fd;
    _Atomic int started, stop, running;
    _Atomic uint64_t turned; /* when the loop or a post made progress last */
    _Atomic uint64_t last; /* when the loop came round last */
    _Atomic int left;      /* the loop has left off before the queue was armed, and comes again: no thread may sleep on it */
    _Atomic int missed;    /* a thread wanted a turn while another had it, perhaps too late for that one to see what for */
};

static inline int at_fab_is(const at_fab *fab, uint32_t flag) { return (fab->facts.flags & flag) != 0; }

/* Whether the number of arrivals tells which have arrived, and of which peer. */
static inline int at_fab_tells(const at_fab *fab) {
    return at_fab_is(fab, AT_FAB_ORDERED) && (at_fab_is(fab, AT_FAB_MARKS) || at_fab_is(fab, AT_FAB_SENDERS));
}

/* The peer whose operations it carries and whose arrivals it counts. */
static inline at_peer *at_fab_owner(const at_fab_conn *conn) {
    return conn->multirail != NULL && conn->multirail->peer != NULL ? conn->multirail->peer : conn->peer;
}

/* rail.c */
void at_fab_say(const char *format, ...) __attribute__((format(printf, 1, 2))); /* why something failed, in this thread */
/* The driver has calloc'ed fab and filled in only its own fields. Afterwards at_fab_undo gives back what was made. */
int at_fab_prepare(at_fab *fab, at_lane *lane, const at_fab_driver *driver);
int at_fab_begin(at_fab *fab, const char *name); /* facts, fd and queue are there: the rail begins. AT_OK or AT_E* */
void at_fab_undo(at_fab *fab, int oserror);

/* wake.c */
void at_fab_ring(at_fab *fab);  /* its thread wakes up */
void at_fab_kick(at_fab *fab);  /* the same, where there is one */
void at_fab_hurry(at_fab *fab); /* with the lane's lock: it is looked at soon, by the loop, or by the thread if that does not come */

/* memory.c, with the lane's lock */
int at_fab_register(at_fab *fab, const at_fab_memory *memory, unsigned use, at_fab_mr *out); /* AT_OK, or AT_EIO with at_lane_errno */
int at_fab_register_host(at_fab *fab, void *base, uint64_t nbytes, unsigned use, at_fab_mr *out);
void at_fab_unregister(at_fab *fab, at_fab_mr *mr);
at_fab_memory at_fab_part_of(const at_region *region, uint64_t offset, uint64_t nbytes);
void *at_fab_grown(void *items, uint32_t *room, uint32_t index, size_t each); /* with room for this index, zeroed; NULL: as it was */
int at_fab_source(at_fab *fab, const at_op *op, void **desc); /* of the operation's local memory */
/* Local memory that may be taken away (own.c) does not go to a provider that copies it later. libfabric's tcp would end the process where
 * it copies by itself, and where the kernel refuses, it sends the next message in the place of the bytes that it owes. So what is posted
 * is a copy. AT_OK, AT_EAGAIN (no memory) or AT_EMEMORY. */
int at_fab_bounce(at_fab *fab, const at_op *op, at_fab_wr *wr, at_fab_vector *v);
int at_fab_landed(at_fab_wr *wr); /* it was read: store it. AT_OK or AT_EMEMORY */
void at_fab_bounce_free(at_fab *fab, at_fab_wr *wr);
void at_fab_region_over(at_rail *rail, uint32_t region);
void at_fab_memory_close(at_fab *fab);

/* keys.c, with the lane's lock */
void at_fab_grant_over(at_rail *rail, uint32_t slot);

/* work_requests.c, with the lane's lock */
at_fab_wr *at_fab_wr_take(at_fab *fab); /* NULL: no memory */
void at_fab_wr_free(at_fab *fab, at_fab_wr *wr);
void at_fab_wr_retire(at_fab *fab, at_fab_wr *wr); /* posted, and no operation waits for it any more */
void at_fab_list_add(at_fab_list *list, at_fab_wr *wr);
void at_fab_list_remove(at_fab_list *list, at_fab_wr *wr);
void at_fab_wrs_close(at_fab *fab);

/* multirail.c, with the lane's lock */
extern const at_port at_fab_multirail_port;
void at_fab_multirail_leave(at_fab_conn *conn);        /* it is destroyed */
void at_fab_multirail_refill(at_fab_multirail *multirail); /* there may be room for more */

/* failover.c, with the lane's lock */
void at_fab_read_failed(at_fab_conn *carrier, const at_fab_ctrl *ctrl);
void at_fab_owe_failed(at_fab_multirail *multirail); /* one has broken or come up: what is broken is to be told, also again */
void at_fab_tell_failed(at_fab_multirail *multirail); /* by one that is up, as far as the numbers are final */

/* conns.c, with the lane's lock */
int64_t at_fab_conn_add(at_lane *lane, at_fab *fab, at_fab_multirail *multirail, at_control *words); /* its id, or AT_E*; NO LOCK */
at_control *at_fab_words_new(void);
void at_fab_words_free(at_control *words);
void at_fab_reconcile(at_fab_conn *conn, uint64_t arrived);
void at_fab_conn_unconfirmed(at_peer *peer, at_fab_list *list); /* what of it is over, or is of a peer that has ended */
void at_fab_notes_free(at_fab_list *list);
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
void at_fab_stepped(at_fab_conn *conn); /* its state is another one now: ends the process where the table of at_fab_state has no such step */
#else
static inline void at_fab_stepped(at_fab_conn *conn) { (void)conn; }
#endif
void at_fab_conn_close(at_fab_conn *conn);            /* its endpoint, if there is one */
void at_fab_owe(at_fab_multirail *multirail);            /* what of it is broken is to be told, also again */
int at_fab_refused(at_fab_conn *conn);               /* the driver has put a post off: 1: for ever, the connection is broken now */
void at_fab_conn_break(at_fab_conn *conn, int error); /* close its endpoint; what was posted is unconfirmed, or over when it was withdrawn */
at_fab_conn *at_fab_conn_of(at_lane *lane, int64_t peer); /* NULL: no such peer of ours */

/* peer.c, with the lane's lock */
void at_fab_conn_refill(at_fab_conn *conn);
void at_fab_conn_begin(at_fab_conn *conn); /* the other side's offer was taken: it is our turn to post */
void at_fab_up(at_fab_conn *conn);        /* both sides have joined, and a control message has come */
extern const at_port at_fab_port;

/* post.c, with the lane's lock */
int at_fab_has_room(at_fab_conn *conn); /* may one more be posted? Otherwise a completion will ask again */
int at_fab_post_wr(at_fab_conn *conn, at_op *op, at_fab_wr *wr, uint64_t first, uint64_t most); /* AT_OK, AT_EAGAIN, or AT_ERAIL: broken now */
void at_fab_cut(at_peer *peer, at_op *op);
int64_t at_fab_post(at_peer *peer, at_op *op);
void at_fab_flush_posts(at_peer *peer); /* what was gathered goes out */
void at_fab_still_stalled(at_peer *peer, const at_fab_list *repost); /* a part of it */
void at_fab_repost(at_fab_conn *conn); /* what is to be posted again, as far as the window allows */

/* ctrl.c, with the lane's lock */
int at_fab_receive(at_fab_conn *conn);             /* post one more receive: AT_OK or AT_EIO */
void at_fab_tell(at_fab_conn *conn);               /* send a control message if there is something to say and none under way */
at_fab_conn *at_fab_ctrl_from(at_fab *fab, const at_fab_wr *wr); /* of whom a control message has come; NULL: of no connection that there is */
void at_fab_read(at_fab_conn *conn, const at_fab_ctrl *ctrl);
void at_fab_retired(at_fab_conn *conn);            /* something of it is no longer posted: may a grant be confirmed? */
void at_fab_say_again(at_fab_conn *conn);          /* after opening again: what may have been lost */
void at_fab_taken_back(at_fab_conn *conn, uint32_t slot, uint64_t epoch); /* a grant of theirs is over: so are our operations under it */
void at_fab_revoke(at_peer *peer, uint32_t slot);
int at_fab_active(at_peer *peer, uint32_t slot);
void at_fab_ping(at_peer *peer, uint64_t seq);
void at_fab_pong(at_peer *peer, uint64_t *native, uint64_t *loop);
void at_fab_answer(at_peer *peer, int from_loop);

/* queue.c */
void at_fab_progress(at_rail *rail, int turn); /* AT_TURN_* */
int at_fab_drain(at_fab *fab); /* with the turn only: hand out all that has completed; how much that was */
int at_fab_thread_start(at_fab *fab); /* AT_OK or AT_EIO: no thread would answer control messages while the loop is blocked */
int at_fab_stop(at_rail *rail, uint64_t until);
void at_fab_thread_stop(at_fab *fab);
void at_fab_drain_now(at_rail *rail);

#endif
