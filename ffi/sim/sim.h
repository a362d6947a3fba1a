/* Inside the simulator.
 *
 * A member is a lane in the net, an end is one lane's side of a connection, a request is one posted work request.
 *
 * Locks. A lane's lock may be held when the net's is taken, never the other way round, and never two lanes' at once. So a delivery
 * takes its request out of the heap (state MOVING, both members pinned), and then locks the target's lane for the arrival and the
 * source's for the completion, one after the other. A lane that leaves waits until nothing pins it.
 *
 * A revocation raises the epoch and then looks for requests that are MOVING or HALF under the grant; a delivery becomes MOVING
 * and then looks at the epoch: whichever came first, either the delivery is refused or the revocation sees it. */
#ifndef AT_SIM_H
#define AT_SIM_H

#include "lane/lane.h"

#include "sim/decls.h"

typedef struct at_member at_member;
typedef struct at_end at_end;
typedef struct at_request at_request;

struct at_member {
    at_rail rail; /* first: the lane knows it by this */
    at_member *next;
    at_net *net;
    at_lane *lane;
    uint64_t incarnation;
    uint32_t pins, ends;
    int held, dead, left, stopped;
};

struct at_end {
    at_end *next;
    at_member *home;
    uint64_t to;
    at_peer *peer;
    at_control_ref *control; /* of the other side: its epoch words outlive it */
    uint64_t last_serial;    /* the latest request delivered, to notice reordering */
    uint64_t pong;
    uint32_t pins;
    int gone, told;
};

enum at_request_state { AT_REQ_WAITING, AT_REQ_HALF, AT_REQ_MOVING };

struct at_request {
    at_request *next; /* while parked or moving */
    uint64_t when, serial;
    at_end *end;
    at_op *op;
    uint8_t *local, *remote;
    int reads; /* from remote to local */
    int file;  /* memory of either side may be taken away */
    uint64_t n, done;
    int64_t imm;
    const _Atomic uint64_t *word; /* NULL: a signal */
    uint64_t epoch;
    uint32_t slot;
    int state;
};

struct at_net {
    pthread_mutex_t lock;
    pthread_cond_t unpinned;
    at_net_config config;
    uint32_t users; /* the maker and the members */
    uint64_t random, serial;
    at_net_counts counts;
    at_member *members;
    at_end *ends;
    at_request **heap;
    uint32_t heap_count, heap_room;
    at_request *parked, *moving;
};

/* net.c, with the net's lock */
uint64_t at_net_draw(at_net *net);
int at_net_chance(at_net *net, uint32_t per_mille);
void at_net_mark(at_net *net, uint64_t what, uint64_t a, uint64_t b);
at_member *at_member_find(at_net *net, uint64_t incarnation);
at_end *at_end_find(at_net *net, uint64_t home, uint64_t to);
int at_heap_push(at_net *net, at_request *request);
at_request *at_heap_pop(at_net *net);
/* Take out every request that is waiting, half or parked and for which want() says so; a list. */
at_request *at_net_take(at_net *net, int (*want)(const at_request *, const void *), const void *arg);
void at_net_unpark(at_net *net);
void at_unpin(at_net *net, at_member *member);
void at_net_unlock(at_net *net, at_member *maybe_over); /* frees a member that has left with its last end, and so the net */

/* deliver.c */
at_request *at_take_due(at_net *net, uint64_t until); /* with the net's lock */
void at_deliver(at_net *net, at_request *request);    /* without any lock */
void at_request_end(at_net *net, at_request *request, uint64_t units, int status); /* without any lock */

/* member.c */
at_member *at_member_of(at_lane *lane); /* with the lane's lock: its place in a network, or NULL */

/* peer.c */
extern const at_port at_sim_port;

#endif
