/* Making and unmaking a connection: offers out, offers in, verified and mapped; signs of life. */
#define _GNU_SOURCE
#include "shm.h"

#include "lane/copiers.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

static void close_fd(int fd) {
    if (fd >= 0) close(fd);
}

static int fill_cookie(uint8_t cookie[16]) { return getrandom(cookie, 16, 0) == 16 ? 0 : -1; }

static void shm_free(at_shm *shm) {
    if (shm->outbound != NULL) munmap(shm->outbound, sizeof *shm->outbound);
    if (shm->inbound != NULL) munmap(shm->inbound, sizeof *shm->inbound);
    if (shm->control != NULL) munmap((void *)(uintptr_t)shm->control, sizeof *shm->control);
    close_fd(shm->inbound_doorbell);
    close_fd(shm->outbound_doorbell);
    close_fd(shm->outbound_pulse);
    close_fd(shm->pidfd);
    close_fd(shm->mem_fd);
    free(shm->total);
    free(shm->slot_imm);
    free(shm->table);
    free(shm->seen);
    free(shm);
}

static void half_free(at_shm_half *half) {
    if (half->shm != NULL) shm_free(half->shm);
    close_fd(half->channel_fd);
    close_fd(half->their_control_fd);
    close_fd(half->their_channel_fd);
    free(half);
}

static at_shm_half *half_new(void) {
    at_shm_half *half = calloc(1, sizeof *half);
    at_shm *shm = calloc(1, sizeof *shm);
    if (half == NULL || shm == NULL) {
        free(half);
        free(shm);
        return NULL;
    }
    *half = (at_shm_half){.shm = shm, .channel_fd = -1, .their_control_fd = -1, .their_channel_fd = -1};
    *shm = (at_shm){.inbound_doorbell = -1, .outbound_doorbell = -1, .outbound_pulse = -1, .pidfd = -1, .mem_fd = -1,
                    .idle_rings = AT_IDLE_RINGS};
    return half;
}

/* A channel is sealed but, unlike user memory, not preallocated: it has room for 65,536 values, of which most connections
 * use a handful, and its few touched pages are as safe as any page of this process. */
static int channel_new(at_shm_half *half) {
    half->channel_fd = memfd_create("aiotransfer-channel", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (half->channel_fd < 0 || ftruncate(half->channel_fd, (off_t)sizeof(at_channel)) != 0 ||
        fcntl(half->channel_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
        return -1;
    void *at = mmap(NULL, sizeof(at_channel), PROT_READ | PROT_WRITE, MAP_SHARED, half->channel_fd, 0);
    if (at == MAP_FAILED) return -1;
    half->shm->inbound = at;
    return 0;
}

/* What this side brings: its channel and its bell. 0, or an errno. */
static int bring(at_lane *lane, at_shm_half *half, uint64_t incarnation) {
    at_shm *shm = half->shm;
    if (channel_new(half) != 0) return errno;
    shm->inbound_doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (shm->inbound_doorbell < 0 || fill_cookie(shm->inbound->cookie) != 0) return errno;
    if (lane->control->cookie[0] == 0 && fill_cookie(lane->control->cookie) != 0) return errno;
    lane->control->cookie[0] |= 1;
    shm->inbound->magic = AT_CHANNEL_MAGIC;
    shm->inbound->owner = lane->incarnation;
    shm->inbound->writer = incarnation;
    return 0;
}

at_shm_half *at_shm_begin(at_lane *lane, uint64_t incarnation, at_shm_offer *out) {
    at_shm_half *half = half_new();
    int error = half == NULL ? ENOMEM : bring(lane, half, incarnation);
    at_lock(lane);
    if (error != 0) lane->oserror = error;
    else error = at_thread_start(lane); /* it answers the peer's pings; says itself why it does not start */
    at_unlock(lane);
    if (error != 0) {
        if (half != NULL) half_free(half);
        return NULL;
    }
    const at_shm *shm = half->shm;
    *out = (at_shm_offer){.control_fd = lane->control_ref->fd, .channel_fd = half->channel_fd, .doorbell_fd = shm->inbound_doorbell,
                          .pulse_fd = lane->pulse_fd, .probe_va = (uint64_t)(uintptr_t)lane->control->cookie};
    memcpy(out->control_cookie, lane->control->cookie, 16);
    memcpy(out->channel_cookie, shm->inbound->cookie, 16);
    return half;
}

void at_shm_abort(at_lane *lane, at_shm_half *half) {
    (void)lane;
    half_free(half);
}

/* Map one of their segments: sealed, of exactly this size, carrying the cookie that the authenticated session named. NULL: errno is
 * EPROTO when it is not, and the operating system's otherwise. */
static void *map_theirs(int fd, size_t size, int writable, const uint8_t cookie[16], size_t cookie_at) {
    struct stat info;
    int seals = fcntl(fd, F_GET_SEALS), wanted = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    errno = EPROTO;
    if (seals < 0 || (seals & wanted) != wanted || !at_shm_is_memory(fd) || fstat(fd, &info) != 0 ||
        (uint64_t)info.st_size != size)
        return NULL;
    void *at = mmap(NULL, size, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) return NULL;
    if (memcmp((uint8_t *)at + cookie_at, cookie, 16) == 0) return at;
    munmap(at, size);
    errno = EPROTO;
    return NULL;
}

/* Only an eventfd is written to: other files could take a write for more than a ring, or block it. */
static int is_eventfd(int fd) {
    static const char kind[] = "anon_inode:[eventfd]";
    char path[32], name[sizeof kind];
    (void)snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(path, name, sizeof name);
    return n == (ssize_t)sizeof kind - 1 && memcmp(name, kind, sizeof kind - 1) == 0;
}

/* Each descriptor gets its owner once all of them are known to be what they should, and before anything else can fail: what stays is the
 * connection's, what is needed once is the half's. None of them is slow to close: they are eventfds and shared memory. */
static void adopt(at_shm_half *half, const at_shm_offer *theirs, int pidfd, int mem_fd) {
    half->their_control_fd = theirs->control_fd;
    half->their_channel_fd = theirs->channel_fd;
    half->shm->outbound_doorbell = theirs->doorbell_fd;
    half->shm->outbound_pulse = theirs->pulse_fd;
    half->shm->pidfd = pidfd;
    half->shm->mem_fd = mem_fd;
}

/* Map what they offer and see that it is theirs, and made for us. 0, EPROTO, or an errno of the operating system. The descriptors stay
 * the caller's. */
static int meet(const at_lane *lane, at_shm_half *half, const at_shm_offer *theirs, uint64_t incarnation) {
    at_shm *shm = half->shm;
    shm->control = map_theirs(theirs->control_fd, sizeof(at_control), 0, theirs->control_cookie, offsetof(at_control, cookie));
    if (shm->control == NULL) return errno;
    shm->outbound = map_theirs(theirs->channel_fd, sizeof(at_channel), 1, theirs->channel_cookie, offsetof(at_channel, cookie));
    if (shm->outbound == NULL) return errno;
    int ours = shm->control->incarnation == incarnation && shm->outbound->owner == incarnation &&
               shm->outbound->writer == lane->incarnation;
    return ours && is_eventfd(theirs->doorbell_fd) && is_eventfd(theirs->pulse_fd) ? 0 : EPROTO;
}

/* With the lock: the peer, which owns the connection from then on. */
static int64_t join(at_lane *lane, at_shm_half *half) {
    at_shm *shm = half->shm;
    at_peer *peer = lane->shut ? NULL : at_peer_add(lane, &at_shm_port, shm, shm->control);
    if (peer == NULL) return lane->shut ? AT_ESHUT : AT_ENOMEM;
    half->shm = NULL;
    peer->process = shm->pid;
    shm->neighbour = shm->pid != getpid();
    if (shm->neighbour) atomic_fetch_add(&lane->neighbours, 1);
    if (at_watch_fd(lane, shm->inbound_doorbell, AT_TAG(AT_TAG_DOORBELL, peer->index), 1) == 0 &&
        (shm->pidfd < 0 || at_watch_fd(lane, shm->pidfd, AT_TAG(AT_TAG_DEATH, peer->index), 1) == 0))
        return peer->id;
    lane->oserror = errno;
    peer->freed = 1;
    at_peer_release(peer);
    return AT_EIO;
}

int64_t at_shm_finish(at_lane *lane, at_shm_half *half, const at_shm_offer *theirs, uint64_t incarnation, int pidfd, int pid,
                      int mem_fd, int allow_foreign, int *taken) {
    at_shm *shm = half->shm;
    shm->pid = pid;
    int refused = meet(lane, half, theirs, incarnation);
    *taken = refused == 0;
    if (refused == 0) adopt(half, theirs, pidfd, mem_fd);
    shm->foreign = allow_foreign ? AT_FOREIGN_UNKNOWN : 0;
    shm->foreign_why = allow_foreign ? 0 : EPERM;
    shm->probe_va = theirs->probe_va;
    memcpy(shm->probe_cookie, theirs->control_cookie, sizeof shm->probe_cookie);
    at_lock(lane);
    if (refused != 0) lane->oserror = refused;
    int64_t result = refused == 0 ? join(lane, half) : refused == EPROTO ? AT_EPROTO : AT_EIO;
    at_unlock(lane);
    half_free(half);
    return result;
}

int at_shm_foreign(at_lane *lane, int64_t id, int *why) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_peer *peer = at_peer_find(lane, id);
    if (peer != NULL && peer->port == &at_shm_port) {
        at_shm *shm = peer->impl;
        result = atomic_load(&shm->foreign);
        if (result != AT_FOREIGN_UNKNOWN) *why = shm->foreign_why;
        if (result == AT_FOREIGN_UNKNOWN && peer->probe == AT_PROBE_NONE && (result = at_copiers_ready(lane)) == AT_OK) {
            peer->probe = AT_PROBE_WANTED;
            lane->risky++;
            at_copiers_call(lane);
            result = AT_FOREIGN_UNKNOWN;
        }
    }
    at_unlock(lane);
    return result;
}

/* For a copier: it touches the peer's own memory, which may block the thread that does. */
static void shm_probe(at_peer *peer) {
    at_shm *shm = peer->impl;
    int found = at_shm_probe(shm);
    atomic_store(&shm->foreign, found);
}

static int shm_active(at_peer *peer, uint32_t slot) {
    at_shm *shm = peer->impl;
    if (peer->dead) return 0; /* its process is gone: proof enough */
    for (int i = 0; i <= AT_MOVERS; i++)
        if (atomic_load(&shm->inbound->active[i].grant) == (uint64_t)slot + 1) return 1; /* order: look 1 */
    return 0;
}

static void shm_bar(at_peer *peer) {
    at_shm *shm = peer->impl;
    atomic_store(&shm->inbound->barred, 1); /* order: bar 1 */
}

static int shm_inside(at_peer *peer) {
    at_shm *shm = peer->impl;
    for (int i = 0; i <= AT_MOVERS && !peer->dead; i++)
        if (atomic_load(&shm->inbound->active[i].grant) != 0) return 1; /* order: inside 1 */
    return 0;
}

static void shm_ping(at_peer *peer, uint64_t seq) {
    at_shm *shm = peer->impl;
    atomic_store(&shm->outbound->ping, seq);
    at_shm_ring(shm->outbound_pulse);
}

static void shm_pong(at_peer *peer, uint64_t *native, uint64_t *loop) {
    at_shm *shm = peer->impl;
    *native = atomic_load(&shm->outbound->pong_native);
    *loop = atomic_load(&shm->outbound->pong_loop);
}

static void shm_answer(at_peer *peer, int from_loop) {
    at_shm *shm = peer->impl;
    uint64_t ping = atomic_load(&shm->inbound->ping);
    atomic_store(from_loop ? &shm->inbound->pong_loop : &shm->inbound->pong_native, ping);
}

static void shm_destroy(at_peer *peer) {
    at_shm *shm = peer->impl;
    if (shm->neighbour) atomic_fetch_sub(&peer->lane->neighbours, 1);
    at_unwatch_fd(peer->lane, shm->inbound_doorbell);
    at_unwatch_fd(peer->lane, shm->pidfd);
    shm_free(shm);
}

const at_port at_shm_port = {
    .name = "shm",
    .window = 0,
    .foreign = 1,
    .probe = shm_probe,
    .move = at_shm_move,
    .count = at_shm_count,
    .drain = at_shm_drain,
    .rung = at_shm_rung,
    .active = shm_active,
    .bar = shm_bar,
    .inside = shm_inside,
    .ping = shm_ping,
    .pong = shm_pong,
    .answer = shm_answer,
    .destroy = shm_destroy,
};
