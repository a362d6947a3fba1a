/* A rail: what is asked of libfabric, what it gave, and the objects that all connections share. */
#if __has_include(<rdma/fabric.h>) && __has_include(<rdma/fi_rma.h>)

#include "ofi.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define NEWEST FI_VERSION(1, 22)
#define QUEUE 16384u /* entries: more than the windows of many peers; the software queues grow beyond it */
#define SOFTWARE_POSTED 4096u
#define DEVICE_POSTED 256u /* EFA: what one NIC takes in flight (arXiv 2510.27656, table 3) */

static int is_device(const char *provider) { return strncmp(provider, "efa", 3) == 0; }

static struct fi_info *ask_for(const at_ofi_options *options, int device_memory) {
    struct fi_info *hints = at_ofi_library.dupinfo(NULL), *found = NULL;
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
    uint32_t version = at_ofi_library.version() < NEWEST ? at_ofi_library.version() : NEWEST;
    int rc = at_ofi_library.getinfo(version, device ? NULL : options->node, NULL, device || options->node == NULL ? 0 : FI_SOURCE, hints, &found);
    at_ofi_library.freeinfo(hints);
    if (rc != 0) at_fab_say("%s offers nothing fitting%s%s: %s", options->provider, options->node != NULL ? " at " : "",
                            options->node != NULL ? options->node : "", at_ofi_library.strerror(-rc));
    return rc == 0 ? found : NULL;
}

/* With memory of a GPU where it is wanted and supported. Below API 1.18 efa may not use the GPU's own way to the NIC. */
static struct fi_info *ask(const at_ofi_options *options) {
    int wanted = (options->device_memory || is_device(options->provider)) && at_ofi_library.version() >= FI_VERSION(1, 18);
    struct fi_info *found = wanted ? ask_for(options, 1) : NULL;
    return found != NULL ? found : ask_for(options, 0);
}

static uint32_t least(size_t a, size_t b) { return (uint32_t)(a < b ? a : b); }

uint32_t at_ofi_flags_of(int device, uint64_t order, size_t data_bytes, int mr_mode, uint32_t without) {
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

int at_ofi_facts_of(int device, uint64_t order, uint64_t data_bytes, int mr_mode, uint64_t most_rma, int emulated, uint32_t without,
                    at_fab_facts *out) {
    memset(out, 0, sizeof *out);
    out->flags = at_ofi_flags_of(device, order, (size_t)data_bytes, mr_mode, without);
    out->most_bytes = UINT64_MAX;
    out->most_posted = device ? DEVICE_POSTED : SOFTWARE_POSTED;
    at_ofi_device_limits(out, most_rma, emulated);
    return AT_OK;
}

static void note_facts(at_fab *fab, const at_ofi_options *options) {
    const struct fi_info *info = at_ofi_of(fab)->info;
    at_fab_facts *facts = &fab->facts;
    int device = is_device(options->provider);
    facts->flags = at_ofi_flags_of(device, info->tx_attr->msg_order, info->domain_attr->cq_data_size, info->domain_attr->mr_mode,
                                   options->without);
    if ((info->caps & FI_HMEM) && !(options->without & AT_FAB_DEVICE)) facts->flags |= AT_FAB_DEVICE;
    facts->version = at_ofi_library.version();
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
 * and the descriptor of the queue stays readable for ever. With a wait set of our own, its wait with a timeout of 0 does what it should.
 * The tables of functions are used here, because the headers of 2.x call fi_wait and fi_wait_open deprecated. */
static int open_queue_with_wait(at_ofi *ofi) {
    struct fi_wait_attr how = {.wait_obj = FI_WAIT_FD};
    int rc = ofi->fabric->ops->wait_open(ofi->fabric, &how, &ofi->wait);
    struct fi_cq_attr attr = {.size = QUEUE, .format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_SET, .wait_set = ofi->wait};
    if (rc == 0) rc = fi_cq_open(ofi->domain, &attr, &ofi->cq, NULL);
    if (rc == 0 && fi_control(&ofi->wait->fid, FI_GETWAIT, &ofi->fab.fd) == 0) return 0;
    if (ofi->cq != NULL) (void)fi_close(&ofi->cq->fid);
    if (ofi->wait != NULL) (void)fi_close(&ofi->wait->fid);
    ofi->cq = NULL;
    ofi->wait = NULL;
    ofi->fab.fd = -1;
    return -1;
}

static int open_queue(at_ofi *ofi) {
    struct fi_cq_attr attr = {.size = QUEUE, .format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_FD};
    ofi->fab.fd = -1;
    int old = strcmp(ofi->fab.facts.provider, "net") == 0 || strcmp(ofi->fab.facts.provider, "tcp") == 0;
    if (old && FI_MAJOR(ofi->fab.facts.version) < 2 && at_fab_is(&ofi->fab, AT_FAB_FD) && open_queue_with_wait(ofi) == 0) return 0;
    int rc = at_fab_is(&ofi->fab, AT_FAB_FD) ? fi_cq_open(ofi->domain, &attr, &ofi->cq, NULL) : -FI_ENOSYS;
    if (rc == 0 && fi_control(&ofi->cq->fid, FI_GETWAIT, &ofi->fab.fd) == 0) return 0;
    if (rc == 0) (void)fi_close(&ofi->cq->fid);
    ofi->fab.fd = -1;
    ofi->fab.facts.flags &= ~(uint32_t)AT_FAB_FD;
    attr.wait_obj = FI_WAIT_NONE;
    return fi_cq_open(ofi->domain, &attr, &ofi->cq, NULL);
}

static int open_shared(at_ofi *ofi, int device) {
    struct fid_ep *ep = NULL;
    int rc = fi_endpoint(ofi->domain, ofi->info, &ep, NULL);
    ofi->fab.shared = ep;
    if (rc == 0 && device) at_ofi_device_prepare(ep);
    if (rc == 0) rc = fi_ep_bind(ep, &ofi->av->fid, 0);
    if (rc == 0) rc = fi_ep_bind(ep, &ofi->cq->fid, FI_TRANSMIT | FI_RECV);
    if (rc == 0) rc = fi_enable(ep);
    if (rc == 0 && device) at_ofi_device_ask(ep, &ofi->fab.facts);
    return rc;
}

static void close_one(struct fid *fid) {
    if (fid != NULL) (void)fi_close(fid);
}
#define CLOSE(object) close_one((object) != NULL ? &(object)->fid : NULL)

void at_ofi_free(at_fab *fab) {
    at_ofi *ofi = at_ofi_of(fab);
    CLOSE(ofi->cq);
    CLOSE(ofi->wait);
    CLOSE(ofi->av);
    CLOSE(ofi->domain);
    CLOSE(ofi->fabric);
    if (ofi->info != NULL) at_ofi_library.freeinfo(ofi->info);
    free(ofi);
}

static const char *open_objects(at_ofi *ofi, int device, int *rc) {
    struct fi_av_attr av = {.type = FI_AV_TABLE};
    if ((*rc = at_ofi_library.fabric(ofi->info->fabric_attr, &ofi->fabric, NULL)) != 0) return "fabric";
    if ((*rc = fi_domain(ofi->fabric, ofi->info, &ofi->domain, NULL)) != 0) return "domain";
    if ((*rc = fi_av_open(ofi->domain, &av, &ofi->av, NULL)) != 0) return "address vector";
    if ((*rc = open_queue(ofi)) != 0) return "completion queue";
    if (!at_fab_is(&ofi->fab, AT_FAB_PRIVATE) && (*rc = open_shared(ofi, device)) != 0) return "endpoint";
    return NULL;
}

int at_ofi_open(at_lane *lane, const at_ofi_options *options, at_fab **out, at_fab_facts *facts) {
    if (at_ofi_library.getinfo == NULL) {
        at_fab_say("libfabric is not loaded");
        return AT_EIO;
    }
    at_ofi *ofi = calloc(1, sizeof *ofi);
    if (ofi == NULL) return AT_ENOMEM;
    at_fab *fab = &ofi->fab;
    int rc = at_fab_prepare(fab, lane, &at_ofi_driver), code = rc == AT_OK ? 0 : -EMFILE;
    if (rc == AT_OK && (ofi->info = ask(options)) == NULL) {
        code = -EIO;
        rc = AT_EIO;
    }
    if (rc == AT_OK) {
        note_facts(fab, options);
        ofi->first_port = ofi->next_port = options->first_port;
        ofi->last_port = options->last_port;
        const char *what = open_objects(ofi, is_device(options->provider), &code);
        if (what != NULL) {
            at_fab_say("%s: no %s: %s", options->provider, what, at_ofi_library.strerror(-code));
            rc = AT_EIO;
        }
    }
    if (rc == AT_OK) rc = at_fab_begin(fab, options->provider);
    if (rc != AT_OK) {
        at_fab_undo(fab, rc == AT_EIO ? -code : 0);
        return rc;
    }
    *facts = fab->facts;
    *out = fab;
    return AT_OK;
}

#endif
