/* Queue pairs: one for each connection, opened, joined to the other side's, closed. */
#if __has_include(<infiniband/verbs.h>)

#include "verbs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define TIMEOUT 14       /* 4.096 us << 14, 67 ms, without an acknowledgement; */
#define RETRIES 6        /* so often again: half a second until a connection is given up. 7 never ends on soft-RoCE */
#define RNR_TIMER 12     /* 0.64 ms; with credit it is never needed */
#define RNR_RETRIES 7    /* for ever */
#define DRAIN_NS UINT64_C(50000000)
#define HELLO 0x31767461u /* "atv1" */

/* What the other side joins by: the bytes of the offer's address. */
typedef struct {
    uint32_t hello, number, psn, lid, mtu, ethernet, credits, word_key;
    uint64_t word;
    uint8_t gid[16];
} address;
_Static_assert(sizeof(address) <= sizeof(((at_fab_offer *)0)->address), "fits into an offer");

static void unlink_qp(at_vrb *vrb, const at_vqp *q) {
    for (at_vqp **at = &vrb->buckets[q->qp->qp_num % AT_VRB_BUCKETS]; *at != NULL; at = &(*at)->next) {
        if (*at != q) continue;
        *at = q->next;
        return;
    }
}

static void qp_free(at_vqp *q) {
    if (q->qp != NULL) (void)at_vrb_library.destroy_qp(q->qp);
    if (q->words_mr != NULL) (void)at_vrb_library.deregister(q->words_mr);
    free(q->words);
    free(q);
}

static struct ibv_qp *create(at_vrb *vrb) {
    for (;;) {
        struct ibv_qp_init_attr init = {.send_cq = vrb->cq, .recv_cq = vrb->cq, .srq = vrb->srq, .qp_type = IBV_QPT_RC,
                                        .cap = {.max_send_wr = AT_VRB_SENDS, .max_send_sge = 1, .max_inline_data = vrb->inline_bytes}};
        struct ibv_qp *qp = at_vrb_library.create_qp(vrb->pd, &init);
        if (qp != NULL || vrb->inline_bytes == 0) return qp;
        vrb->inline_bytes /= 2; /* what a device takes inline, nothing says but this */
        if (vrb->inline_bytes < 8) vrb->inline_bytes = 0;
    }
}

int at_vrb_qp_open(at_fab_conn *conn) {
    at_vrb *vrb = at_vrb_of(conn->fab);
    int rc = at_vrb_look_up(vrb);
    if (rc != 0) return rc;
    if (vrb->connections == vrb->most_connections) return ENOBUFS;
    at_vqp *q = calloc(1, sizeof *q);
    if (q == NULL) return ENOMEM;
    q->words = aligned_alloc(64, 64);
    if (q->words != NULL) {
        memset(q->words, 0, 64);
        q->words_mr = at_vrb_library.register_memory(vrb->pd, q->words, 64, (uint64_t)(uintptr_t)q->words,
                                                     IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    }
    if (q->words_mr != NULL) q->qp = create(vrb);
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = vrb->port,
                               .qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ};
    rc = q->qp == NULL ? (errno != 0 ? errno : EIO)
                       : at_vrb_library.modify_qp(q->qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
    if (rc != 0) {
        qp_free(q);
        return rc;
    }
    q->mark = conn->mark;
    q->unique = conn->unique;
    q->psn = (uint32_t)(at_now() >> 10) & 0xffffffu;
    at_vqp **bucket = &vrb->buckets[q->qp->qp_num % AT_VRB_BUCKETS];
    q->next = *bucket;
    *bucket = q;
    vrb->connections++;
    conn->ep = q;
    return 0;
}

int at_vrb_qp_name(at_fab_conn *conn, at_fab_offer *out) {
    const at_vrb *vrb = at_vrb_of(conn->fab);
    const at_vqp *q = at_vqp_of(conn);
    address ours = {.hello = HELLO, .number = q->qp->qp_num, .psn = q->psn, .lid = vrb->lid, .mtu = (uint32_t)vrb->mtu,
                    .ethernet = (uint32_t)vrb->ethernet, .credits = AT_VRB_CREDITS, .word_key = q->words_mr->rkey,
                    .word = (uint64_t)(uintptr_t)&q->words->returned};
    memcpy(ours.gid, vrb->gid.raw, sizeof ours.gid);
    memcpy(out->address, &ours, sizeof ours);
    out->address_bytes = sizeof ours;
    return 0;
}

int at_vrb_qp_join(at_fab_conn *conn, const at_fab_offer *theirs) {
    const at_vrb *vrb = at_vrb_of(conn->fab);
    at_vqp *q = at_vqp_of(conn);
    address to;
    if (theirs->address_bytes != sizeof to) return EPROTO;
    memcpy(&to, theirs->address, sizeof to);
    if (to.hello != HELLO || to.credits != AT_VRB_CREDITS || to.mtu < IBV_MTU_256 || to.mtu > IBV_MTU_4096 ||
        (to.ethernet != 0) != (vrb->ethernet != 0))
        return EPROTO;
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTR, .path_mtu = (uint32_t)vrb->mtu < to.mtu ? vrb->mtu : (enum ibv_mtu)to.mtu,
                               .dest_qp_num = to.number & 0xffffffu, .rq_psn = to.psn & 0xffffffu, .max_dest_rd_atomic = (uint8_t)vrb->reads,
                               .min_rnr_timer = RNR_TIMER};
    attr.ah_attr.port_num = vrb->port;
    attr.ah_attr.dlid = (uint16_t)to.lid;
    attr.ah_attr.is_global = vrb->ethernet || memcmp(to.gid, vrb->gid.raw, 8) != 0; /* InfiniBand: of another subnet */
    memcpy(attr.ah_attr.grh.dgid.raw, to.gid, sizeof to.gid);
    attr.ah_attr.grh.sgid_index = (uint8_t)vrb->gid_index;
    attr.ah_attr.grh.hop_limit = 64;
    int rc = at_vrb_library.modify_qp(q->qp, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                                       IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
    if (rc != 0) return rc;
    struct ibv_qp_attr send = {.qp_state = IBV_QPS_RTS, .sq_psn = q->psn, .timeout = TIMEOUT, .retry_cnt = RETRIES, .rnr_retry = RNR_RETRIES,
                               .max_rd_atomic = (uint8_t)vrb->reads};
    rc = at_vrb_library.modify_qp(q->qp, &send, IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                                                   IBV_QP_MAX_QP_RD_ATOMIC);
    if (rc != 0) return rc;
    q->their_word = to.word;
    q->their_key = to.word_key;
    q->ready = 1;
    return 0;
}

/* The error state takes nothing in and flushes what was posted, in order: once the marker has come back, everything before it has. */
static void drain(at_vrb *vrb, at_vqp *q) {
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
    struct ibv_send_wr marker = {.wr_id = AT_VRB_MARKER, .opcode = IBV_WR_RDMA_WRITE, .send_flags = IBV_SEND_SIGNALED}, *bad = NULL;
    int sent = at_vrb_library.modify_qp(q->qp, &attr, IBV_QP_STATE) == 0 && q->ready && ibv_post_send(q->qp, &marker, &bad) == 0;
    for (uint64_t until = at_now() + DRAIN_NS; sent && !q->drained && at_now() < until;) at_vrb_stash_all(vrb);
    at_vrb_stash_all(vrb);
}

void at_vrb_qp_close(at_fab_conn *conn) {
    at_vrb *vrb = at_vrb_of(conn->fab);
    at_vqp *q = at_vqp_of(conn);
    drain(vrb, q);
    unlink_qp(vrb, q);
    qp_free(q);
    vrb->connections--;
    conn->ep = NULL;
}

int at_verbs_posts(at_lane *lane, int64_t peer, uint64_t out[4]) {
    at_lock(lane);
    at_fab_conn *conn = at_fab_conn_of(lane, peer);
    int rc = conn != NULL && conn->fab->driver->open == at_vrb_qp_open && conn->ep != NULL ? AT_OK : AT_EUNKNOWN;
    if (rc == AT_OK) memcpy(out, at_vqp_of(conn)->posts, sizeof at_vqp_of(conn)->posts);
    at_unlock(lane);
    return rc;
}

#endif
