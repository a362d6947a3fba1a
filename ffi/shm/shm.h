/* The shm provider: what two engines of one host share, and the rules that keep it safe.
 *
 * Each engine owns a control segment (others map it read-only) with one epoch word per grant and the word `armed`. For each
 * peer it owns an inbound channel, which exactly that peer maps read-write and into which it counts what it has written.
 *
 * Writing. The writer publishes the grant it works under in an `active` word, then reads the grant's epoch; if that is not
 * the one of its descriptor it stops. It copies one chunk and clears `active`. The owner revokes by changing the epoch and
 * then reading every writer's `active`: at least one of them sees the other (lane/orders.h
 * says by which orders). A revocation therefore needs no answer: once no `active` names the grant, nothing can land. Counts are
 * published in the same way, so that nothing is counted under a grant once its revocation is over.
 *
 * `barred` does to all grants of one writer what an epoch does to one grant: the owner sets it when it gives the peer up. A process
 * that was stopped and comes back finds itself shut out. What it was inside of stays in `active` until it moves on or dies.
 *
 * Counting. The writer gives each immediate value a slot and keeps the running total there (one producer, no lock, no ring
 * that could fill while the target's loop is blocked), then marks the slot in a bitmap, its summary, and `dirty`. The writer
 * that turns `dirty` from 0 to 1 while the owner is `armed` rings the owner's eventfd. The owner clears `dirty` first and reads
 * the totals last, so nothing is missed; differences to what it has seen before are the arrivals. A slot whose total the
 * owner has confirmed in `drained` may be given to another value.
 *
 * Everything in a channel may be scribbled over by its peer. The owner reads each word once and believes nothing but the
 * difference of two totals; indexes come from bit positions, never from memory. Marks and rings that bring no arrivals are counted
 * (`idle_rings`), and so is what no honest peer does in one step: such a peer is given up. Descriptors are taken from a peer only after
 * a look at what they are: sealed memory of tmpfs (huge pages could be punched out from under us), eventfds. What cannot be prevented:
 * a process that shares an eventfd may have the kernel itself fill its counter (aio), and block even a 0. */
#ifndef AT_SHM_H
#define AT_SHM_H

#include <sys/types.h>

#include "lane/lane.h"

#include "shm/decls.h"

#define AT_SLOTS 65536u
#define AT_COUNTING AT_MOVERS
#define AT_IDLE_RINGS 65536
#define AT_SHM_SMALL ((uint64_t)32 << 10) /* foreign copies up to here are no slower through /proc/PID/mem */
#define AT_CHANNEL_MAGIC UINT64_C(0x41544348414e4e45)

typedef struct {
    _Alignas(64) _Atomic uint64_t grant; /* slot + 1 of the grant being written under, 0: none */
    uint64_t begin, nbytes;              /* which part of the remote region, for reports */
} at_active;

typedef struct {
    uint64_t magic;
    uint64_t owner, writer; /* incarnations */
    uint8_t cookie[16];
    /* the writer's words */
    at_active active[AT_MOVERS + 1]; /* one for each mover, one for counting */
    _Alignas(64) _Atomic uint64_t ping;
    _Alignas(64) _Atomic uint32_t dirty;
    _Alignas(64) _Atomic uint64_t summary[AT_SLOTS / 64 / 64];
    _Alignas(64) _Atomic uint64_t bitmap[AT_SLOTS / 64];
    _Alignas(64) _Atomic uint32_t imm[AT_SLOTS];
    _Alignas(64) _Atomic uint64_t count[AT_SLOTS];
    /* the owner's words */
    _Alignas(64) _Atomic uint64_t pong_native;
    _Atomic uint64_t pong_loop;
    _Atomic uint64_t barred; /* not 0: this writer was given up */
    _Alignas(64) _Atomic uint64_t drained[AT_SLOTS];
} at_channel;

typedef struct {
    uint32_t imm;
    uint32_t slot; /* + 1; 0: empty */
} at_slot_entry;

typedef struct {
    at_channel *inbound, *outbound;
    const at_control *control; /* theirs, read-only */
    int inbound_doorbell;      /* ours: they ring it */
    int outbound_doorbell;     /* theirs */
    int outbound_pulse;        /* theirs */
    int neighbour; /* its lane is another process's */
    int pidfd, pid, mem_fd;
    _Atomic int foreign; /* as at_shm_foreign says; written by a copier once */
    int foreign_why;
    uint64_t probe_va;   /* where the peer sees its control cookie, and what it is */
    uint8_t probe_cookie[16];
    /* outbound counting */
    uint64_t *total;           /* per slot */
    uint32_t *slot_imm;
    uint32_t slots, slots_room, hand;
    at_slot_entry *table;      /* imm -> slot */
    uint32_t table_mask;
    /* inbound counting */
    uint64_t *seen;
    uint32_t seen_room;
    int64_t idle_rings; /* how many more marks and rings without an arrival are put up with */
} at_shm;

/* A connection that is being made. */
struct at_shm_half {
    at_shm *shm;                            /* what will stay of it; NULL: it is the peer's now */
    int channel_fd;                         /* ours, for the other side */
    int their_control_fd, their_channel_fd; /* until they are mapped */
};

extern const at_port at_shm_port;

static inline void at_shm_leave(at_active *active) {
    atomic_store_explicit(&active->grant, 0, memory_order_release); /* order: leave 1 */
}

/* Announce work under a grant, then look whether it is still allowed: AT_OK, AT_ESTALE or AT_EPEER (then nothing is announced).
 * The orders are those of lane/orders.h. */
static inline int at_shm_enter(const at_shm *shm, at_active *active, const at_remote *remote) {
    atomic_store(&active->grant, (uint64_t)remote->slot + 1); /* order: enter 1 */
    uint64_t barred = atomic_load(&shm->outbound->barred);    /* order: enter 2 */
    if (atomic_load(remote->word) == remote->epoch && barred == 0) return AT_OK; /* order: enter 3 */
    at_shm_leave(active);
    return barred != 0 ? AT_EPEER : AT_ESTALE;
}

/* queue.c */
int at_shm_count(at_peer *peer, const at_remote *remote, uint32_t imm, uint64_t n);
void at_shm_drain(at_peer *peer);
void at_shm_rung(at_peer *peer);
void at_shm_ring(int fd);
/* post.c */
int at_shm_move(at_peer *peer, const at_op *op, uint64_t first, uint64_t n, int mover, uint64_t *moved, int *oserror);
/* memory.c */
int at_shm_is_memory(int fd); /* tmpfs, and no other file system that knows seals */
int at_shm_probe(at_shm *shm); /* NO LOCK, a copier's */
int at_shm_gone(const at_shm *shm); /* its process has ended: its pid may already be another's */
int at_shm_unchanged(const at_shm *shm); /* its pid still names the program that it was set up with. NO LOCK, a copier's */
/* Foreign memory by its pid: k pieces, in order. The first of each table is the function's own, by which it knows the program.
 * Bytes of the others that were moved, at least one; -1 with errno (ESRCH: the pid is another program's). */
struct iovec;
ssize_t at_shm_copy_by_pid(const at_shm *shm, struct iovec *here, struct iovec *there, uint32_t k, int read);
/* Copy between local memory and the peer's address space, to it or (read) from it; 0 or an errno. */
int at_shm_foreign_copy(at_shm *shm, uint8_t *local, uint64_t va, uint64_t nbytes, int read);

#endif
