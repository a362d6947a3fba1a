/* libibverbs and a device beneath it that does nothing: what is posted has landed, and nobody carries it.
 *
 * For measuring what our own code costs (verbs_cost.c). The functions have libibverbs's names, so that the driver under test loads the
 * program itself as its library. A posted chain is walked once and its completions queued; polling hands them out. Nothing here allocates
 * or calls the system once everything is set up. */
#define _GNU_SOURCE
#include "stub_verbs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

#define RING 65536u /* a power of two, and as many as a completion queue holds */
#define MOST_QPS 256u

typedef struct {
    struct ibv_context context;
    struct ibv_cq cq;
    struct ibv_srq srq;
    struct ibv_wc ring[RING];
    uint64_t receives[RING];
    uint32_t head, tail, receive_head, receive_tail, qps;
    _Atomic uint64_t *returned[MOST_QPS]; /* by number: where the credit of a connection is given back */
} device;

static struct ibv_device the_device = {.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "stub0"};
static struct ibv_device *devices[2] = {&the_device, NULL};
stub_counts stub;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- the fast path ---- */

static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad) {
    (void)bad;
    device *d = (device *)qp->context;
    uint64_t counting = 0;
    for (; wr != NULL; wr = wr->next) {
        stub.requests++;
        counting += wr->opcode == IBV_WR_RDMA_WRITE_WITH_IMM || wr->opcode == IBV_WR_SEND;
        if (!(wr->send_flags & IBV_SEND_SIGNALED)) continue;
        struct ibv_wc *wc = &d->ring[d->tail++ % RING];
        wc->wr_id = wr->wr_id;
        wc->status = IBV_WC_SUCCESS;
        wc->opcode = IBV_WC_RDMA_WRITE;
        wc->qp_num = qp->qp_num;
    }
    _Atomic uint64_t *returned = d->returned[qp->qp_num % MOST_QPS];
    if (counting != 0 && returned != NULL) atomic_fetch_add_explicit(returned, counting, memory_order_relaxed);
    if (++stub.calls == stub.stamped) stub.stamp = now();
    return 0;
}

static int poll_cq(struct ibv_cq *cq, int most, struct ibv_wc *out) {
    device *d = (device *)cq->context;
    int n = 0;
    for (; n < most && d->head != d->tail; n++) out[n] = d->ring[d->head++ % RING];
    return n;
}

static int post_srq_recv(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad) {
    (void)bad;
    device *d = (device *)srq->context;
    for (; wr != NULL; wr = wr->next) d->receives[d->receive_tail++ % RING] = wr->wr_id;
    return 0;
}

static int req_notify_cq(struct ibv_cq *cq, int solicited) {
    (void)cq, (void)solicited;
    return 0;
}

uint32_t stub_arrive(struct ibv_context *context, uint32_t number, uint32_t imm, uint32_t n) {
    device *d = (device *)context;
    uint32_t i = 0;
    for (; i < n && d->receive_head != d->receive_tail; i++) {
        struct ibv_wc *wc = &d->ring[d->tail++ % RING];
        wc->wr_id = d->receives[d->receive_head++ % RING];
        wc->status = IBV_WC_SUCCESS;
        wc->opcode = IBV_WC_RECV_RDMA_WITH_IMM;
        wc->imm_data = __builtin_bswap32(imm);
        wc->qp_num = number;
    }
    return i;
}

void stub_gives_credit(struct ibv_context *context, uint32_t number, _Atomic uint64_t *word) {
    ((device *)context)->returned[number % MOST_QPS] = word;
}

/* ---- the rest ---- */

struct ibv_context *stub_context;

struct ibv_device **ibv_get_device_list(int *count) {
    *count = 1;
    return devices;
}

void ibv_free_device_list(struct ibv_device **list) { (void)list; }
const char *ibv_get_device_name(struct ibv_device *one) { return one->name; }

struct ibv_context *ibv_open_device(struct ibv_device *one) {
    device *d = calloc(1, sizeof *d);
    if (d == NULL) return NULL;
    d->context.device = one;
    d->context.ops.post_send = post_send;
    d->context.ops.poll_cq = poll_cq;
    d->context.ops.post_srq_recv = post_srq_recv;
    d->context.ops.req_notify_cq = req_notify_cq;
    d->context.async_fd = eventfd(0, EFD_NONBLOCK);
    stub_context = &d->context;
    return &d->context;
}

int ibv_close_device(struct ibv_context *context) {
    free(context);
    return 0;
}

int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *attr) {
    (void)context;
    *attr = (struct ibv_device_attr){.phys_port_cnt = 1, .max_cqe = RING, .max_srq = 1, .max_srq_wr = RING, .max_qp_rd_atom = 16, .max_qp_init_rd_atom = 16};
    return 0;
}

#undef ibv_query_port
int ibv_query_port(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *out) {
    (void)context, (void)port;
    struct ibv_port_attr attr = {.state = IBV_PORT_ACTIVE, .gid_tbl_len = 1, .active_mtu = IBV_MTU_4096, .link_layer = IBV_LINK_LAYER_ETHERNET};
    memcpy((void *)out, &attr, sizeof attr);
    return 0;
}

int _ibv_query_gid_ex(struct ibv_context *context, uint32_t port, uint32_t index, struct ibv_gid_entry *entry, uint32_t flags, size_t bytes) {
    (void)context, (void)port, (void)index, (void)flags, (void)bytes;
    *entry = (struct ibv_gid_entry){.gid_type = IBV_GID_TYPE_ROCE_V2};
    entry->gid.raw[10] = entry->gid.raw[11] = 0xff;
    entry->gid.raw[12] = 10;
    return 0;
}

struct ibv_pd *ibv_alloc_pd(struct ibv_context *context) {
    struct ibv_pd *pd = calloc(1, sizeof *pd);
    if (pd != NULL) pd->context = context;
    return pd;
}

int ibv_dealloc_pd(struct ibv_pd *pd) {
    free(pd);
    return 0;
}

#undef ibv_reg_mr_iova2
struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *base, size_t nbytes, uint64_t iova, unsigned access) {
    (void)iova, (void)access;
    struct ibv_mr *mr = calloc(1, sizeof *mr);
    if (mr != NULL) *mr = (struct ibv_mr){.context = pd->context, .pd = pd, .addr = base, .length = nbytes, .lkey = 1, .rkey = 2};
    return mr;
}

int ibv_dereg_mr(struct ibv_mr *mr) {
    free(mr);
    return 0;
}

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context) {
    struct ibv_comp_channel *channel = calloc(1, sizeof *channel);
    if (channel != NULL) *channel = (struct ibv_comp_channel){.context = context, .fd = eventfd(0, EFD_NONBLOCK)};
    return channel;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *channel) {
    free(channel);
    return 0;
}

struct ibv_cq *ibv_create_cq(struct ibv_context *context, int entries, void *user, struct ibv_comp_channel *channel, int vector) {
    (void)user, (void)vector;
    device *d = (device *)context;
    d->cq = (struct ibv_cq){.context = context, .channel = channel, .cqe = entries};
    return &d->cq;
}

int ibv_destroy_cq(struct ibv_cq *cq) {
    (void)cq;
    return 0;
}

int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **user) {
    (void)channel, (void)cq, (void)user;
    errno = EAGAIN;
    return -1;
}

void ibv_ack_cq_events(struct ibv_cq *cq, unsigned n) { (void)cq, (void)n; }

struct ibv_srq *ibv_create_srq(struct ibv_pd *pd, struct ibv_srq_init_attr *init) {
    (void)init;
    device *d = (device *)pd->context;
    d->srq = (struct ibv_srq){.context = pd->context, .pd = pd};
    return &d->srq;
}

int ibv_destroy_srq(struct ibv_srq *srq) {
    (void)srq;
    return 0;
}

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init) {
    struct ibv_qp *qp = calloc(1, sizeof *qp);
    device *d = (device *)pd->context;
    if (qp != NULL) *qp = (struct ibv_qp){.context = pd->context, .pd = pd, .send_cq = init->send_cq, .recv_cq = init->recv_cq, .srq = init->srq,
                                          .qp_num = ++d->qps, .qp_type = init->qp_type};
    return qp;
}

int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask) {
    if (mask & IBV_QP_STATE) qp->state = attr->qp_state;
    return 0;
}

int ibv_destroy_qp(struct ibv_qp *qp) {
    free(qp);
    return 0;
}

int ibv_get_async_event(struct ibv_context *context, struct ibv_async_event *event) {
    (void)context, (void)event;
    errno = EAGAIN;
    return -1;
}

void ibv_ack_async_event(struct ibv_async_event *event) { (void)event; }
