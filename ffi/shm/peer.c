/* Making and unmaking a connection: offers out, offers in, verified and mapped; signs of life. */
#define _GNU_SOURCE
#include "shm.h"

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

static void half_free(at_shm_half *half) {
    if (half->inbound != NULL) munmap(half->inbound, sizeof *half->inbound);
    close_fd(half->channel_fd);
    close_fd(half->doorbell_fd);
    free(half);
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
    half->inbound = at;
    return 0;
}

at_shm_half *at_shm_begin(at_lane *lane, uint64_t incarnation, at_shm_offer *out) {
    at_shm_half *half = calloc(1, sizeof *half);
    if (half == NULL) {
        lane->oserror = ENOMEM;
        return NULL;
    }
    half->channel_fd = half->doorbell_fd = -1;
    at_lock(lane);
    int started = at_thread_start(lane); /* it answers the peer's pings */
    at_unlock(lane);
    if (started != AT_OK) { /* it has said why */
        half_free(half);
        return NULL;
    }
    if (channel_new(half) != 0) goto fail;
    half->doorbell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (half->doorbell_fd < 0 || fill_cookie(half->inbound->cookie) != 0) goto fail;
    if (lane->control->cookie[0] == 0 && fill_cookie(lane->control->cookie) != 0) goto fail;
    lane->control->cookie[0] |= 1;
    half->inbound->magic = AT_CHANNEL_MAGIC;
    half->inbound->owner = lane->incarnation;
    half->inbound->writer = incarnation;
    *out = (at_shm_offer){.control_fd = lane->control_ref->fd, .channel_fd = half->channel_fd, .doorbell_fd = half->doorbell_fd,
                          .pulse_fd = lane->pulse_fd, .probe_va = (uint64_t)(uintptr_t)lane->control->cookie};
    memcpy(out->control_cookie, lane->control->cookie, 16);
    memcpy(out->channel_cookie, half->inbound->cookie, 16);
    return half;
fail:
    lane->oserror = errno;
    half_free(half);
    return NULL;
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

int64_t at_shm_finish(at_lane *lane, at_shm_half *half, const at_shm_offer *theirs, uint64_t incarnation, int pidfd, int pid,
                      int mem_fd, int allow_foreign) {
    int64_t result = AT_ENOMEM;
    at_shm *shm = calloc(1, sizeof *shm);
    if (shm == NULL) {
        close_fd(theirs->control_fd), close_fd(theirs->channel_fd), close_fd(theirs->doorbell_fd), close_fd(theirs->pulse_fd);
        close_fd(pidfd), close_fd(mem_fd);
        half_free(half);
        return AT_ENOMEM;
    }
    *shm = (at_shm){.inbound_doorbell = -1, .outbound_doorbell = theirs->doorbell_fd, .outbound_pulse = theirs->pulse_fd,
                    .pidfd = pidfd, .pid = pid, .mem_fd = mem_fd, .patience = AT_PATIENCE};
    shm->control = map_theirs(theirs->control_fd, sizeof(at_control), 0, theirs->control_cookie, offsetof(at_control, cookie));
    int refused = shm->control == NULL ? errno : EPROTO;
    shm->outbound = map_theirs(theirs->channel_fd, sizeof(at_channel), 1, theirs->channel_cookie,
                               offsetof(at_channel, cookie));
    if (shm->control != NULL && shm->outbound == NULL) refused = errno;
    close_fd(theirs->control_fd);
    close_fd(theirs->channel_fd);
    if (shm->control == NULL || shm->outbound == NULL || shm->control->incarnation != incarnation ||
        shm->outbound->owner != incarnation || shm->outbound->writer != lane->incarnation ||
        !is_eventfd(shm->outbound_doorbell) || !is_eventfd(shm->outbound_pulse)) {
        shm_free(shm);
        half_free(half);
        lane->oserror = refused;
        return refused == EPROTO ? AT_EPROTO : AT_EIO;
    }
    shm->foreign = allow_foreign ? at_shm_probe(shm, theirs->probe_va, theirs->control_cookie) : 0;
    if (!allow_foreign) shm->foreign_why = EPERM;
    at_lock(lane);
    at_peer *peer = lane->shut ? NULL : at_peer_add(lane, &at_shm_port, shm, shm->control);
    if (peer == NULL) {
        shm_free(shm);
        half_free(half);
        result = lane->shut ? AT_ESHUT : AT_ENOMEM;
    } else { /* from here on the peer owns the half */
        shm->inbound = half->inbound;
        shm->inbound_doorbell = half->doorbell_fd;
        close_fd(half->channel_fd);
        free(half);
        result = peer->id;
        shm->neighbour = pid != getpid();
        if (shm->neighbour) atomic_fetch_add(&lane->neighbours, 1);
        if (at_watch_fd(lane, shm->inbound_doorbell, AT_TAG(AT_TAG_DOORBELL, peer->index), 1) != 0 ||
            (pidfd >= 0 && at_watch_fd(lane, pidfd, AT_TAG(AT_TAG_DEATH, peer->index), 1) != 0)) {
            lane->oserror = errno;
            peer->freed = 1;
            at_peer_release(peer);
            result = AT_EIO;
        }
    }
    at_unlock(lane);
    return result;
}

int at_shm_foreign(at_lane *lane, int64_t id, int *why) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_peer *peer = at_peer_find(lane, id);
    if (peer != NULL && peer->port == &at_shm_port) {
        at_shm *shm = peer->impl;
        result = shm->foreign;
        *why = shm->foreign_why;
    }
    at_unlock(lane);
    return result;
}

static int shm_active(at_peer *peer, uint32_t slot) {
    at_shm *shm = peer->impl;
    if (peer->dead) return 0; /* its process is gone: proof enough */
    for (int i = 0; i <= AT_MOVERS; i++)
        if (atomic_load(&shm->inbound->active[i].grant) == (uint64_t)slot + 1) return 1;
    return 0;
}

static void shm_bar(at_peer *peer) {
    at_shm *shm = peer->impl;
    atomic_store(&shm->inbound->barred, 1); /* sequentially consistent: before the look at the active words */
}

static int shm_inside(at_peer *peer) {
    at_shm *shm = peer->impl;
    for (int i = 0; i <= AT_MOVERS && !peer->dead; i++)
        if (atomic_load(&shm->inbound->active[i].grant) != 0) return 1;
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
