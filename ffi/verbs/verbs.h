/* libibverbs as a driver of the fabric provider: one reliable connection (queue pair) for each peer and rail.
 *
 * Receives. A write with an immediate uses up a receive at the target, and so does a control message. All connections of a rail share one
 * receive queue, which holds CREDITS for each of them; a sender counts what it has used up and stops when the target has not
 * given them back. It gives them back by writing how many it has ever used up and replaced into a word of the sender's, which needs no
 * receive: so neither a full receive queue (an RNR storm) nor a deadlock of two sides without credit can come about. A connection is
 * refused when the completion queue could not take what it may have under way: it cannot overrun.
 *
 * Posting. Work requests are gathered in a chain, and one call posts it; the last of a chain asks for a completion, which stands for all
 * before it: a connection completes in order.
 *
 * Fencing. Closing moves the queue pair to the error state, posts a marker and reads the queue until that has come back, so that every
 * arrival that was accepted is read and none is accepted any more, and then destroys it. What was read meanwhile is kept in a stash
 * for the thread that reads next. */
#ifndef AT_VERBS_H
#define AT_VERBS_H

#include "fabric/fabric.h"

#include "verbs/decls.h"

#include <infiniband/verbs.h>

#define AT_VRB_CHAIN 16u
#define AT_VRB_CREDITS 128u               /* receives for each connection */
#define AT_VRB_RESERVE 16u                /* of them, for control messages alone */
#define AT_VRB_SENDS (AT_FAB_WINDOW + 8u) /* the window, a control message, credit, the marker */
#define AT_VRB_PER_PEER (AT_VRB_CREDITS + AT_VRB_SENDS) /* completions that one connection may have in the queue */
#define AT_VRB_BUCKETS 256u

/* What a completion names that is no work request. */
enum { AT_VRB_CREDIT = 1, AT_VRB_MARKER = 2 };

typedef struct {
    _Atomic uint64_t returned; /* written by the peer: receives of ours that it has replaced */
    uint64_t replaced;         /* ours: what is written to the peer */
} at_vrb_words;

typedef struct at_vqp at_vqp;
struct at_vqp {
    at_vqp *next; /* in its bucket */
    struct ibv_qp *qp;
    uint32_t mark;
    uint64_t unique;
    int ready;   /* it takes posts */
    int drained; /* its marker has come */
    int telling; /* credit is under way */
    uint64_t spent;           /* receives of the peer's used up */
    uint64_t used, told;      /* receives of ours that the peer has used up, and what it knows of that */
    uint64_t their_word;
    uint32_t their_key, psn;
    at_vrb_words *words;
    struct ibv_mr *words_mr;
    uint64_t posts[4];        /* calls, work requests, inline, with a completion of their own */
    uint32_t gathered;
    struct ibv_send_wr wr[AT_VRB_CHAIN];
    struct ibv_sge sge[AT_VRB_CHAIN];
};

typedef struct {
    at_fab fab; /* first */
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_comp_channel *channel;
    struct ibv_cq *cq;
    struct ibv_srq *srq;
    char node[64];
    uint8_t port;
    int ethernet;
    union ibv_gid gid;
    uint32_t gid_index;
    uint16_t lid;
    enum ibv_mtu mtu;
    uint32_t inline_bytes, reads; /* of one work request; under way at once */
    uint32_t connections, most_connections;
    uint32_t stocked;     /* receives in the queue */
    at_vqp *buckets[AT_VRB_BUCKETS];
    at_fab_entry *stash;
    uint32_t stashed, stash_first, stash_room;
    unsigned unacknowledged; /* events of the queue */
    uint64_t looked;         /* for events of the device, when */
} at_vrb;

static inline at_vrb *at_vrb_of(at_fab *fab) { return (at_vrb *)fab; }
static inline at_vqp *at_vqp_of(const at_fab_conn *conn) { return (at_vqp *)conn->ep; }

extern struct at_vrb_calls {
    struct ibv_device **(*get_device_list)(int *);
    void (*free_device_list)(struct ibv_device **);
    const char *(*get_device_name)(struct ibv_device *);
    struct ibv_context *(*open_device)(struct ibv_device *);
    int (*close_device)(struct ibv_context *);
    int (*query_device)(struct ibv_context *, struct ibv_device_attr *);
    int (*query_port)(struct ibv_context *, uint8_t, struct ibv_port_attr *);
    int (*query_gid)(struct ibv_context *, uint32_t, uint32_t, struct ibv_gid_entry *, uint32_t, size_t);
    struct ibv_pd *(*alloc_pd)(struct ibv_context *);
    int (*dealloc_pd)(struct ibv_pd *);
    struct ibv_mr *(*register_memory)(struct ibv_pd *, void *, size_t, uint64_t, unsigned);
    struct ibv_mr *(*register_dmabuf)(struct ibv_pd *, uint64_t, size_t, uint64_t, int, int); /* NULL: an old library */
    int (*deregister)(struct ibv_mr *);
    struct ibv_comp_channel *(*create_channel)(struct ibv_context *);
    int (*destroy_channel)(struct ibv_comp_channel *);
    struct ibv_cq *(*create_cq)(struct ibv_context *, int, void *, struct ibv_comp_channel *, int);
    int (*destroy_cq)(struct ibv_cq *);
    int (*get_cq_event)(struct ibv_comp_channel *, struct ibv_cq **, void **);
    void (*ack_cq_events)(struct ibv_cq *, unsigned);
    struct ibv_srq *(*create_srq)(struct ibv_pd *, struct ibv_srq_init_attr *);
    int (*destroy_srq)(struct ibv_srq *);
    struct ibv_qp *(*create_qp)(struct ibv_pd *, struct ibv_qp_init_attr *);
    int (*modify_qp)(struct ibv_qp *, struct ibv_qp_attr *, int);
    int (*destroy_qp)(struct ibv_qp *);
    int (*get_async_event)(struct ibv_context *, struct ibv_async_event *);
    void (*ack_async_event)(struct ibv_async_event *);
} at_vrb_library;

/* device.c: the port and the address that the rail goes by. 0, or an errno with the reason said */
int at_vrb_choose(at_vrb *vrb, const char *device);
int at_vrb_look_up(at_vrb *vrb); /* again: addresses come and go */

/* memory.c */
int at_vrb_enroll(at_fab *fab, const at_fab_memory *memory, unsigned use, at_fab_mr *out);
void at_vrb_dismiss(at_fab *fab, void *mr);
void *at_vrb_desc(void *mr);
int at_vrb_takes_dmabufs(at_vrb *vrb);

/* peer.c */
int at_vrb_qp_open(at_fab_conn *conn);
void at_vrb_qp_close(at_fab_conn *conn);
int at_vrb_qp_name(at_fab_conn *conn, at_fab_offer *out);
int at_vrb_qp_join(at_fab_conn *conn, const at_fab_offer *theirs);

/* post.c */
int at_vrb_post(at_fab_conn *conn, at_fab_wr *wr, const at_fab_vector *v, int read, int counts, uint64_t data);
int at_vrb_send(at_fab_conn *conn, at_fab_wr *wr);
int at_vrb_flush(at_fab_conn *conn);
void at_vrb_credit(at_vrb *vrb, at_vqp *q); /* give back what it has used up */

/* queue.c */
int at_vrb_read(at_fab *fab, at_fab_entry *entries, int most);
void at_vrb_stash_all(at_vrb *vrb); /* with fab->lock */
void at_vrb_handed_out(at_fab *fab);
void at_vrb_look(at_fab *fab);
int at_vrb_arm(at_fab *fab);

#endif
