/* The completion queue: read, arm, replace what was used up; and what the device says of itself. */
#if __has_include(<infiniband/verbs.h>)

#include "verbs.h"

#include <arpa/inet.h>
#include <errno.h>

#define BATCH 32
#define ACKNOWLEDGE 64u /* events in one go: each go takes a mutex */
#define LOOK_NS UINT64_C(1000000) /* between two looks for events of the device: each is a system call, and its descriptor is watched as well */

/* Of an error nothing is certain but the work request and the status. */
static int errno_of(enum ibv_wc_status status) {
    switch (status) {
    case IBV_WC_SUCCESS: return 0;
    case IBV_WC_RETRY_EXC_ERR: return ETIMEDOUT;        /* no acknowledgement came */
    case IBV_WC_RNR_RETRY_EXC_ERR: return EBUSY;        /* the other side had no receives */
    case IBV_WC_WR_FLUSH_ERR: return ECONNRESET;        /* something before it failed */
    case IBV_WC_REM_ACCESS_ERR: return EACCES;          /* the other side does not lend that memory */
    case IBV_WC_LOC_PROT_ERR: return EFAULT;
    case IBV_WC_LOC_QP_OP_ERR: return ENETDOWN;         /* soft-RoCE: no way out of this host */
    case IBV_WC_REM_OP_ERR: return EREMOTEIO;
    default: return EIO;
    }
}

/* The connection that a completion is of; NULL: it is closed. */
static at_vqp *find(at_vrb *vrb, uint32_t number) {
    for (at_vqp *q = vrb->buckets[number % AT_VRB_BUCKETS]; q != NULL; q = q->next)
        if (q->qp->qp_num == number) return q;
    return NULL;
}

/* Whether there is something to hand out. */
static int translate(at_vrb *vrb, const struct ibv_wc *wc, at_fab_entry *out) {
    at_vqp *q = find(vrb, wc->qp_num);
    *out = (at_fab_entry){.error = errno_of(wc->status), .mark = q != NULL ? q->mark : UINT32_MAX, .unique = q != NULL ? q->unique : 0};
    if (wc->wr_id == AT_VRB_CREDIT) {
        if (q != NULL) q->telling = 0;
        return out->error != 0;
    }
    if (wc->wr_id == AT_VRB_MARKER) {
        if (q != NULL) q->drained = 1;
        return 0;
    }
    out->wr = (at_fab_wr *)(uintptr_t)wc->wr_id;
    if (out->wr->kind != AT_WR_CTRL_IN) return 1;
    vrb->stocked--;
    if (out->error == 0 && q != NULL) q->used++;
    out->arrival = out->error == 0 && wc->opcode == IBV_WC_RECV_RDMA_WITH_IMM;
    if (out->arrival) out->data = ntohl(wc->imm_data);
    return 1;
}

void at_vrb_stash_all(at_vrb *vrb) {
    struct ibv_wc wc[BATCH];
    for (int n = BATCH; n == BATCH && vrb->stash_room - vrb->stashed >= BATCH;) {
        n = ibv_poll_cq(vrb->cq, BATCH, wc);
        for (int i = 0; i < n; i++) {
            uint32_t at = (vrb->stash_first + vrb->stashed) % vrb->stash_room;
            if (translate(vrb, &wc[i], &vrb->stash[at])) vrb->stashed++;
        }
    }
}

int at_vrb_read(at_fab *fab, at_fab_entry *entries, int most) {
    at_vrb *vrb = at_vrb_of(fab);
    int count = 0;
    while (vrb->stashed != 0 && count < most) {
        entries[count++] = vrb->stash[vrb->stash_first];
        vrb->stash_first = (vrb->stash_first + 1) % vrb->stash_room;
        vrb->stashed--;
    }
    struct ibv_wc wc[BATCH];
    while (count < most) {
        int room = most - count < BATCH ? most - count : BATCH, n = ibv_poll_cq(vrb->cq, room, wc);
        for (int i = 0; i < n; i++) count += translate(vrb, &wc[i], &entries[count]);
        if (n < room) break;
    }
    return count;
}

static uint32_t how_many_are_missing(at_vrb *vrb, uint32_t wanted) {
    (void)pthread_mutex_lock(&vrb->fab.lock);
    uint32_t missing = vrb->stocked < wanted ? wanted - vrb->stocked : 0;
    (void)pthread_mutex_unlock(&vrb->fab.lock);
    return missing;
}

/* Post as many receives as are missing, in chains. Returns whether all are there now. */
static int stock(at_vrb *vrb) {
    at_fab *fab = &vrb->fab;
    struct ibv_recv_wr chain[BATCH], *bad = NULL;
    struct ibv_sge sges[BATCH];
    at_fab_wr *wrs[BATCH];
    uint32_t wanted = vrb->connections * AT_VRB_CREDITS;
    for (uint32_t missing; (missing = how_many_are_missing(vrb, wanted)) != 0;) {
        uint32_t n = 0;
        for (; n < BATCH && n < missing && (wrs[n] = at_fab_wr_take(fab)) != NULL; n++) {
            wrs[n]->kind = AT_WR_CTRL_IN;
            wrs[n]->state = AT_WR_POSTED;
            sges[n] = (struct ibv_sge){.addr = (uint64_t)(uintptr_t)&wrs[n]->ctrl, .length = sizeof wrs[n]->ctrl,
                                       .lkey = ((const struct ibv_mr *)wrs[n]->desc)->lkey};
            chain[n] = (struct ibv_recv_wr){.wr_id = (uint64_t)(uintptr_t)wrs[n], .sg_list = &sges[n], .num_sge = 1};
            if (n != 0) chain[n - 1].next = &chain[n];
        }
        if (n == 0) return 0;
        (void)pthread_mutex_lock(&fab->lock);
        int rc = ibv_post_srq_recv(vrb->srq, chain, &bad);
        uint32_t done = rc == 0 ? n : (uint32_t)(bad - chain);
        vrb->stocked += done;
        (void)pthread_mutex_unlock(&fab->lock);
        for (uint32_t i = done; i < n; i++) at_fab_wr_free(fab, wrs[i]);
        if (rc != 0) return 0;
    }
    return 1;
}

/* Used up receives are replaced, and only then is their number told. */
void at_vrb_handed_out(at_fab *fab) {
    at_vrb *vrb = at_vrb_of(fab);
    if (!stock(vrb)) return;
    (void)pthread_mutex_lock(&fab->lock);
    for (uint32_t i = 0; i < fab->conn_count; i++)
        if (fab->conns[i] != NULL && fab->conns[i]->ep != NULL) at_vrb_credit(vrb, at_vqp_of(fab->conns[i]));
    (void)pthread_mutex_unlock(&fab->lock);
}

int at_vrb_arm(at_fab *fab) {
    at_vrb *vrb = at_vrb_of(fab);
    struct ibv_cq *cq;
    void *context;
    if (vrb->stashed != 0) return 0;
    while (at_vrb_library.get_cq_event(vrb->channel, &cq, &context) == 0) vrb->unacknowledged++;
    if (vrb->unacknowledged >= ACKNOWLEDGE) {
        at_vrb_library.ack_cq_events(vrb->cq, vrb->unacknowledged);
        vrb->unacknowledged = 0;
    }
    if (ibv_req_notify_cq(vrb->cq, 0) != 0) return 0;
    at_vrb_stash_all(vrb);
    return vrb->stashed == 0;
}

static void break_all(at_fab *fab, const struct ibv_qp *only, int error) {
    at_lock(fab->rail.lane);
    for (uint32_t i = 0; i < fab->conn_count; i++) {
        at_fab_conn *conn = fab->conns[i];
        if (conn != NULL && conn->ep != NULL && (only == NULL || at_vqp_of(conn)->qp == only)) at_fab_conn_break(conn, error);
    }
    at_unlock(fab->rail.lane);
}

/* The port is back: what broke may be opened again now, rather than when its pause is over. */
static void hurry(at_fab *fab) {
    at_lane *lane = fab->rail.lane;
    at_lock(lane);
    for (uint32_t i = 0; i < fab->conn_count; i++) {
        const at_fab_conn *conn = fab->conns[i];
        if (conn != NULL && conn->ep == NULL && !conn->retired && conn->generation != 0 && conn->peer->status == AT_OK)
            at_event_push(lane, AT_EV_RAIL, (uint64_t)conn->peer->id, AT_OK, 0);
    }
    at_unlock(lane);
}

/* Told by the device: a port has gone or is back, or the whole of it has gone, or one connection. */
void at_vrb_look(at_fab *fab) {
    at_vrb *vrb = at_vrb_of(fab);
    struct ibv_async_event event;
    uint64_t now = at_now();
    if (now - vrb->looked < LOOK_NS) return;
    vrb->looked = now;
    for (errno = 0; at_vrb_library.get_async_event(vrb->context, &event) == 0; errno = 0) {
        const struct ibv_qp *qp = event.element.qp;
        enum ibv_event_type type = event.event_type;
        int port = event.element.port_num;
        at_vrb_library.ack_async_event(&event); /* first: destroying what it is about waits for that */
        if (type == IBV_EVENT_QP_FATAL || type == IBV_EVENT_QP_REQ_ERR || type == IBV_EVENT_QP_ACCESS_ERR) break_all(fab, qp, EIO);
        else if (type == IBV_EVENT_PORT_ERR && port == vrb->port) break_all(fab, NULL, ENETDOWN);
        else if (type == IBV_EVENT_PORT_ACTIVE && port == vrb->port) hurry(fab);
        else if (type == IBV_EVENT_DEVICE_FATAL || type == IBV_EVENT_CQ_ERR || type == IBV_EVENT_SRQ_ERR) break_all(fab, NULL, ENODEV);
    }
    if (errno == EAGAIN || errno == EINTR || fab->news_fd < 0) return;
    at_unwatch_fd(fab->rail.lane, fab->news_fd); /* it would stay readable for ever: the device has been taken out */
    fab->news_fd = -1;
    break_all(fab, NULL, ENODEV);
}

#endif
