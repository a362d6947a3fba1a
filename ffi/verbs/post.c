/* Work requests: gathered in a chain, posted by one call, the last of them with a completion that stands for all. */
#if __has_include(<infiniband/verbs.h>)

#include "verbs.h"

#include <arpa/inet.h>
#include <errno.h>
#include <string.h>

/* Receives of the peer's that may be used up now. */
static uint64_t credit(const at_vqp *q) {
    uint64_t out = q->spent - atomic_load_explicit(&q->words->returned, memory_order_acquire); /* order: alone: credit that only grows */
    return out < AT_VRB_CREDITS ? AT_VRB_CREDITS - out : 0;
}

static int post_chain(at_vqp *q, struct ibv_send_wr *first, uint32_t count) {
    struct ibv_send_wr *bad = NULL;
    q->posts[0]++;
    q->posts[1] += count;
    q->posts[3]++;
    return ibv_post_send(q->qp, first, &bad);
}

int at_vrb_flush(at_fab_conn *conn) {
    at_vqp *q = at_vqp_of(conn);
    if (q->gathered == 0) return 0;
    uint32_t last = q->gathered - 1;
    q->wr[last].send_flags |= IBV_SEND_SIGNALED;
    q->wr[last].next = NULL;
    q->gathered = 0;
    return post_chain(q, q->wr, last + 1);
}

int at_vrb_post(at_fab_conn *conn, at_fab_wr *work, const at_fab_vector *v, int read, int counts, uint64_t data) {
    at_vqp *q = at_vqp_of(conn);
    if (counts && credit(q) <= AT_VRB_RESERVE) return EAGAIN;
    if (q->gathered == AT_VRB_CHAIN) {
        int rc = at_vrb_flush(conn);
        if (rc != 0) return rc;
    }
    struct ibv_send_wr *wr = &q->wr[q->gathered];
    struct ibv_sge *sge = &q->sge[q->gathered];
    const struct ibv_mr *mr = v->desc;
    *sge = (struct ibv_sge){.addr = (uint64_t)(uintptr_t)v->here[0], .length = (uint32_t)v->nbytes[0], .lkey = mr != NULL ? mr->lkey : 0};
    memset(wr, 0, sizeof *wr);
    wr->wr_id = (uint64_t)(uintptr_t)work;
    wr->sg_list = sge;
    wr->num_sge = v->nbytes[0] != 0;
    wr->opcode = read ? IBV_WR_RDMA_READ : counts ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE;
    wr->wr.rdma.remote_addr = v->there[0];
    wr->wr.rdma.rkey = (uint32_t)v->key;
    if (!read && !v->device && v->nbytes[0] != 0 && v->nbytes[0] <= at_vrb_of(conn->fab)->inline_bytes) {
        wr->send_flags = IBV_SEND_INLINE;
        q->posts[2]++;
    }
    if (counts) {
        wr->imm_data = htonl((uint32_t)data);
        q->spent++;
    }
    if (q->gathered != 0) q->wr[q->gathered - 1].next = wr;
    q->gathered++;
    return 0;
}

int at_vrb_send(at_fab_conn *conn, at_fab_wr *work) {
    at_vqp *q = at_vqp_of(conn);
    if (credit(q) == 0) return EAGAIN;
    int rc = at_vrb_flush(conn);
    if (rc != 0) return rc;
    const struct ibv_mr *mr = work->desc;
    struct ibv_sge sge = {.addr = (uint64_t)(uintptr_t)&work->ctrl, .length = sizeof work->ctrl, .lkey = mr->lkey};
    struct ibv_send_wr wr = {.wr_id = (uint64_t)(uintptr_t)work, .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND, .send_flags = IBV_SEND_SIGNALED};
    q->spent++;
    return post_chain(q, &wr, 1);
}

/* Not while the last is under way: it reads the number when it is sent, but one in the queue is enough. What fails shows as a completion,
 * or as soon as anything else is posted. */
void at_vrb_credit(at_vrb *vrb, at_vqp *q) {
    if (q->telling || !q->ready || q->used - q->told < AT_VRB_CREDITS / 4) return;
    q->words->replaced = q->used;
    struct ibv_sge sge = {.addr = (uint64_t)(uintptr_t)&q->words->replaced, .length = sizeof q->words->replaced, .lkey = q->words_mr->lkey};
    struct ibv_send_wr wr = {.wr_id = AT_VRB_CREDIT, .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE,
                             .send_flags = IBV_SEND_SIGNALED | (vrb->inline_bytes != 0 ? IBV_SEND_INLINE : 0u)};
    wr.wr.rdma.remote_addr = q->their_word;
    wr.wr.rdma.rkey = q->their_key;
    if (post_chain(q, &wr, 1) != 0) return;
    q->telling = 1;
    q->told = q->used;
}

#endif
