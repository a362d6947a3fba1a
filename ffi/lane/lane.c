/* The lane itself: its birth and death, where its threads run, peers that are given up, its words for what happened. */
#ifdef __linux__
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#endif
#include "copiers.h"
#include "lane.h"
#include "threads.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CONTROL_MAGIC UINT64_C(0x4154434f4e54524c)

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
    at_belongs_here(lane);
    lane->config = *config;
    lane->incarnation = incarnation;
    lane->epoll_fd = lane->wake_fd = lane->thread_epoll_fd = lane->thread_wake_fd = lane->pulse_fd = -1;
    lane->turn_start = at_now();
    lane->copier_job = at_copier_job;
#ifdef __linux__
    lane->thread_main = at_thread_main;
#endif
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

int at_lane_pin(at_lane *lane, const int32_t *cpus, uint32_t count) {
    int rc = at_check_process(lane);
    if (rc != AT_OK) return rc;
#ifdef __linux__
    at_lock(lane);
    at_cpus_add(&lane->cpus, cpus, count);
    if (lane->thread_started) at_cpus_give(&lane->cpus, lane->thread);
    if (lane->helper_started == 1) at_cpus_give(&lane->cpus, lane->helper);
    at_copiers_pin(lane);
    at_unlock(lane);
#else
    (void)cpus, (void)count;
#endif
    return AT_OK;
}

void at_lane_shut(at_lane *lane) {
    at_lock(lane);
    lane->shut = 1;
    for (uint32_t i = 0; i < lane->op_count; i++) /* those of other threads: their waiters shall leave */
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

/* ---- what becomes of peers ---- */

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
