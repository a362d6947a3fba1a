/* The lane itself: its birth and death, its peers, its words for what happened. */
#ifdef __linux__
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#endif
#include "lane.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define CONTROL_MAGIC UINT64_C(0x4154434f4e54524c)

/* A forked child inherits lanes whose threads are gone and whose shared words belong to the parent: every lane remembers
 * the generation it was made in and refuses work in any other. */
static uint32_t fork_generation;
static void forked(void) { fork_generation++; }
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static void fork_hook(void) { (void)pthread_atfork(NULL, NULL, forked); }

void at_lock(at_lane *lane) { (void)pthread_mutex_lock(&lane->lock); }
void at_unlock(at_lane *lane) { (void)pthread_mutex_unlock(&lane->lock); }

uint64_t at_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int at_is_forked(const at_lane *lane) { return lane->fork_generation != fork_generation; }

int at_check_owner(const at_lane *lane) {
    if (lane == NULL) return AT_ESHUT; /* freed: its engine has forgotten it */
    if (lane->fork_generation != fork_generation) return AT_EFORK;
    if (!pthread_equal(lane->owner, pthread_self())) return AT_ETHREAD;
    return lane->shut ? AT_ESHUT : AT_OK;
}

int at_check_process(const at_lane *lane) {
    if (lane == NULL) return AT_ESHUT;
    return lane->fork_generation != fork_generation ? AT_EFORK : lane->shut ? AT_ESHUT : AT_OK;
}

/* Others map this segment read-only (F_SEAL_FUTURE_WRITE keeps our own mapping writable). */
static at_control *control_new(int *fd_out) {
#ifdef __linux__
    int fd = memfd_create("aiotransfer-control", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return NULL;
    if (ftruncate(fd, (off_t)sizeof(at_control)) != 0) goto fail;
    at_control *control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (control == MAP_FAILED) goto fail;
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) != 0) {
        munmap(control, sizeof *control);
        goto fail;
    }
    *fd_out = fd;
    return control;
fail:;
    int saved = errno;
    close(fd);
    errno = saved;
    return NULL;
#else
    at_control *control = aligned_alloc(64, sizeof *control);
    if (control != NULL) memset(control, 0, sizeof *control);
    return control;
#endif
}

static at_control_ref *control_ref_new(void) {
    at_control_ref *ref = calloc(1, sizeof *ref);
    if (ref == NULL) return NULL;
    ref->fd = -1;
    ref->users = 1;
    ref->memory = control_new(&ref->fd);
    if (ref->memory != NULL) return ref;
    free(ref);
    return NULL;
}

void at_control_release(at_control_ref *ref) {
    if (ref == NULL || atomic_fetch_sub(&ref->users, 1) != 1) return;
#ifdef __linux__
    munmap(ref->memory, sizeof *ref->memory);
    if (ref->fd >= 0) close(ref->fd);
#else
    free(ref->memory);
#endif
    free(ref);
}

void at_lane_destroy(at_lane *lane) {
    at_control_release(lane->control_ref);
    at_imm_destroy(lane);
    for (uint32_t i = 0; i < lane->region_count; i++) {
        free(lane->regions[i]->there);
        free(lane->regions[i]);
    }
    for (uint32_t i = 0; i < lane->remote_count; i++) {
        free(lane->remotes[i]->parts);
        free(lane->remotes[i]);
    }
    for (uint32_t i = 0; i < lane->op_count; i++) {
        if (lane->ops[i] == NULL) continue;
        free(lane->ops[i]->table);
        free(lane->ops[i]->batch);
        free(lane->ops[i]);
    }
    free(lane->regions);
    free(lane->remotes);
    free(lane->peers);
    free(lane->ops);
    free(lane->op_generation);
    at_ops_close(lane);
    free(lane->op_free);
    free(lane->grant_free);
    free(lane->queue);
    free(lane->watches);
    at_events_close(lane);
    (void)pthread_cond_destroy(&lane->ended);
    (void)pthread_cond_destroy(&lane->help);
    (void)pthread_mutex_destroy(&lane->lock);
    free(lane);
}

static int usable_cores(void) {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

at_lane *at_lane_new(uint64_t incarnation, const at_lane_config *config) {
    (void)pthread_once(&fork_once, fork_hook);
    at_lane *lane = calloc(1, sizeof *lane);
    if (lane == NULL) return NULL;
    (void)pthread_mutex_init(&lane->lock, NULL);
    pthread_condattr_t monotonic;
    (void)pthread_condattr_init(&monotonic);
#ifdef __linux__
    (void)pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
#endif
    (void)pthread_cond_init(&lane->ended, &monotonic);
    (void)pthread_cond_init(&lane->help, NULL);
    (void)pthread_condattr_destroy(&monotonic);
    lane->owner = pthread_self();
    lane->fork_generation = fork_generation;
    lane->config = *config;
    lane->incarnation = incarnation;
    lane->epoll_fd = lane->wake_fd = lane->thread_epoll_fd = lane->thread_wake_fd = lane->pulse_fd = -1;
    lane->turn_start = at_now();
    lane->cores = usable_cores();
    lane->control_ref = control_ref_new();
    lane->grant_free = calloc(AT_GRANTS, sizeof *lane->grant_free);
    if (lane->control_ref == NULL || lane->grant_free == NULL || at_imm_init(lane) != AT_OK || at_events_open(lane) != 0) {
        int saved = errno ? errno : ENOMEM;
        at_lane_destroy(lane);
        errno = saved;
        return NULL;
    }
    lane->control = lane->control_ref->memory;
    lane->control->magic = CONTROL_MAGIC;
    lane->control->incarnation = incarnation;
    return lane;
}

void at_lane_shut(at_lane *lane) {
    at_lock(lane);
    lane->shut = 1;
    for (uint32_t i = 0; i < lane->op_count; i++) /* those of other threads: whoever waits for them shall leave */
        if (lane->ops[i] != NULL && lane->ops[i]->detached) at_op_stop(lane->ops[i], AT_ESHUT);
    at_unlock(lane);
}

int64_t at_lane_detail(at_lane *lane) {
    at_lock(lane);
    int64_t detail = lane->detail;
    at_unlock(lane);
    return detail;
}

int at_lane_errno(at_lane *lane) {
    at_lock(lane); /* the native thread writes it too */
    int oserror = lane->oserror;
    at_unlock(lane);
    return oserror;
}

void at_lane_stats_get(at_lane *lane, at_lane_stats *out) {
    at_lock(lane);
    *out = lane->stats;
    at_unlock(lane);
}

int at_grow(void ***items, uint32_t *capacity, uint32_t count) {
    if (count < *capacity) return 0;
    uint32_t next = *capacity ? *capacity * 2 : 16;
    void **more = realloc(*items, next * sizeof *more);
    if (more == NULL) return AT_ENOMEM;
    memset(more + *capacity, 0, (next - *capacity) * sizeof *more);
    *items = more;
    *capacity = next;
    return 0;
}

int64_t at_make_id(uint32_t generation, uint32_t index) {
    return (int64_t)(((uint64_t)generation << 32) | index); /* at most AT_MOST_LIVES */
}

/* ---- peers ---- */

at_peer *at_peer_add(at_lane *lane, const at_port *port, void *impl, const at_control *control) {
    uint32_t index = 0;
    while (index < lane->peer_count && lane->peers[index] != NULL) index++;
    if (index >> AT_PEER_BITS != 0 || lane->peer_serial >= (UINT64_C(1) << (63 - AT_PEER_BITS)) - 1) return NULL;
    if (at_grow((void ***)&lane->peers, &lane->peer_capacity, index) != 0) return NULL;
    at_peer *peer = calloc(1, sizeof *peer);
    if (peer == NULL) return NULL;
    peer->lane = lane;
    peer->port = port;
    peer->impl = impl;
    peer->index = index;
    peer->id = (int64_t)(++lane->peer_serial << AT_PEER_BITS | index); /* slots are reused, ids are not */
    peer->users = 1;
    peer->control = control;
    lane->peers[index] = peer;
    if (index == lane->peer_count) lane->peer_count++;
    lane->stats.peers++;
    return peer;
}

void at_rail_add(at_lane *lane, at_rail *rail) {
    rail->lane = lane;
    rail->next = lane->rails;
    lane->rails = rail;
}

void at_rails_progress(at_rail *first, int turn) {
    for (at_rail *rail = first; rail != NULL; rail = rail->next) rail->progress(rail, turn);
}

at_peer *at_peer_find(at_lane *lane, int64_t id) {
    uint32_t index = (uint32_t)id & ((1u << AT_PEER_BITS) - 1u);
    if (id < 0 || index >= lane->peer_count) return NULL;
    at_peer *peer = lane->peers[index];
    return peer != NULL && peer->id == id && !peer->freed ? peer : NULL;
}

void at_peer_release(at_peer *peer) {
    at_lane *lane = peer->lane;
    if (--peer->users != 0) return;
    lane->peers[peer->index] = NULL;
    lane->stats.peers--;
    peer->port->destroy(peer);
    free(peer);
}

void at_peer_broke(at_peer *peer) {
    if (peer->broke) return;
    peer->broke = 1;
    at_event_push(peer->lane, AT_EV_PEER, (uint64_t)peer->id, AT_EPROTO, 0);
}

void at_peers_reap(at_lane *lane) {
    for (uint32_t i = 0; i < lane->peer_count && lane->lingering != 0; i++) {
        at_peer *peer = lane->peers[i];
        if (peer == NULL || !peer->lingers || peer->port->inside(peer)) continue;
        peer->lingers = 0;
        lane->lingering--;
        at_peer_release(peer);
    }
}

int at_peer_fail(at_lane *lane, int64_t id, int status) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_peer *peer = at_peer_find(lane, id);
    if (peer != NULL) {
        at_peer_end(peer, status);
        result = AT_OK;
    }
    at_unlock(lane);
    return result;
}

int at_peer_free(at_lane *lane, int64_t id) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_wait_here(lane);
    at_peer *peer = at_peer_find(lane, id);
    if (peer != NULL) {
        at_peer_end(peer, AT_EPEER);
        peer->port->drain(peer); /* what it had counted before it went is still ours */
        peer->freed = peer->broke = 1;
        at_imm_departed(peer);
        if (peer->port->inside != NULL && peer->port->inside(peer)) {
            peer->lingers = 1;
            lane->lingering++;
        } else {
            at_peer_release(peer);
        }
        result = AT_OK;
    }
    at_unlock(lane);
    return result;
}

int at_peer_ping(at_lane *lane, int64_t id) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_peer *peer = at_peer_find(lane, id);
    if (peer != NULL) {
        peer->port->ping(peer, ++peer->ping);
        result = AT_OK;
    }
    at_unlock(lane);
    return result;
}

int at_peer_pong(at_lane *lane, int64_t id, uint64_t *sent, uint64_t *native, uint64_t *loop) {
    int result = AT_EUNKNOWN;
    at_lock(lane);
    at_peer *peer = at_peer_find(lane, id);
    if (peer != NULL) {
        *sent = peer->ping;
        peer->port->pong(peer, native, loop);
        result = AT_OK;
    }
    at_unlock(lane);
    return result;
}

int64_t at_peer_queued(at_lane *lane, int64_t id) {
    at_lock(lane);
    at_peer *peer = at_peer_find(lane, id);
    int64_t count = peer != NULL ? (int64_t)peer->queued_ops : AT_EUNKNOWN;
    at_unlock(lane);
    return count;
}

const char *at_version(void) {
#ifdef AT_VERSION
    return AT_VERSION;
#else
    return "unversioned";
#endif
}

const char *at_strerror(int status) {
    switch (status) {
    case AT_OK: return "ok";
    case AT_ESRC: return "outside the local region";
    case AT_EDST: return "outside the remote region";
    case AT_ECLOSED: return "local region closed";
    case AT_ESTALE: return "remote region revoked or of an older incarnation";
    case AT_EPEER: return "peer lost or closed";
    case AT_EGRANT: return "access not granted";
    case AT_EBUSY: return "too much queued";
    case AT_EFORK: return "forked child";
    case AT_ETHREAD: return "another thread";
    case AT_ENOMEM: return "out of memory";
    case AT_ESHUT: return "closed";
    case AT_ESIZE: return "sizes make no sense";
    case AT_EINDEX_SRC: return "source page outside the local region";
    case AT_EINDEX_DST: return "destination page outside the remote region";
    case AT_ECANCELED: return "cancelled";
    case AT_ETIMEOUT: return "deadline passed";
    case AT_EIO: return "refused by the operating system";
    case AT_EIMM: return "immediate out of range";
    case AT_EOVERFLOW: return "too many early values";
    case AT_EUNKNOWN: return "unknown";
    case AT_ERAIL: return "rail broken";
    case AT_EDEVICE: return "this path does not take memory of a GPU";
    case AT_EFILE: return "this path does not lend a mapping of a file";
    case AT_EMEMORY: return "the local memory is not there any more";
    case AT_EPROTO: return "peer broke the protocol";
    default: return "unknown status";
    }
}
