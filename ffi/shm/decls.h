/* shm: engines of one host that map each other's memory. See shm.h for the protocol. */

/* Sealed, preallocated, zeroed shared memory. Returns 0 or -errno; *base stays mapped until at_segment_unmap. */
int at_segment_new(uint64_t nbytes, void **base, int *fd);
/* Maps a segment that another process made, after verifying its seals, its size and that it is allocated, by our own fstat: 0, -EPERM (not
 * sealed), -ERANGE (another size), -ENODATA (its owner has not allocated it), or -errno. fd is not kept. */
int at_segment_map(int fd, uint64_t nbytes, void **base);
/* Touch every page of a mapping so that the first write does not fault; no Python lock is held. */
int at_segment_touch(void *base, uint64_t nbytes);
int at_segment_unmap(void *base, uint64_t nbytes);
/* 0 when [base, base + nbytes) is mapped in this process, else -errno. */
int at_memory_mapped(void *base, uint64_t nbytes);

typedef struct at_shm_half at_shm_half;

typedef struct {
    int control_fd;      /* lent: dup before sending elsewhere than over a socket */
    int channel_fd;
    int doorbell_fd;
    int pulse_fd;
    uint8_t control_cookie[16];
    uint8_t channel_cookie[16];
    uint64_t probe_va;   /* where this process sees its control cookie: a peer that reads it there may use process_vm */
} at_shm_offer;

/* What this side brings to a connection with the engine `incarnation`. */
at_shm_half *at_shm_begin(at_lane *lane, uint64_t incarnation, at_shm_offer *out);
void at_shm_abort(at_lane *lane, at_shm_half *half);
/* Takes the other side's offer and makes the peer: its id, or AT_E*. The half is gone afterwards, with any result. *taken 1: the
 * descriptors of the offer are what they have to be, and they, pidfd and mem_fd are the peer's or closed; 0: all of them are still the
 * caller's, and those of the offer may be of any kind, so that closing one may take as long as their sender likes.
 * mem_fd is an open /proc/PID/mem of the peer or -1; allow_foreign 0 refuses process_vm. */
int64_t at_shm_finish(at_lane *lane, at_shm_half *half, const at_shm_offer *theirs, uint64_t incarnation, int pidfd, int pid,
                      int mem_fd, int allow_foreign, int *taken);
/* How foreign memory of the peer is reached: 0 not at all (errno of the refusal in *why), 1 process_vm, 2 /proc/PID/mem,
 * AT_FOREIGN_UNKNOWN: that is being found out, ask again. AT_E* when it cannot be. */
enum { AT_FOREIGN_UNKNOWN = 3 };
int at_shm_foreign(at_lane *lane, int64_t peer, int *why);
/* Tests: stop inside a chunk. The next chunk of any thread that copies waits until released (0); 2: only if it is of foreign memory. */
void at_shm_hold(int on);
int at_shm_held(void);
