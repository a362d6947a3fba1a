/* libfabric as a driver: each call of at_fab_driver in its words. */
#if __has_include(<rdma/fabric.h>) && __has_include(<rdma/fi_rma.h>)

#include "ofi.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>

#define DMABUF_SINCE (1u << 16 | 20u) /* 1.20: an older library would not look at that flag */

static struct fid_ep *endpoint(const at_fab_conn *conn) { return conn->ep; }

static int open_one(at_fab_conn *conn) {
    at_ofi *ofi = at_ofi_of(conn->fab);
    struct fid_ep *ep = NULL;
    int first = at_ofi_first_free(conn->fab);
    int rc = fi_endpoint(ofi->domain, ofi->info, &ep, NULL);
    if (rc == 0) rc = fi_ep_bind(ep, &ofi->av->fid, 0);
    if (rc == 0) rc = fi_ep_bind(ep, &ofi->cq->fid, FI_TRANSMIT | FI_RECV);
    if (rc == 0) rc = fi_enable(ep);
    if (rc != 0 && ep != NULL) (void)fi_close(&ep->fid);
    if (rc == 0) {
        conn->door = at_ofi_defer(ep, first);
        conn->first = first;
        conn->alone = 0;
        conn->ep = ep;
    }
    return -rc;
}

/* Where the port stands in the rail's own address; NULL: it has none. With fab->lock, as the rail's other endpoints read it too. */
static in_port_t *port_of(const struct fi_info *info) {
    struct sockaddr *at = info->src_addr;
    if (at == NULL) return NULL;
    if (at->sa_family == AF_INET && info->src_addrlen >= sizeof(struct sockaddr_in)) return &((struct sockaddr_in *)(void *)at)->sin_port;
    if (at->sa_family == AF_INET6 && info->src_addrlen >= sizeof(struct sockaddr_in6)) return &((struct sockaddr_in6 *)(void *)at)->sin6_port;
    return NULL;
}

/* An endpoint at the first port of the range that is free, beginning behind the one that was taken last: a port that has just been
 * given up is the last that is taken again. */
static int open_in_range(at_fab_conn *conn) {
    at_ofi *ofi = at_ofi_of(conn->fab);
    in_port_t *port = port_of(ofi->info);
    if (port == NULL) return EADDRNOTAVAIL;
    int rc = EADDRINUSE;
    for (uint32_t tries = (uint32_t)ofi->last_port - ofi->first_port + 1; tries > 0 && rc == EADDRINUSE; tries--) {
        *port = htons(ofi->next_port);
        ofi->next_port = ofi->next_port == ofi->last_port ? ofi->first_port : (uint16_t)(ofi->next_port + 1);
        rc = open_one(conn);
    }
    return rc;
}

static int ofi_open(at_fab_conn *conn) {
    conn->to = FI_ADDR_UNSPEC;
    return at_ofi_of(conn->fab)->first_port != 0 ? open_in_range(conn) : open_one(conn);
}

static void ofi_close(at_fab_conn *conn) {
    at_fab *fab = conn->fab;
    if (conn->ep != fab->shared && (!conn->heard || conn->troubled)) at_ofi_shut_half_open(fab, endpoint(conn));
    if (conn->ep != fab->shared) (void)fi_close(&endpoint(conn)->fid);
    fi_addr_t to = conn->to;
    if (to != FI_ADDR_UNSPEC) (void)fi_av_remove(at_ofi_of(fab)->av, &to, 1, 0);
    conn->ep = NULL;
    conn->to = FI_ADDR_UNSPEC;
}

static void ofi_settle(at_fab_conn *conn) {
    if (conn->ep != conn->fab->shared && !conn->alone) conn->alone = conn->door >= 0 && at_ofi_shut_door(conn) == 0;
}

static int ofi_name(at_fab_conn *conn, at_fab_offer *out) {
    size_t n = sizeof out->address;
    int rc = fi_getname(&endpoint(conn)->fid, out->address, &n);
    out->address_bytes = (uint32_t)n;
    return -rc;
}

static int ofi_join(at_fab_conn *conn, const at_fab_offer *theirs) {
    fi_addr_t to = FI_ADDR_UNSPEC;
    int n = fi_av_insert(at_ofi_of(conn->fab)->av, theirs->address, 1, &to, 0, NULL);
    conn->to = n == 1 ? to : FI_ADDR_UNSPEC;
    return n == 1 ? 0 : n < 0 ? -n : EINVAL;
}

static int ofi_receive(at_fab_conn *conn, at_fab_wr *wr) {
    return (int)-fi_recv(endpoint(conn), &wr->ctrl, sizeof wr->ctrl, wr->desc, FI_ADDR_UNSPEC, wr->context);
}

static int ofi_send(at_fab_conn *conn, at_fab_wr *wr) {
    struct iovec piece = {&wr->ctrl, sizeof wr->ctrl};
    struct fi_msg message = {.msg_iov = &piece, .desc = &wr->desc, .iov_count = 1, .addr = conn->to, .context = wr->context};
    return (int)-fi_sendmsg(endpoint(conn), &message, FI_COMPLETION | (at_fab_is(conn->fab, AT_FAB_DELIVERY) ? FI_DELIVERY_COMPLETE : 0));
}

static int ofi_post(at_fab_conn *conn, at_fab_wr *wr, const at_fab_vector *v, int read, int counts, uint64_t data) {
    struct iovec here[AT_FAB_IOV];
    struct fi_rma_iov there[AT_FAB_IOV];
    void *desc[AT_FAB_IOV];
    for (uint32_t i = 0; i < v->count; i++) {
        here[i] = (struct iovec){v->here[i], (size_t)v->nbytes[i]};
        there[i] = (struct fi_rma_iov){.addr = v->there[i], .len = (size_t)v->nbytes[i], .key = v->key};
        desc[i] = v->desc;
    }
    struct fi_msg_rma message = {.msg_iov = here, .desc = desc, .iov_count = v->count, .addr = conn->to, .rma_iov = there,
                                 .rma_iov_count = v->count, .context = wr->context, .data = data};
    if (read) return (int)-fi_readmsg(endpoint(conn), &message, FI_COMPLETION);
    uint64_t flags = FI_COMPLETION | (at_fab_is(conn->fab, AT_FAB_DELIVERY) ? FI_DELIVERY_COMPLETE : 0) | (counts ? FI_REMOTE_CQ_DATA : 0);
    return (int)-fi_writemsg(endpoint(conn), &message, flags);
}

/* The error queue: a zeroed entry with room to spare, since newer libraries write more. */
static int read_error(at_ofi *ofi, at_fab_entry *out) {
    union {
        struct fi_cq_err_entry entry;
        uint8_t room[sizeof(struct fi_cq_err_entry) + 64];
    } error;
    memset(&error, 0, sizeof error);
    if (fi_cq_readerr(ofi->cq, &error.entry, 0) <= 0) return 0;
    int code = error.entry.err < 0 ? -error.entry.err : error.entry.err; /* 1.17's shm returns it negative */
    *out = (at_fab_entry){.wr = error.entry.op_context, .error = code != 0 ? code : FI_EOTHER};
    return 1;
}

static int ofi_read(at_fab *fab, at_fab_entry *out, int most) {
    at_ofi *ofi = at_ofi_of(fab);
    struct fi_cq_data_entry entries[64];
    ssize_t n = fi_cq_read(ofi->cq, entries, (size_t)(most < 64 ? most : 64));
    if (n == -FI_EAVAIL) return read_error(ofi, out);
    for (ssize_t i = 0; i < n; i++) {
        int arrival = (entries[i].flags & FI_REMOTE_WRITE) != 0; /* the only flag that says so on every provider */
        out[i] = (at_fab_entry){.wr = arrival ? NULL : entries[i].op_context, .arrival = arrival, .data = entries[i].data};
    }
    return n > 0 ? (int)n : 0;
}

static int ofi_arm(at_fab *fab) {
    at_ofi *ofi = at_ofi_of(fab);
    struct fid *fids[1] = {&ofi->cq->fid};
    return ofi->wait != NULL ? ofi->wait->ops->wait(ofi->wait, 0) == -FI_ETIMEDOUT : fi_trywait(ofi->fabric, fids, 1) == 0;
}

static int ofi_enroll(at_fab *fab, const at_fab_memory *wanted, unsigned use, at_fab_mr *out) {
    at_fab_memory memory = *wanted;
    uint64_t access = (use & AT_USE_LOCAL ? FI_READ | FI_WRITE : 0) | (use & AT_USE_REMOTE_WRITE ? FI_REMOTE_WRITE : 0) |
                      (use & AT_USE_REMOTE_READ ? FI_REMOTE_READ : 0) | (use & AT_USE_CTRL ? FI_SEND | FI_RECV : 0);
    if (fab->facts.version < DMABUF_SINCE) memory.dmabuf_fd = -1;
    struct fid_mr *mr = NULL;
    int rc = -FI_EINVAL;
    for (int again = 1; again; memory.dmabuf_fd = -1) {
        at_ofi_attr filled;
        uint64_t flags = at_ofi_attributes(&filled, &memory, access, at_fab_is(fab, AT_FAB_KEYS) ? 0 : ++fab->next_key);
        rc = fi_mr_regattr(at_ofi_of(fab)->domain, &filled.room.attr, flags, &mr);
        again = rc != 0 && memory.dmabuf_fd >= 0; /* a kernel or a NIC without dma-bufs: the provider may have another way */
    }
    if (rc != 0) return -rc;
    *out = (at_fab_mr){.mr = mr, .key = fi_mr_key(mr), .base = at_fab_is(fab, AT_FAB_VIRTUAL) ? memory.address : 0};
    return 0;
}

static void ofi_dismiss(at_fab *fab, void *mr) {
    (void)fab;
    (void)fi_close(&((struct fid_mr *)mr)->fid);
}

static void *ofi_desc(void *mr) { return fi_mr_desc((struct fid_mr *)mr); }
static const char *ofi_text(int error) { return at_ofi_library.strerror(error); }

static void ofi_quit(at_fab *fab) {
    if (fab->shared != NULL) (void)fi_close(&((struct fid_ep *)fab->shared)->fid);
    fab->shared = NULL;
}

const at_fab_driver at_ofi_driver = {
    .open = ofi_open,
    .close = ofi_close,
    .settle = ofi_settle,
    .name = ofi_name,
    .join = ofi_join,
    .receive = ofi_receive,
    .send = ofi_send,
    .post = ofi_post,
    .read = ofi_read,
    .arm = ofi_arm,
    .enroll = ofi_enroll,
    .dismiss = ofi_dismiss,
    .desc = ofi_desc,
    .text = ofi_text,
    .quit = ofi_quit,
    .free = at_ofi_free,
};

#endif
