/* What the files of the lane call of each other, and what providers call. Part of lane.h: by itself it is nothing. */
#ifndef AT_FUNCTIONS_H
#define AT_FUNCTIONS_H

#include "lane.h"

/* base.c */
void at_lock(at_lane *lane);
void at_unlock(at_lane *lane);
uint64_t at_now(void); /* CLOCK_MONOTONIC, ns */
int at_is_forked(const at_lane *lane);     /* it is of a parent of this process */
void at_belongs_here(at_lane *lane);       /* to this process, and this thread is its owner */
int at_check_owner(const at_lane *lane);   /* this process, this thread, not shut */
int at_check_process(const at_lane *lane); /* this process, not shut */
/* With the lock, which it may drop: another thread than the loop's is about to close something. Not while that one moves bytes. */
void at_wait_here(at_lane *lane);
int at_is_moving(at_lane *lane); /* with the lock: it does; lane->ended is told when it does not any more */
void at_rail_add(at_lane *lane, at_rail *rail);   /* with the lock; gone with the lane */
void at_rails_progress(at_rail *first, int turn); /* without the lock; AT_TURN_* */

/* Room for one more pointer; existing ones never move, so that ids and pointers stay good. */
int at_grow(void ***items, uint32_t *capacity, uint32_t count);
int64_t at_make_id(uint32_t generation, uint32_t index);

/* A slot whose generations are used up stays out of use: ids come never again. An odd one is in use, and this is what ends it. */
#define AT_MOST_LIVES 0x7fffffffu
static inline uint32_t at_life_over(uint32_t generation) { return generation < AT_MOST_LIVES ? generation + 1 : AT_MOST_LIVES + 2; }

#define AT_TURN_OPS 64u /* of a lane without a clock of its own */

/* Count operations that were done inside calls, and note whether a loop turn is due. */
static inline void at_count_turn(at_lane *lane, uint32_t ops, uint64_t nbytes) {
    uint32_t before = lane->turn_ops;
    lane->turn_ops += ops;
    if (lane->config.flags & AT_LANE_NO_THREAD) { /* virtual time: the same calls give the same turns */
        lane->turn_due = lane->turn_ops >= AT_TURN_OPS;
        return;
    }
    lane->turn_bytes += nbytes;
    if (lane->turn_ops / 16 == before / 16 && lane->turn_bytes < AT_CHUNK) return;
    lane->turn_bytes = 0;
    if (at_now() - lane->turn_start > lane->config.turn_ns) lane->turn_due = 1;
}

/* With the lock, of the loop's thread: it does not move bytes any more. Those that write a 2 have the lock: no exchange is needed. */
static inline void at_here_over(at_lane *lane) {
    if (atomic_load_explicit(&lane->moving_here, memory_order_relaxed) == 2) (void)pthread_cond_broadcast(&lane->ended); /* order: alone: the lock orders it */
    atomic_store_explicit(&lane->moving_here, 0, memory_order_relaxed); /* order: alone: the lock orders it */
}

/* peers.c, with the lock: a new peer; takes no ownership of impl until it succeeds. */
at_peer *at_peer_add(at_lane *lane, const at_port *port, void *impl, const at_control *control);
at_peer *at_peer_find(at_lane *lane, int64_t id); /* NULL when unknown or freed */
void at_peer_release(at_peer *peer);              /* drop one use; destroys a freed peer with the last */
void at_peer_broke(at_peer *peer);                /* it broke the protocol, the loop is told once */
void at_peers_reap(at_lane *lane);                /* let go of lingering peers that have left */

/* lane.c */
void at_control_release(at_control_ref *ref);
void at_lane_destroy(at_lane *lane); /* frees what at_lane_end has left, and the lane */

/* memory.c, with the lock */
at_region *at_region_use(at_lane *lane, int64_t id); /* NULL when closed or unknown */
void at_region_release(at_lane *lane, uint32_t index);
at_remote *at_remote_use(at_lane *lane, int64_t id);
void at_remote_release(at_lane *lane, uint32_t index);

/* Keep what an operation uses (region, remote region, peer) until at_op_let_go. */
static inline void at_op_hold(at_op *op) {
    if (op->region != NULL) op->region->users++;
    if (op->remote != NULL) op->remote->users++;
    op->peer->users++;
}

/* Give back what at_op_hold kept: it may be gone afterwards. */
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
void at_peer_end(at_peer *peer, int status);                 /* what at_peer_fail does */
void at_op_end(at_op *op);                                   /* everything is retired: tell the caller */
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
/* Parts of one operation, for at most `budget` bytes; *since: when the part began that is being moved (NULL: not asked for). */
void at_move_one(at_lane *lane, at_peer *peer, at_op *op, uint64_t budget, int mover, uint64_t *since);
int at_queued_work(const at_lane *lane, int refused);        /* is anything left for at_move_queued, also counts refused just now? */
int at_queued_for_two(const at_lane *lane);                  /* so much that two threads are faster? */
void at_head_start(at_lane *lane, at_op *op);                /* move some of it while the native thread wakes up */
#define AT_TOGETHER 64u /* operations that are moved while the lock is left once, at most */

/* submit.c, with the lock */
int at_resolve(at_lane *lane, const at_order *order, int64_t imm, at_op *op); /* everything that may have changed since it was checked */
/* Bounds, and the page tables, which are copied to `tables` while they are checked; NULL: they cannot change. */
int at_check(at_lane *lane, const at_order *order, at_op *op, const at_tables *tables);
/* The same for pages, which must lie before `here` bytes of the local region and before `there` bytes of the remote one. */
int at_check_pages(at_lane *lane, const at_order *order, at_op *op, uint64_t here, uint64_t there, const at_tables *tables);
/* Only decides: AT_HERE: at_move_here may move it; AT_OK: there is nothing to move; AT_EAGAIN: it has to be queued; else it fails. */
enum { AT_HERE = 2 };
int at_submit_here(at_lane *lane, at_op *op);
/* Move ops[0..n), n at most AT_TOGETHER, of the loop's thread, inside the submitting call, without the lock meanwhile. Each one's status: AT_OK; AT_EAGAIN when it has to be queued (it may have landed); else it failed. */
int at_move_here(at_lane *lane, at_op *ops, uint32_t n);
int64_t at_submit(at_lane *lane, at_op *op); /* a resolved one: as at_write answers */
int64_t at_submit_last(at_lane *lane, at_op *op); /* the same at the end of a call: it gives the lock back */
/* Wake a thread that moves what was queued for synchronous ports; cookie: an operation that the caller may begin itself, or 0. */
void at_wake_mover(at_lane *lane, int64_t cookie);

int64_t at_unlock_and_progress(at_lane *lane, int64_t result); /* the end of a submitting call */
int at_pages_make_sense(uint64_t n, uint64_t page_bytes, uint64_t from_stride, uint64_t to_stride);

/* watch.c, with the lock */
uint64_t at_watch_look(at_lane *lane); /* tell of changes; ns until the next look, 0: no word is watched */

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
