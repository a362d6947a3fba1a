/* A rail on one port of an RDMA device. */
#if __has_include(<infiniband/verbs.h>)

#include "verbs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#define MOST_COMPLETIONS 65536 /* of a queue: more than three hundred connections */
#define MOST_BYTES ((uint64_t)1 << 30) /* of one work request; devices take 2 GiB */
#define INLINE 220u /* bytes: what fits into a work request of ConnectX beside a write */
#define READS 16

static const char *vrb_text(int error) { return strerror(error); }

static void vrb_quit(at_fab *fab) {
    at_vrb *vrb = at_vrb_of(fab);
    if (vrb->srq != NULL) (void)at_vrb_library.destroy_srq(vrb->srq);
    vrb->srq = NULL;
}

static void vrb_free(at_fab *fab) {
    at_vrb *vrb = at_vrb_of(fab);
    if (vrb->cq != NULL && vrb->unacknowledged != 0) at_vrb_library.ack_cq_events(vrb->cq, vrb->unacknowledged);
    if (vrb->cq != NULL) (void)at_vrb_library.destroy_cq(vrb->cq);
    if (vrb->channel != NULL) (void)at_vrb_library.destroy_channel(vrb->channel);
    if (vrb->pd != NULL) (void)at_vrb_library.dealloc_pd(vrb->pd);
    if (vrb->context != NULL) (void)at_vrb_library.close_device(vrb->context);
    free(vrb->stash);
    free(vrb);
}

static const at_fab_driver driver = {
    .open = at_vrb_qp_open,
    .close = at_vrb_qp_close,
    .name = at_vrb_qp_name,
    .join = at_vrb_qp_join,
    .send = at_vrb_send,
    .post = at_vrb_post,
    .flush = at_vrb_flush,
    .read = at_vrb_read,
    .handed_out = at_vrb_handed_out,
    .look = at_vrb_look,
    .arm = at_vrb_arm,
    .enroll = at_vrb_enroll,
    .dismiss = at_vrb_dismiss,
    .desc = at_vrb_desc,
    .text = vrb_text,
    .quit = vrb_quit,
    .free = vrb_free,
    .by_itself = 1,
};

uint32_t at_verbs_flags(void) {
    return AT_FAB_ORDERED | AT_FAB_PRIVATE | AT_FAB_LOCAL_MR | AT_FAB_VIRTUAL | AT_FAB_KEYS | AT_FAB_FD | AT_FAB_SENDERS;
}

static int unblock(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return flags < 0 ? -1 : fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

/* Returns the name of the object that could not be opened, or NULL. */
static const char *open_objects(at_vrb *vrb) {
    struct ibv_device_attr attr;
    if (at_vrb_library.query_device(vrb->context, &attr) != 0) return "attributes";
    if ((vrb->pd = at_vrb_library.alloc_pd(vrb->context)) == NULL) return "protection domain";
    if ((vrb->channel = at_vrb_library.create_channel(vrb->context)) == NULL) return "completion channel";
    if (unblock(vrb->channel->fd) != 0 || unblock(vrb->context->async_fd) != 0) return "descriptor that does not block";
    uint32_t completions = attr.max_cqe < MOST_COMPLETIONS ? (uint32_t)attr.max_cqe : MOST_COMPLETIONS;
    if ((vrb->cq = at_vrb_library.create_cq(vrb->context, (int)completions, NULL, vrb->channel, 0)) == NULL) return "completion queue";
    if (ibv_req_notify_cq(vrb->cq, 0) != 0) return "events of the completion queue"; /* the first; progress asks for later ones */
    uint32_t receives = completions / AT_VRB_PER_PEER * AT_VRB_CREDITS;
    if (receives > (uint32_t)attr.max_srq_wr) receives = (uint32_t)attr.max_srq_wr;
    struct ibv_srq_init_attr srq = {.attr = {.max_wr = receives, .max_sge = 1}};
    if (attr.max_srq == 0 || (vrb->srq = at_vrb_library.create_srq(vrb->pd, &srq)) == NULL) return "shared receive queue";
    vrb->most_connections = receives / AT_VRB_CREDITS;
    vrb->stash_room = completions * 2;
    if ((vrb->stash = calloc(vrb->stash_room, sizeof *vrb->stash)) == NULL) return "memory";
    uint32_t reads = (uint32_t)(attr.max_qp_rd_atom < attr.max_qp_init_rd_atom ? attr.max_qp_rd_atom : attr.max_qp_init_rd_atom);
    vrb->reads = reads < READS ? reads : READS;
    vrb->inline_bytes = INLINE;
    vrb->fab.fd = vrb->channel->fd;
    vrb->fab.news_fd = vrb->context->async_fd;
    return NULL;
}

int at_verbs_open(at_lane *lane, const char *device, const char *node, uint64_t most_bytes, uint32_t most_posted, at_fab **out, at_fab_facts *facts) {
    if (at_vrb_library.open_device == NULL) {
        at_fab_say("libibverbs is not loaded");
        return AT_EIO;
    }
    at_vrb *vrb = calloc(1, sizeof *vrb);
    if (vrb == NULL) return AT_ENOMEM;
    at_fab *fab = &vrb->fab;
    if (node != NULL) (void)strncpy(vrb->node, node, sizeof vrb->node - 1);
    int rc = at_fab_prepare(fab, lane, &driver), code = rc == AT_OK ? at_vrb_choose(vrb, device) : EMFILE;
    if (code != 0) rc = AT_EIO;
    if (rc == AT_OK) {
        errno = 0;
        const char *what = open_objects(vrb);
        if (what != NULL) {
            code = errno != 0 ? errno : EIO;
            at_fab_say("%s: no %s: %s", fab->facts.domain, what, strerror(code));
            rc = AT_EIO;
        }
    }
    if (rc == AT_OK) {
        fab->facts.flags = at_verbs_flags() | (at_vrb_takes_dmabufs(vrb) ? AT_FAB_DEVICE : 0u);
        fab->facts.iov = 1;
        fab->facts.most_bytes = most_bytes != 0 && most_bytes < MOST_BYTES ? most_bytes : MOST_BYTES;
        fab->facts.most_posted = most_posted != 0 ? most_posted : vrb->most_connections * AT_FAB_WINDOW;
        (void)strncpy(fab->facts.provider, "verbs", sizeof fab->facts.provider - 1);
        rc = at_fab_begin(fab, fab->facts.domain);
        at_lock(lane); /* news of the device wake the loop as well, once each; without that they are found with the next completion */
        if (rc == AT_OK) (void)at_watch_fd(lane, vrb->context->async_fd, AT_TAG(AT_TAG_RAIL, 0), 1);
        at_unlock(lane);
    }
    if (rc != AT_OK) {
        at_fab_undo(fab, rc == AT_EIO ? code : 0);
        return rc;
    }
    *facts = fab->facts;
    *out = fab;
    return AT_OK;
}

#endif
