/* What the native code costs a core for each work request over verbs, when the driver's part is taken away (stub_verbs.c).
 *
 *     verbs_cost CASE TIMES    one line of JSON: CPU of this thread, work requests, calls of the driver, times they were measured
 *
 *     pages     TABLE random pages of 4 KiB in one call, an immediate each
 *     plain     the same without immediates
 *     writes    BURST writes of 4 KiB, an immediate each, one call each; then their ends are taken
 *     arrivals  TABLE immediates arrive and are counted
 *     peers     a prepared scatter, one write to each of 56 peers: until the driver has the last of them ("span": the median round)
 *     stub      what of this the stub costs: chains of 16 posted, and their completions polled
 *
 * Two lanes of one process; what the writer posts goes nowhere, and its credit comes back at once. `make bench-verbs` builds and runs it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "native.h"
#include "stub_verbs.h"

#define TABLE 4096u
#define PAGE 4096u
#define BURST 64u
#define PEERS 56u
#define IMM 7u
#define NBYTES ((uint64_t)TABLE * PAGE)
#define WORD_AT 32u /* in an offer of verbs: where credit is given back (ffi/verbs/peer.c) */
#define NUMBER_AT 4u

typedef struct {
    at_lane *lane;
    at_fab *fab;
    struct ibv_context *context;
    int64_t region;
} side;

typedef struct {
    int64_t peer, remote;
    uint32_t number; /* of the target's queue pair */
} connection;

static side writer, target;
static connection connections[PEERS];
static int64_t here[TABLE], there[TABLE];

static void check(int64_t rc, const char *what) {
    if (rc >= 0) return;
    fprintf(stderr, "%s: %s (%s)\n", what, at_strerror((int)rc), at_fab_why());
    exit(1);
}

static double seconds_of(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- two sides and what is between them ---- */

static void open_side(side *s, uint64_t incarnation) {
    const at_lane_config config = {.inline_bytes = 1 << 20, .turn_ns = 1000000, .max_ops = 1 << 16, .max_bytes = UINT64_C(1) << 40, .early_values = 1024};
    s->lane = at_lane_new(incarnation, &config);
    if (s->lane == NULL) exit(1);
    at_fab_facts facts;
    check(at_verbs_open(s->lane, NULL, NULL, 0, 0, &s->fab, &facts), "no rail");
    s->context = stub_context;
    void *memory = mmap(NULL, NBYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    s->region = at_region_add(s->lane, memory, NBYTES);
    check(s->region, "no region");
}

static void connect_them(connection *c) {
    at_fab_offer ours, theirs;
    int64_t back = at_fab_peer(target.lane, target.fab);
    c->peer = at_fab_peer(writer.lane, writer.fab);
    check(back, "no peer");
    check(c->peer, "no peer");
    check(at_fab_offer_make(writer.lane, c->peer, 1, &ours), "no offer");
    check(at_fab_offer_make(target.lane, back, 1, &theirs), "no offer");
    uint32_t number;
    uint64_t word;
    memcpy(&number, ours.address + NUMBER_AT, sizeof number);
    memcpy(&word, ours.address + WORD_AT, sizeof word);
    memcpy(&c->number, theirs.address + NUMBER_AT, sizeof c->number);
    stub_gives_credit(writer.context, number, (_Atomic uint64_t *)(uintptr_t)word);
    check(at_fab_offer_take(target.lane, back, &ours, 0), "no connection");
    check(at_fab_offer_take(writer.lane, c->peer, &theirs, 1), "no connection");
    uint64_t epoch, address, key;
    int64_t slot = at_grant_new(target.lane, &epoch);
    check(slot, "no grant");
    check(at_fab_export_key(target.lane, back, slot, epoch, target.region, 0, NBYTES, AT_ACCESS_WRITE, &address, &key), "not lent");
    c->remote = at_fab_import_key(writer.lane, c->peer, address, key, NBYTES, AT_ACCESS_WRITE, (uint32_t)slot, epoch);
    check(c->remote, "not borrowed");
}

static void prepare(uint32_t peers) {
    check(at_verbs_load(NULL), "the stub is not found");
    open_side(&writer, 1);
    open_side(&target, 2);
    for (uint32_t i = 0; i < peers; i++) connect_them(&connections[i]);
    uint64_t random = 1;
    for (uint32_t i = 0; i < TABLE; i++) here[i] = there[i] = i;
    for (uint32_t i = TABLE - 1; i != 0; i--) { /* no two neighbours here are neighbours there */
        random = random * UINT64_C(6364136223846793005) + 1;
        uint32_t j = (uint32_t)(random >> 33) % (i + 1);
        int64_t one = there[i];
        there[i] = there[j];
        there[j] = one;
    }
}

/* ---- cases: work requests of one round ---- */

static void until_ended(int64_t wanted) {
    for (int64_t ended = 0; ended < wanted;) {
        int n = at_poll(writer.lane);
        check(n, "poll");
        const at_events *events = at_lane_events(writer.lane);
        for (int i = 0; i < n; i++) {
            if (events->kind[i] != AT_EV_OP) continue;
            check(events->status[i], "a transfer");
            ended++;
        }
    }
}

static uint64_t pages_with(int64_t imm) {
    int64_t rc = at_write_pages(writer.lane, connections[0].remote, writer.region, here, there, TABLE, PAGE, PAGE, PAGE, 0, 0, imm);
    check(rc, "pages");
    until_ended(1);
    return TABLE;
}

static uint64_t pages(void) { return pages_with(IMM); }
static uint64_t plain(void) { return pages_with(-1); }

static uint64_t writes(void) {
    for (uint32_t i = 0; i < BURST; i++)
        check(at_write(writer.lane, connections[0].remote, (uint64_t)there[i] * PAGE, writer.region, (uint64_t)i * PAGE, PAGE, IMM), "a write");
    until_ended(BURST);
    return BURST;
}

static uint64_t arrivals(void) {
    static int64_t record;
    if (record == 0) check(record = at_imm_open(target.lane, IMM), "no counter");
    for (uint32_t left = TABLE; left != 0;) { /* as many at once as one connection has credit for */
        uint32_t n = stub_arrive(target.context, connections[0].number, IMM, left < 96 ? left : 96);
        left -= n;
        check(at_poll(target.lane), "poll");
        if (n == 0 && stub.calls == 0) exit(1);
    }
    if (at_imm_take(target.lane, record, TABLE, 0) == 0) exit(1);
    return TABLE;
}

static uint64_t *spans, rounds; /* ns: of a scatter, until the driver had its last */

static int by_length(const void *a, const void *b) {
    uint64_t one = *(const uint64_t *)a, other = *(const uint64_t *)b;
    return one < other ? -1 : one > other;
}

static uint64_t peers(void) {
    static at_plan *plan;
    int status = AT_OK;
    if (plan == NULL) {
        int64_t remotes[PEERS];
        uint64_t from[PEERS], to[PEERS], nbytes[PEERS];
        for (uint32_t i = 0; i < PEERS; i++) {
            remotes[i] = connections[i].remote;
            from[i] = to[i] = (uint64_t)i * PAGE;
            nbytes[i] = PAGE;
        }
        plan = at_plan_scatter(writer.lane, writer.region, PEERS, remotes, from, to, nbytes, &status);
        check(status, "a plan");
    }
    struct timespec start;
    stub.stamped = stub.calls + PEERS;
    clock_gettime(CLOCK_MONOTONIC, &start);
    int64_t cookie = at_plan_post(writer.lane, plan, IMM);
    check(cookie, "a scatter");
    if (spans != NULL) spans[rounds++] = stub.stamp - ((uint64_t)start.tv_sec * 1000000000u + (uint64_t)start.tv_nsec);
    until_ended(1);
    int32_t results[PEERS];
    check(at_batch_take(writer.lane, cookie, results, PEERS), "results");
    return PEERS;
}

static uint64_t bare(void) {
    static struct ibv_qp qp;
    static struct ibv_send_wr wr[16];
    struct ibv_send_wr *bad;
    struct ibv_wc wc[32];
    struct ibv_cq cq = {.context = writer.context};
    qp.context = writer.context;
    while (writer.context->ops.poll_cq(&cq, 32, wc) != 0) continue; /* what making the connection has left */
    for (uint32_t i = 0; i < TABLE / 16; i++) {
        for (uint32_t k = 0; k < 16; k++) wr[k] = (struct ibv_send_wr){.next = k < 15 ? &wr[k + 1] : NULL, .send_flags = k < 15 ? 0 : IBV_SEND_SIGNALED};
        if (writer.context->ops.post_send(&qp, wr, &bad) != 0) exit(1);
        if (i % 4 == 3 && writer.context->ops.poll_cq(&cq, 32, wc) != 4) exit(1);
    }
    return TABLE;
}

typedef uint64_t (*one_case)(void);

static one_case find(const char *name) {
    const struct {
        const char *name;
        one_case run;
    } known[] = {{"pages", pages}, {"plain", plain}, {"writes", writes}, {"arrivals", arrivals}, {"peers", peers}, {"stub", bare}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strcmp(name, known[i].name) == 0) return known[i].run;
    fprintf(stderr, "no case %s\n", name);
    exit(2);
}

/* A name of its own: callgrind counts what is in here. */
__attribute__((noinline)) static uint64_t measured(one_case run, uint64_t times) {
    uint64_t requests = 0;
    while (times-- != 0) requests += run();
    return requests;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    one_case run = find(argv[1]);
    prepare(run == peers ? PEERS : 1);
    for (int i = 0; i < 3; i++) (void)run(); /* memory is touched, tables have grown */
    stub = (stub_counts){0};
    uint64_t times = strtoull(argv[2], NULL, 10);
    if (times == 0 || times > 1000000 || (spans = calloc(times, sizeof *spans)) == NULL) return 2;
    double cpu = seconds_of(CLOCK_THREAD_CPUTIME_ID);
    uint64_t requests = measured(run, times);
    cpu = seconds_of(CLOCK_THREAD_CPUTIME_ID) - cpu;
    if (rounds != 0) qsort(spans, rounds, sizeof *spans, by_length);
    printf("{\"case\": \"%s\", \"cpu\": %.9f, \"span\": %.9f, \"requests\": %llu, \"posted\": %llu, \"calls\": %llu, \"times\": %llu}\n", argv[1], cpu, (double)spans[rounds / 2] * 1e-9,
           (unsigned long long)requests, (unsigned long long)stub.requests, (unsigned long long)stub.calls, (unsigned long long)times);
    free(spans);
    at_lane_free(writer.lane);
    at_lane_free(target.lane);
    return 0;
}
