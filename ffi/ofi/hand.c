/* The calls into libfabric, one function for each thing that the provider does. The lock is around every one of them. */
#if __has_include(<rdma/fabric.h>) && __has_include(<rdma/fi_rma.h>)

#include "ofi.h"

#include <string.h>

#define DMABUF_SINCE (1u << 16 | 20u) /* 1.20: an older library would not look at that flag */

_Static_assert(sizeof(struct fi_context2) <= sizeof((at_fab_slot *)0)->context, "a slot is libfabric's context");

static at_ofi *of(at_fab *fab) { return (at_ofi *)fab; }
static void lock(at_ofi *ofi) { (void)pthread_mutex_lock(&ofi->lock); }
static void unlock(at_ofi *ofi) { (void)pthread_mutex_unlock(&ofi->lock); }

/* ---- ends ---- */

static int open_end(at_fab_end *end) {
    at_ofi *ofi = of(end->fab);
    struct fid_ep *ep = ofi->shared;
    if (ep == NULL) {
        lock(ofi);
        int rc = fi_endpoint(ofi->domain, ofi->info, &ep, NULL);
        if (rc == 0) rc = fi_ep_bind(ep, &ofi->av->fid, 0);
        if (rc == 0) rc = fi_ep_bind(ep, &ofi->cq->fid, FI_TRANSMIT | FI_RECV);
        if (rc == 0) rc = fi_enable(ep);
        if (rc != 0 && ep != NULL) (void)fi_close(&ep->fid);
        unlock(ofi);
        if (rc != 0) return rc;
    }
    end->ep = ep;
    return 0;
}

static void close_end(at_fab_end *end) {
    at_ofi *ofi = of(end->fab);
    struct fid_ep *ep = end->ep;
    lock(ofi);
    if (ep != ofi->shared && (!end->heard || end->troubled)) at_fab_shut_halfway(ofi, ep);
    if (ep != ofi->shared) (void)fi_close(&ep->fid);
    if (end->to != AT_FAB_NOWHERE) (void)fi_av_remove(ofi->av, &end->to, 1, 0);
    unlock(ofi);
}

static int describe(at_fab_end *end, uint8_t *address, size_t *nbytes) {
    at_ofi *ofi = of(end->fab);
    struct fid_ep *ep = end->ep;
    lock(ofi);
    int rc = fi_getname(&ep->fid, address, nbytes);
    unlock(ofi);
    return rc;
}

static int join(at_fab_end *end, const uint8_t *address, size_t nbytes) {
    at_ofi *ofi = of(end->fab);
    (void)nbytes;
    lock(ofi);
    int n = fi_av_insert(ofi->av, address, 1, &end->to, 0, NULL);
    unlock(ofi);
    return n == 1 ? 0 : n < 0 ? n : -FI_EINVAL;
}

/* ---- work requests ---- */

typedef struct {
    struct fi_rma_iov there[AT_FAB_IOV];
    struct fi_msg_rma message;
} request;

static void fill(request *out, const at_fab_end *end, at_fab_slot *slot, const at_fab_vector *v, uint64_t data) {
    for (size_t i = 0; i < v->count; i++)
        out->there[i] = (struct fi_rma_iov){.addr = v->there[i].address, .len = (size_t)v->there[i].nbytes, .key = v->there[i].key};
    out->message = (struct fi_msg_rma){.msg_iov = v->here, .desc = (void **)(uintptr_t)v->desc, .iov_count = v->count, .addr = end->to,
                                       .rma_iov = out->there, .rma_iov_count = v->count, .context = slot->context, .data = data};
}

static uint64_t confirmed(const at_fab *fab) { return FI_COMPLETION | (at_fab_is(fab, AT_FAB_DELIVERY) ? FI_DELIVERY_COMPLETE : 0); }

static int do_write(at_fab_end *end, at_fab_slot *slot, const at_fab_vector *vector, int counts, uint64_t data) {
    at_ofi *ofi = of(end->fab);
    request made;
    fill(&made, end, slot, vector, data);
    lock(ofi);
    ssize_t rc = fi_writemsg(end->ep, &made.message, confirmed(end->fab) | (counts ? FI_REMOTE_CQ_DATA : 0));
    unlock(ofi);
    return (int)rc;
}

static int do_read(at_fab_end *end, at_fab_slot *slot, const at_fab_vector *vector) {
    at_ofi *ofi = of(end->fab);
    request made;
    fill(&made, end, slot, vector, 0);
    lock(ofi);
    ssize_t rc = fi_readmsg(end->ep, &made.message, FI_COMPLETION);
    unlock(ofi);
    return (int)rc;
}

static int do_send(at_fab_end *end, at_fab_slot *slot) {
    at_ofi *ofi = of(end->fab);
    struct iovec piece = {&slot->letter, sizeof slot->letter};
    struct fi_msg message = {.msg_iov = &piece, .desc = &slot->desc, .iov_count = 1, .addr = end->to, .context = slot->context};
    lock(ofi);
    ssize_t rc = fi_sendmsg(end->ep, &message, confirmed(end->fab));
    unlock(ofi);
    return (int)rc;
}

static int do_receive(at_fab_end *end, at_fab_slot *slot) {
    at_ofi *ofi = of(end->fab);
    lock(ofi);
    ssize_t rc = fi_recv(end->ep, &slot->letter, sizeof slot->letter, slot->desc, FI_ADDR_UNSPEC, slot->context);
    unlock(ofi);
    return (int)rc;
}

/* ---- completions ---- */

/* The error queue: a zeroed entry with room to spare, since newer libraries write more. */
static int read_error(at_ofi *ofi, at_fab_done *out) {
    union {
        struct fi_cq_err_entry entry;
        uint8_t room[sizeof(struct fi_cq_err_entry) + 64];
    } error;
    memset(&error, 0, sizeof error);
    if (fi_cq_readerr(ofi->cq, &error.entry, 0) <= 0) return 0;
    int code = error.entry.err < 0 ? -error.entry.err : error.entry.err; /* 1.17's shm returns it negative */
    *out = (at_fab_done){.slot = error.entry.op_context, .error = code != 0 ? code : FI_EOTHER};
    return 1;
}

static int completions(at_fab *fab, at_fab_done *out, int room) {
    at_ofi *ofi = of(fab);
    struct fi_cq_data_entry entries[64];
    if (room > 64) room = 64;
    lock(ofi);
    ssize_t n = fi_cq_read(ofi->cq, entries, (size_t)room);
    if (n == -FI_EAVAIL) n = -read_error(ofi, out);
    unlock(ofi);
    if (n == -1) return 1;
    for (ssize_t i = 0; i < n; i++) {
        int arrived = (entries[i].flags & FI_REMOTE_WRITE) != 0; /* the only flag that says so on every provider */
        out[i] = (at_fab_done){.slot = arrived ? NULL : entries[i].op_context, .data = entries[i].data, .arrival = arrived};
    }
    return n > 0 ? (int)n : 0;
}

static int arm(at_fab *fab) {
    at_ofi *ofi = of(fab);
    struct fid *fids[1] = {&ofi->cq->fid};
    lock(ofi);
    int armed = ofi->wait != NULL ? fi_wait(ofi->wait, 0) == -FI_ETIMEDOUT : fi_trywait(ofi->fabric, fids, 1) == 0;
    unlock(ofi);
    return armed;
}

/* ---- memory ---- */

static int enroll(at_fab *fab, const at_fab_memory *memory, uint32_t rights, uint64_t key, at_fab_mr *out) {
    at_ofi *ofi = of(fab);
    uint64_t access = (rights & AT_RIGHT_WRITE ? FI_REMOTE_WRITE : 0) | (rights & AT_RIGHT_READ ? FI_REMOTE_READ : 0) |
                      (rights & AT_RIGHT_LOCAL ? FI_READ | FI_WRITE : 0) | (rights & AT_RIGHT_LETTERS ? FI_SEND | FI_RECV : 0);
    at_fab_memory usable = *memory;
    if (fab->facts.version < DMABUF_SINCE) usable.dmabuf_fd = -1;
    at_fab_attr filled;
    uint64_t flags = at_fab_attributes(&filled, &usable, access, key);
    struct fid_mr *mr = NULL;
    lock(ofi);
    int rc = fi_mr_regattr(ofi->domain, &filled.room.attr, flags, &mr);
    unlock(ofi);
    if (rc != 0) return rc;
    out->handle = mr;
    out->desc = at_fab_is(fab, AT_FAB_LOCAL_MR) || memory->cuda >= 0 ? fi_mr_desc(mr) : NULL;
    out->key = fi_mr_key(mr);
    return 0;
}

static void dismiss(at_fab *fab, void *handle) {
    at_ofi *ofi = of(fab);
    struct fid_mr *mr = handle;
    lock(ofi);
    (void)fi_close(&mr->fid);
    unlock(ofi);
}

/* ---- the end ---- */

static void close_one(struct fid *fid) {
    if (fid != NULL) (void)fi_close(fid);
}
#define CLOSE(object) close_one((object) != NULL ? &(object)->fid : NULL)

static void silence(at_fab *fab) {
    at_ofi *ofi = of(fab);
    CLOSE(ofi->shared);
    ofi->shared = NULL;
}

static void close_all(at_fab *fab) {
    at_ofi *ofi = of(fab);
    CLOSE(ofi->cq);
    CLOSE(ofi->wait);
    CLOSE(ofi->av);
    CLOSE(ofi->domain);
    CLOSE(ofi->fabric);
    if (ofi->info != NULL) at_fab_library.freeinfo(ofi->info);
    (void)pthread_mutex_destroy(&ofi->lock);
}

const at_hand at_ofi_hand = {
    .name = "fabric",
    .open_end = open_end,
    .close_end = close_end,
    .describe = describe,
    .join = join,
    .write = do_write,
    .read = do_read,
    .send = do_send,
    .receive = do_receive,
    .completions = completions,
    .arm = arm,
    .enroll = enroll,
    .dismiss = dismiss,
    .silence = silence,
    .close = close_all,
};

#endif
