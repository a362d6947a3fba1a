/* A simulated network beneath rails: endpoints with queues in order, which lose what is under way when a cable is cut.
 *
 * What an endpoint has sent is on its way even after that endpoint was closed, until the other side closes its own: as bytes in a socket's
 * buffers are. Memory is read when something lands, as a NIC does, and copied when the endpoint is closed before that. */
#include "fabric/fabric.h"

#include "simrail/decls.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define REFUSED 20u /* one post in so many, for now */
#define NOTICED 4u  /* one look at what is lost in so many notices */

enum { WIRE_WRITE, WIRE_READ, WIRE_CTRL };

typedef struct message message;
struct message {
    message *next;
    at_fab_wr *wr;
    int kind, landed, counts;
    uint64_t data;
    at_fab_vector v;
    uint8_t *copy; /* of what is written, once its memory may change */
    at_fab_ctrl ctrl;
};

typedef struct rail rail;
typedef struct endpoint endpoint;
struct endpoint {
    uint64_t id, to;
    rail *rail;
    at_fab_conn *conn; /* NULL: closed */
    uint32_t mark;
    uint64_t unique;
    int failed;
    message *head, *tail;
    at_fab_wr *receives[AT_FAB_RECEIVES * 2];
    uint32_t receive_count;
};

typedef struct {
    uint64_t key, address, nbytes;
    int live;
} memory;

struct rail {
    at_fab fab; /* first */
    at_simrail *net;
    uint32_t cable;
    at_fab_entry *entries;
    size_t first, count, room;
    memory **memories;
    uint32_t memory_count, memory_room;
};

struct at_simrail {
    uint64_t state;
    endpoint **endpoints;
    uint32_t count, room;
    uint64_t ids;
    uint64_t dead; /* by cable */
    int violations;
};

static uint32_t chance(at_simrail *net, uint32_t n) { /* splitmix64 */
    uint64_t z = (net->state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)((z ^ (z >> 31)) % n);
}

static int is_dead(const at_simrail *net, uint32_t cable) { return (net->dead >> cable & 1u) != 0; }

static endpoint *find(const at_simrail *net, uint64_t id) {
    for (uint32_t i = 0; i < net->count; i++)
        if (net->endpoints[i]->id == id) return net->endpoints[i];
    return NULL;
}

static void tell(rail *r, at_fab_entry entry) {
    if (r->first + r->count == r->room) {
        if (r->first != 0) memmove(r->entries, r->entries + r->first, r->count * sizeof *r->entries);
        r->first = 0;
        if (r->count == r->room) {
            r->room = r->room ? r->room * 2 : 256;
            r->entries = realloc(r->entries, r->room * sizeof *r->entries);
            if (r->entries == NULL) abort();
        }
    }
    r->entries[r->first + r->count++] = entry;
}

/* ---- the driver ---- */

static int simrail_open(at_fab_conn *conn) {
    rail *r = (rail *)conn->fab;
    at_simrail *net = r->net;
    if (is_dead(net, r->cable) && chance(net, 2)) return ENETDOWN; /* or it opens, and nothing gets through */
    if (at_grow((void ***)&net->endpoints, &net->room, net->count) != 0) return ENOMEM;
    endpoint *e = calloc(1, sizeof *e);
    if (e == NULL) return ENOMEM;
    *e = (endpoint){.id = ++net->ids, .rail = r, .conn = conn, .mark = conn->mark, .unique = conn->unique};
    net->endpoints[net->count++] = e;
    conn->ep = e;
    return 0;
}

static void message_free(message *m) {
    free(m->copy);
    free(m);
}

static message *pop(endpoint *e) {
    message *m = e->head;
    e->head = m->next;
    if (e->head == NULL) e->tail = NULL;
    return m;
}

static void keep_copy(message *m) {
    if (m->copy != NULL || m->v.bytes == 0) return;
    m->copy = malloc(m->v.bytes);
    if (m->copy == NULL) abort();
    uint8_t *at = m->copy;
    for (uint32_t i = 0; i < m->v.count; i++) {
        memcpy(at, m->v.here[i], m->v.nbytes[i]);
        at += m->v.nbytes[i];
    }
}

static void simrail_close(at_fab_conn *conn) {
    endpoint *e = conn->ep;
    while (e->head != NULL && e->head->landed) message_free(pop(e));
    message **at = &e->head;
    e->tail = NULL;
    while (*at != NULL) {
        message *m = *at;
        if (m->kind == WIRE_READ) { /* its answer has no receiver any more */
            *at = m->next;
            message_free(m);
            continue;
        }
        if (m->kind == WIRE_WRITE) keep_copy(m);
        m->wr = NULL;
        e->tail = m;
        at = &m->next;
    }
    e->conn = NULL;
    e->receive_count = 0;
    conn->ep = NULL;
}

static int simrail_name(at_fab_conn *conn, at_fab_offer *out) {
    const endpoint *e = conn->ep;
    memcpy(out->address, &e->id, sizeof e->id);
    out->address_bytes = sizeof e->id;
    return 0;
}

static int simrail_join(at_fab_conn *conn, const at_fab_offer *theirs) {
    memcpy(&((endpoint *)conn->ep)->to, theirs->address, sizeof(uint64_t));
    return 0;
}

static int simrail_receive(at_fab_conn *conn, at_fab_wr *wr) {
    endpoint *e = conn->ep;
    if (e->receive_count == AT_FAB_RECEIVES * 2) return ENOBUFS;
    e->receives[e->receive_count++] = wr;
    return 0;
}

static int enqueue(at_fab_conn *conn, const message *what) {
    message *m = malloc(sizeof *m);
    if (m == NULL) return ENOMEM;
    *m = *what;
    endpoint *e = conn->ep;
    if (e->tail != NULL) e->tail->next = m;
    else e->head = m;
    e->tail = m;
    return 0;
}

static int simrail_send(at_fab_conn *conn, at_fab_wr *wr) {
    if (chance(((rail *)conn->fab)->net, REFUSED) == 0) return EAGAIN;
    message m = {.wr = wr, .kind = WIRE_CTRL, .ctrl = wr->ctrl};
    return enqueue(conn, &m);
}

static int simrail_post(at_fab_conn *conn, at_fab_wr *wr, const at_fab_vector *v, int read, int counts, uint64_t data) {
    if (chance(((rail *)conn->fab)->net, REFUSED) == 0) return EAGAIN;
    message m = {.wr = wr, .kind = read ? WIRE_READ : WIRE_WRITE, .counts = counts, .data = data, .v = *v};
    return enqueue(conn, &m);
}

static int simrail_read(at_fab *fab, at_fab_entry *out, int most) {
    rail *r = (rail *)fab;
    int n = 0;
    for (; n < most && r->count != 0; r->count--) out[n++] = r->entries[r->first++];
    return n;
}

static int simrail_arm(at_fab *fab) {
    (void)fab;
    return 1;
}

static int simrail_enroll(at_fab *fab, const at_fab_memory *wanted, unsigned use, at_fab_mr *out) {
    (void)use;
    rail *r = (rail *)fab;
    if (at_grow((void ***)&r->memories, &r->memory_room, r->memory_count) != 0) return ENOMEM;
    memory *m = calloc(1, sizeof *m);
    if (m == NULL) return ENOMEM;
    uint64_t key = (uint64_t)(r->cable + 1) << 32 | (r->memory_count + 1); /* of another rail it is good for nothing */
    *m = (memory){key, wanted->address, wanted->nbytes, 1};
    r->memories[r->memory_count++] = m;
    *out = (at_fab_mr){.mr = m, .key = m->key};
    return 0;
}

static void simrail_dismiss(at_fab *fab, void *mr) {
    (void)fab;
    ((memory *)mr)->live = 0;
}

static void *simrail_desc(void *mr) { return mr; }
static const char *simrail_text(int error) { return strerror(error); }

static void simrail_free(at_fab *fab) {
    rail *r = (rail *)fab;
    for (uint32_t i = 0; i < r->memory_count; i++) free(r->memories[i]);
    free(r->memories);
    free(r->entries);
    free(r);
}

static const at_fab_driver driver = {
    .open = simrail_open, .close = simrail_close, .name = simrail_name, .join = simrail_join, .receive = simrail_receive, .send = simrail_send,
    .post = simrail_post, .read = simrail_read, .arm = simrail_arm, .enroll = simrail_enroll, .dismiss = simrail_dismiss, .desc = simrail_desc,
    .text = simrail_text, .free = simrail_free,
};

int at_simrail_rail(at_lane *lane, at_simrail *net, uint32_t cable, uint32_t flags, uint64_t most_bytes, uint32_t iov, at_fab **out) {
    rail *r = calloc(1, sizeof *r);
    if (r == NULL) return AT_ENOMEM;
    r->net = net;
    r->cable = cable;
    at_fab *fab = &r->fab;
    int rc = at_fab_prepare(fab, lane, &driver);
    fab->facts.flags = flags | AT_FAB_PRIVATE | AT_FAB_VIRTUAL | AT_FAB_KEYS;
    fab->facts.iov = iov;
    fab->facts.most_bytes = most_bytes;
    fab->facts.most_posted = 4096;
    if (rc == AT_OK) rc = at_fab_begin(fab, "simrail");
    if (rc != AT_OK) at_fab_undo(fab, 0);
    else *out = fab;
    return rc;
}

/* ---- what happens ---- */

static int is_lent(at_simrail *net, const rail *r, uint64_t key, uint64_t address, uint64_t nbytes) {
    uint32_t n = (uint32_t)key;
    const memory *m = n != 0 && n <= r->memory_count ? r->memories[n - 1] : NULL;
    if (m != NULL && m->key == key && m->live && address >= m->address && address - m->address <= m->nbytes &&
        nbytes <= m->nbytes - (address - m->address))
        return 1;
    net->violations++;
    return 0;
}

static int land(at_simrail *net, message *m, endpoint *there) {
    rail *r = there->rail;
    if (m->kind == WIRE_CTRL) {
        if (there->receive_count == 0) return 0;
        at_fab_wr *wr = there->receives[--there->receive_count];
        wr->ctrl = m->ctrl;
        tell(r, (at_fab_entry){.wr = wr});
        return 1;
    }
    const uint8_t *from = m->copy;
    for (uint32_t i = 0; i < m->v.count; i++) {
        uint64_t n = m->v.nbytes[i];
        if (n == 0 || !is_lent(net, r, m->v.key, m->v.there[i], n)) continue;
        uint8_t *far = (uint8_t *)(uintptr_t)m->v.there[i];
        if (m->kind == WIRE_READ) memcpy(m->v.here[i], far, n);
        else memcpy(far, from != NULL ? from : m->v.here[i], n);
        if (from != NULL) from += n;
    }
    if (m->counts) tell(r, (at_fab_entry){.arrival = 1, .data = m->data, .mark = there->mark, .unique = there->unique});
    return 1;
}

static int lost(at_simrail *net, endpoint *e, int error) {
    if (e->conn == NULL) { /* no connection is there to notice */
        while (e->head != NULL) message_free(pop(e));
        return 1;
    }
    if (e->failed || chance(net, NOTICED) != 0) return 0;
    e->failed = 1;
    tell(e->rail, (at_fab_entry){.wr = e->head->wr, .error = error});
    return 1;
}

static int step(at_simrail *net) {
    if (net->count == 0) return 0;
    endpoint *e = net->endpoints[chance(net, net->count)];
    if (e->head == NULL) return 0;
    endpoint *there = find(net, e->to);
    if (is_dead(net, e->rail->cable) || (there != NULL && is_dead(net, there->rail->cable))) return e->conn != NULL && lost(net, e, ETIMEDOUT);
    if (there == NULL || there->conn == NULL) return lost(net, e, ECONNRESET);
    message *m = e->head;
    if (m->landed && chance(net, 2)) {
        if (e->conn != NULL) tell(e->rail, (at_fab_entry){.wr = m->wr});
        message_free(pop(e));
        return 1;
    }
    while (m != NULL && m->landed) m = m->next;
    if (m == NULL || !land(net, m, there)) return 0;
    m->landed = 1;
    if (e->conn == NULL) { /* its sender has gone: nothing confirms it */
        while (e->head != NULL && e->head->landed) message_free(pop(e));
    }
    return 1;
}

static void sweep(at_simrail *net) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < net->count; i++) {
        endpoint *e = net->endpoints[i];
        if (e->conn == NULL && e->head == NULL) free(e);
        else net->endpoints[kept++] = e;
    }
    net->count = kept;
}

int at_simrail_step(at_simrail *net, uint32_t steps) {
    int done = 0;
    sweep(net);
    for (uint32_t i = 0; i < steps; i++) done += step(net);
    return done;
}

void at_simrail_cut(at_simrail *net, uint32_t cable, int dead) {
    net->dead = dead ? net->dead | UINT64_C(1) << cable : net->dead & ~(UINT64_C(1) << cable);
}

int at_simrail_violations(const at_simrail *net) { return net->violations; }

at_simrail *at_simrail_new(uint64_t seed) {
    at_simrail *net = calloc(1, sizeof *net);
    if (net != NULL) net->state = seed;
    return net;
}

void at_simrail_free(at_simrail *net) {
    for (uint32_t i = 0; net != NULL && i < net->count; i++) {
        while (net->endpoints[i]->head != NULL) message_free(pop(net->endpoints[i]));
        free(net->endpoints[i]);
    }
    if (net != NULL) free(net->endpoints);
    free(net);
}
