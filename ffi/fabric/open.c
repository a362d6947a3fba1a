/* A rail: what is asked of libfabric, what it gave, and the objects that all ends share. */
#if __has_include(<rdma/fabric.h>) && __has_include(<rdma/fi_rma.h>)

#include "fabric.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define NEWEST FI_VERSION(1, 22)
#define QUEUE 16384u /* entries: more than the windows of many peers; the software queues grow beyond it */
#define SOFTWARE_POSTED 4096u
#define DEVICE_POSTED 256u /* EFA: what one NIC takes in flight (arXiv 2510.27656, table 3) */

static int is_device(const char *provider) { return strncmp(provider, "efa", 3) == 0; }

static struct fi_info *ask_for(const at_fab_options *options, int device_memory) {
    struct fi_info *hints = at_fab_library.dupinfo(NULL), *found = NULL;
    if (hints == NULL) {
        at_fab_say("no memory");
        return NULL;
    }
    int device = is_device(options->provider);
    hints->caps = FI_MSG | FI_RMA | FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE | FI_SEND | FI_RECV;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
    if (device_memory) {
        hints->caps |= FI_HMEM;
        hints->domain_attr->mr_mode |= FI_MR_HMEM;
    }
    hints->domain_attr->cq_data_size = 4;
    hints->domain_attr->threading = FI_THREAD_DOMAIN; /* fab->lock is around every call */
    if (!device) { /* with MANUAL, 1.17's queue says nothing of connections that come in */
        hints->domain_attr->data_progress = FI_PROGRESS_AUTO;
        hints->tx_attr->msg_order = FI_ORDER_WAW;
        hints->rx_attr->msg_order = FI_ORDER_WAW;
    }
    hints->fabric_attr->prov_name = strdup(options->provider);
    if (options->fabric != NULL) hints->fabric_attr->name = strdup(options->fabric);
    uint32_t version = at_fab_library.version() < NEWEST ? at_fab_library.version() : NEWEST;
    int rc = at_fab_library.getinfo(version, device ? NULL : options->node, NULL, device || options->node == NULL ? 0 : FI_SOURCE, hints, &found);
    at_fab_library.freeinfo(hints);
    if (rc != 0) at_fab_say("%s offers nothing fitting%s%s: %s", options->provider, options->node != NULL ? " at " : "",
                            options->node != NULL ? options->node : "", at_fab_library.strerror(-rc));
    return rc == 0 ? found : NULL;
}

/* With memory of a GPU where it is wanted and to be had. Below API 1.18 efa may not use the GPU's own way to the NIC. */
static struct fi_info *ask(const at_fab_options *options) {
    int wanted = (options->device_memory || is_device(options->provider)) && at_fab_library.version() >= FI_VERSION(1, 18);
    struct fi_info *found = wanted ? ask_for(options, 1) : NULL;
    return found != NULL ? found : ask_for(options, 0);
}

static uint32_t least(size_t a, size_t b) { return (uint32_t)(a < b ? a : b); }

uint32_t at_fab_flags_of(int device, uint64_t order, size_t data_bytes, int mr_mode, uint32_t without) {
    uint32_t flags = AT_FAB_FD | (device ? 0u : (uint32_t)(AT_FAB_DELIVERY | AT_FAB_PRIVATE));
    if (order & FI_ORDER_WAW) flags |= AT_FAB_ORDERED;
    if (data_bytes >= 8) flags |= AT_FAB_MARKS;
    if (mr_mode & FI_MR_LOCAL) flags |= AT_FAB_LOCAL_MR;
    if (mr_mode & FI_MR_VIRT_ADDR) flags |= AT_FAB_VIRTUAL;
    if (mr_mode & FI_MR_PROV_KEY) flags |= AT_FAB_KEYS;
    flags &= ~(without & (uint32_t)(AT_FAB_ORDERED | AT_FAB_MARKS | AT_FAB_PRIVATE | AT_FAB_FD));
    if (without & AT_FAB_LOCAL_MR) flags |= AT_FAB_LOCAL_MR; /* to do without unregistered memory */
    return flags;
}

int at_fab_facts_of(int device, uint64_t order, uint64_t data_bytes, int mr_mode, uint64_t most_rma, int emulated, uint32_t without,
                    at_fab_facts *out) {
    memset(out, 0, sizeof *out);
    out->flags = at_fab_flags_of(device, order, (size_t)data_bytes, mr_mode, without);
    out->most_bytes = UINT64_MAX;
    out->most_posted = device ? DEVICE_POSTED : SOFTWARE_POSTED;
    at_fab_device_limits(out, most_rma, emulated);
    return AT_OK;
}

static void note_facts(at_fab *fab, const at_fab_options *options) {
    const struct fi_info *info = fab->info;
    at_fab_facts *facts = &fab->facts;
    int device = is_device(options->provider);
    facts->flags = at_fab_flags_of(device, info->tx_attr->msg_order, info->domain_attr->cq_data_size, info->domain_attr->mr_mode,
                                   options->without);
    if ((info->caps & FI_HMEM) && !(options->without & AT_FAB_DEVICE)) facts->flags |= AT_FAB_DEVICE;
    facts->version = at_fab_library.version();
    facts->iov = least(AT_FAB_IOV, least(info->tx_attr->iov_limit, info->tx_attr->rma_iov_limit));
    if (facts->iov == 0) facts->iov = 1;
    uint64_t most = info->ep_attr->max_msg_size;
    if (options->most_bytes != 0 && options->most_bytes < most) most = options->most_bytes;
    facts->most_bytes = most;
    facts->most_posted = options->most_posted != 0 ? options->most_posted : device ? DEVICE_POSTED : SOFTWARE_POSTED;
    (void)strncpy(facts->provider, info->fabric_attr->prov_name, sizeof facts->provider - 1);
    (void)strncpy(facts->fabric, info->fabric_attr->name != NULL ? info->fabric_attr->name : "", sizeof facts->fabric - 1);
    (void)strncpy(facts->domain, info->domain_attr->name != NULL ? info->domain_attr->name : "", sizeof facts->domain - 1);
}

/* The fi_trywait of net, before it became the tcp of 2.0, does nothing at all: the signal that a completion sets is never taken back,
 * and the descriptor of the queue stays readable for ever. With a wait set of our own, fi_wait with no patience does what it should. */
static int open_queue_with_wait(at_fab *fab) {
    struct fi_wait_attr how = {.wait_obj = FI_WAIT_FD};
    int rc = fi_wait_open(fab->fabric, &how, &fab->wait);
    struct fi_cq_attr attr = {.size = QUEUE, .format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_SET, .wait_set = fab->wait};
    if (rc == 0) rc = fi_cq_open(fab->domain, &attr, &fab->cq, NULL);
    if (rc == 0 && fi_control(&fab->wait->fid, FI_GETWAIT, &fab->fd) == 0) return 0;
    if (fab->cq != NULL) (void)fi_close(&fab->cq->fid);
    if (fab->wait != NULL) (void)fi_close(&fab->wait->fid);
    fab->cq = NULL;
    fab->wait = NULL;
    fab->fd = -1;
    return -1;
}

static int open_queue(at_fab *fab) {
    struct fi_cq_attr attr = {.size = QUEUE, .format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_FD};
    fab->fd = -1;
    int old = strcmp(fab->facts.provider, "net") == 0 || strcmp(fab->facts.provider, "tcp") == 0;
    if (old && FI_MAJOR(fab->facts.version) < 2 && at_fab_is(fab, AT_FAB_FD) && open_queue_with_wait(fab) == 0) return 0;
    int rc = at_fab_is(fab, AT_FAB_FD) ? fi_cq_open(fab->domain, &attr, &fab->cq, NULL) : -FI_ENOSYS;
    if (rc == 0 && fi_control(&fab->cq->fid, FI_GETWAIT, &fab->fd) == 0) return 0;
    if (rc == 0) (void)fi_close(&fab->cq->fid);
    fab->fd = -1;
    fab->facts.flags &= ~(uint32_t)AT_FAB_FD;
    attr.wait_obj = FI_WAIT_NONE;
    return fi_cq_open(fab->domain, &attr, &fab->cq, NULL);
}

static int open_shared(at_fab *fab, int device) {
    int rc = fi_endpoint(fab->domain, fab->info, &fab->shared, NULL);
    if (rc == 0 && device) at_fab_device_prepare(fab->shared);
    if (rc == 0) rc = fi_ep_bind(fab->shared, &fab->av->fid, 0);
    if (rc == 0) rc = fi_ep_bind(fab->shared, &fab->cq->fid, FI_TRANSMIT | FI_RECV);
    if (rc == 0) rc = fi_enable(fab->shared);
    if (rc == 0 && device) at_fab_device_ask(fab->shared, &fab->facts);
    return rc;
}

static void close_one(struct fid *fid) {
    if (fid != NULL) (void)fi_close(fid);
}
#define CLOSE(object) close_one((object) != NULL ? &(object)->fid : NULL)

static void fab_free(at_fab *fab) {
    CLOSE(fab->shared);
    at_fab_memory_close(fab);
    at_fab_slots_close(fab);
    CLOSE(fab->cq);
    CLOSE(fab->wait);
    CLOSE(fab->av);
    CLOSE(fab->domain);
    CLOSE(fab->fabric);
    if (fab->info != NULL) at_fab_library.freeinfo(fab->info);
    if (fab->kick_fd >= 0) close(fab->kick_fd);
    (void)pthread_mutex_destroy(&fab->turn);
    (void)pthread_mutex_destroy(&fab->lock);
    free(fab->ends);
    free(fab);
}

static void leave(at_rail *rail) {
    at_fab *fab = (at_fab *)rail;
    at_fab_thread_stop(fab);
    if (fab->fd >= 0) at_unwatch_fd(rail->lane, fab->fd);
}

static void destroy(at_rail *rail) { fab_free((at_fab *)rail); }

static const char *open_objects(at_fab *fab, int device, int *rc) {
    struct fi_av_attr av = {.type = FI_AV_TABLE};
    if ((*rc = at_fab_library.fabric(fab->info->fabric_attr, &fab->fabric, NULL)) != 0) return "fabric";
    if ((*rc = fi_domain(fab->fabric, fab->info, &fab->domain, NULL)) != 0) return "domain";
    if ((*rc = fi_av_open(fab->domain, &av, &fab->av, NULL)) != 0) return "address vector";
    if ((*rc = open_queue(fab)) != 0) return "completion queue";
    if (!at_fab_is(fab, AT_FAB_PRIVATE) && (*rc = open_shared(fab, device)) != 0) return "endpoint";
    return NULL;
}

int at_fab_open(at_lane *lane, const at_fab_options *options, at_fab **out, at_fab_facts *facts) {
    if (at_fab_library.getinfo == NULL) {
        at_fab_say("libfabric is not loaded");
        return AT_EIO;
    }
    at_fab *fab = calloc(1, sizeof *fab);
    if (fab == NULL) return AT_ENOMEM;
    (void)pthread_mutex_init(&fab->turn, NULL);
    (void)pthread_mutex_init(&fab->lock, NULL);
    fab->fd = -1;
    fab->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    fab->rail = (at_rail){.lane = lane, .name = "fabric", .progress = at_fab_progress, .leave = leave, .destroy = destroy, .drain = at_fab_drain_now,
                          .grant_over = at_fab_grant_over, .region_over = at_fab_region_over};
    fab->info = ask(options);
    int rc = fab->info != NULL ? AT_OK : AT_EIO, code = fab->info != NULL ? 0 : -EIO;
    if (rc == AT_OK && fab->kick_fd < 0) {
        code = -EMFILE;
        at_fab_say("%s: no descriptor to wake its thread by: %s", options->provider, at_fab_library.strerror(EMFILE));
        rc = AT_EIO;
    }
    if (rc == AT_OK) {
        note_facts(fab, options);
        const char *what = open_objects(fab, is_device(options->provider), &code);
        if (what != NULL) {
            at_fab_say("%s: no %s: %s", options->provider, what, at_fab_library.strerror(-code));
            rc = AT_EIO;
        }
    }
    if (rc == AT_OK) {
        at_lock(lane);
        rc = lane->shut ? AT_ESHUT : at_fab_register_host(fab, fab->mailbox, sizeof fab->mailbox, FI_REMOTE_WRITE | FI_WRITE, &fab->mailbox_mr);
        if (rc == AT_EIO) at_fab_say("%s: no memory region: %s", options->provider, at_fab_library.strerror(lane->oserror));
        if (rc == AT_OK) {
            fab->mailbox_desc = at_fab_is(fab, AT_FAB_LOCAL_MR) ? fi_mr_desc(fab->mailbox_mr.mr) : NULL;
            if (fab->fd >= 0 && at_watch_fd(lane, fab->fd, AT_TAG(AT_TAG_RAIL, 0), 0) != 0) {
                at_fab_say("the descriptor of the completion queue cannot be watched");
                rc = AT_EIO;
            }
        }
        if (rc == AT_OK) at_rail_add(lane, &fab->rail);
        at_unlock(lane);
    }
    if (rc != AT_OK) {
        at_lock(lane);
        if (rc == AT_EIO && code != 0) lane->oserror = -code;
        at_unlock(lane);
        fab_free(fab);
        return rc;
    }
    *facts = fab->facts;
    *out = fab;
    return AT_OK;
}

#endif
