/* What libibverbs itself gives: two processes, one of which writes into the other's memory as directly as C can.
 *
 *     verbs_reference DEVICE_HERE DEVICE_THERE REGION_BYTES
 *
 * `make bench-guest` measures ours against it on soft-RoCE. One reliable connection, RDMA writes with an immediate each; a batch is
 * one chain, posted by one call, and its last work request alone asks for a completion. The target keeps receives there. Whoever has
 * nothing to do sleeps on the completion channel, armed first. What it leaves out is everything else: it checks nothing, serves one
 * peer, cancels nothing, and ends at the first error.
 *
 * The child is the target. The parent obeys one line at a time, a JSON object of exactly this form, and answers with one:
 *
 *     {"case": "batch", "arguments": [4096, 256], "times": 3}    ->  {"seconds": 0.0123}    for one of the three
 *
 *     batch   bytes, count      so many writes in a chain; over when the last is acknowledged
 *     single  bytes, count      so many, each when the one before is acknowledged */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <infiniband/verbs.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST 512u      /* work requests of a batch */
#define RECEIVES 2048u /* several batches: the target may lag behind */
#define POLL 64

typedef struct {
    uint32_t number, key;
    uint64_t base;
    union ibv_gid gid;
} address;

typedef struct {
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_comp_channel *channel;
    struct ibv_cq *cq;
    struct ibv_qp *qp;
    struct ibv_mr *mr;
    uint8_t *memory;
    size_t nbytes;
    address there;
    int gid_index;
} side;

static void fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    printf("{\"error\": \"");
    vprintf(format, list);
    printf("\"}\n");
    va_end(list);
    fflush(stdout);
    exit(1);
}

static void check(int rc, const char *what) {
    if (rc != 0) fail("%s: %s", what, strerror(rc < 0 ? -rc : rc));
}

static void *made(void *object, const char *what) {
    if (object == NULL) fail("no %s", what);
    return object;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- opening ---- */

static void find(side *s, const char *name) {
    int count = 0;
    struct ibv_device **devices = ibv_get_device_list(&count);
    for (int i = 0; i < count; i++)
        if (strcmp(ibv_get_device_name(devices[i]), name) == 0) s->context = ibv_open_device(devices[i]);
    if (s->context == NULL) fail("no device %s", name);
    ibv_free_device_list(devices);
}

/* The first address of RoCE v2 that is IPv4's. */
static void find_gid(side *s, union ibv_gid *gid) {
    for (uint32_t i = 0; i < 16; i++) {
        struct ibv_gid_entry entry;
        if (ibv_query_gid_ex(s->context, 1, i, &entry, 0) != 0 || entry.gid_type != IBV_GID_TYPE_ROCE_V2 || entry.gid.raw[11] != 0xff) continue;
        *gid = entry.gid;
        s->gid_index = (int)i;
        return;
    }
    fail("no address");
}

static void join(side *s) {
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE};
    check(ibv_modify_qp(s->qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS), "init");
    struct ibv_port_attr port;
    check(ibv_query_port(s->context, 1, &port), "port");
    struct ibv_qp_attr receive = {.qp_state = IBV_QPS_RTR, .path_mtu = port.active_mtu, .dest_qp_num = s->there.number, .max_dest_rd_atomic = 1, .min_rnr_timer = 1};
    receive.ah_attr = (struct ibv_ah_attr){.is_global = 1, .port_num = 1, .grh = {.dgid = s->there.gid, .sgid_index = (uint8_t)s->gid_index, .hop_limit = 64}};
    check(ibv_modify_qp(s->qp, &receive, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
                                             IBV_QP_MIN_RNR_TIMER), "ready to receive");
    struct ibv_qp_attr send = {.qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 6, .rnr_retry = 7, .max_rd_atomic = 1};
    check(ibv_modify_qp(s->qp, &send, IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC), "ready to send");
}

static void open_side(side *s, const char *device, size_t nbytes, int socket) {
    find(s, device);
    s->pd = made(ibv_alloc_pd(s->context), "protection domain");
    s->channel = made(ibv_create_comp_channel(s->context), "channel");
    s->cq = made(ibv_create_cq(s->context, (int)(MOST + RECEIVES), NULL, s->channel, 0), "completion queue");
    struct ibv_qp_init_attr init = {.send_cq = s->cq, .recv_cq = s->cq, .qp_type = IBV_QPT_RC,
                                    .cap = {.max_send_wr = MOST, .max_recv_wr = RECEIVES, .max_send_sge = 1, .max_recv_sge = 1}};
    s->qp = made(ibv_create_qp(s->pd, &init), "queue pair");
    s->nbytes = nbytes;
    s->memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); /* as ours from allocate() */
    if (s->memory == MAP_FAILED) fail("no memory");
    memset(s->memory, 1, nbytes);
    s->mr = made(ibv_reg_mr(s->pd, s->memory, nbytes, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE), "memory region");
    address here = {.number = s->qp->qp_num, .key = s->mr->rkey, .base = (uint64_t)(uintptr_t)s->memory};
    find_gid(s, &here.gid);
    if (write(socket, &here, sizeof here) != sizeof here || recv(socket, &s->there, sizeof s->there, MSG_WAITALL) != sizeof s->there) fail("the other side is gone");
    join(s);
}

/* ---- completions ---- */

/* How many there are now, of writes; of receives as many are posted again. */
static int drain(side *s) {
    static struct ibv_recv_wr fresh[POLL], *bad;
    struct ibv_wc wc[POLL];
    int written = 0;
    for (int n = POLL; n == POLL;) {
        n = ibv_poll_cq(s->cq, POLL, wc);
        int received = 0;
        for (int i = 0; i < n; i++) {
            if (wc[i].status != IBV_WC_SUCCESS) fail("a completion failed: %s", ibv_wc_status_str(wc[i].status));
            if (wc[i].opcode == IBV_WC_RDMA_WRITE) written++;
            else received++;
        }
        for (int i = 0; i < received; i++) fresh[i].next = i + 1 < received ? &fresh[i + 1] : NULL;
        if (received != 0) check(ibv_post_recv(s->qp, fresh, &bad), "receives");
    }
    return written;
}

/* Sleep until there is at least one. */
static int await_some(side *s) {
    for (;;) {
        int written = drain(s);
        if (written != 0) return written;
        check(ibv_req_notify_cq(s->cq, 0), "arm");
        if ((written = drain(s)) != 0) return written;
        struct ibv_cq *cq;
        void *context;
        check(ibv_get_cq_event(s->channel, &cq, &context), "event");
        ibv_ack_cq_events(cq, 1);
    }
}

static void serve(side *s, int socket) {
    struct ibv_recv_wr one = {0}, *bad;
    for (uint32_t i = 0; i < RECEIVES; i++) check(ibv_post_recv(s->qp, &one, &bad), "receive");
    if (write(socket, "r", 1) != 1) _exit(0);
    (void)await_some(s); /* it is killed with its parent: nothing of its own ever completes */
}

/* ---- writing ---- */

static void post(side *s, uint64_t nbytes, uint64_t first, uint32_t count) {
    static struct ibv_send_wr wr[MOST], *bad;
    static struct ibv_sge sge[MOST];
    uint64_t places = s->nbytes / nbytes;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t at = (first + i) % places * nbytes;
        sge[i] = (struct ibv_sge){.addr = (uint64_t)(uintptr_t)s->memory + at, .length = (uint32_t)nbytes, .lkey = s->mr->lkey};
        wr[i] = (struct ibv_send_wr){.wr_id = i, .next = i + 1 < count ? &wr[i + 1] : NULL, .sg_list = &sge[i], .num_sge = 1,
                                     .opcode = IBV_WR_RDMA_WRITE_WITH_IMM, .imm_data = htonl(3), .send_flags = i + 1 < count ? 0 : IBV_SEND_SIGNALED};
        wr[i].wr.rdma.remote_addr = s->there.base + at;
        wr[i].wr.rdma.rkey = s->there.key;
    }
    check(ibv_post_send(s->qp, wr, &bad), "post");
}

static double batch(side *s, uint64_t nbytes, uint64_t count, uint64_t times) {
    double start = now();
    for (uint64_t k = 0; k < times; k++) {
        post(s, nbytes, 0, (uint32_t)count);
        (void)await_some(s);
    }
    return (now() - start) / (double)times;
}

static double single(side *s, uint64_t nbytes, uint64_t count, uint64_t times) {
    double start = now();
    for (uint64_t k = 0; k < times; k++) {
        for (uint64_t i = 0; i < count; i++) {
            post(s, nbytes, i, 1);
            (void)await_some(s);
        }
    }
    return (now() - start) / (double)times;
}

static void obey(side *s) {
    char line[256], name[16];
    while (fgets(line, sizeof line, stdin) != NULL) {
        unsigned long long a[2] = {0, 0}, times = 1;
        const char *rest = strstr(line, "\"times\":");
        if (sscanf(line, "{\"case\": \"%15[a-z]\", \"arguments\": [%llu, %llu", name, &a[0], &a[1]) < 3 || rest == NULL ||
            sscanf(rest, "\"times\": %llu", &times) != 1 || times == 0)
            fail("not an order");
        double seconds = -1;
        int possible = a[0] != 0 && a[0] <= s->nbytes && a[1] != 0 && a[1] <= MOST;
        if (strcmp(name, "batch") == 0 && possible) seconds = batch(s, a[0], a[1], times);
        else if (strcmp(name, "single") == 0 && possible) seconds = single(s, a[0], a[1], times);
        if (seconds < 0) printf("{\"missing\": true}\n");
        else printf("{\"seconds\": %.9f}\n", seconds);
        fflush(stdout);
    }
}

int main(int argc, char **argv) {
    int sockets[2];
    char ready;
    if (argc != 4) fail("usage: verbs_reference DEVICE_HERE DEVICE_THERE REGION_BYTES");
    size_t nbytes = strtoull(argv[3], NULL, 10);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) != 0) fail("socketpair");
    pid_t child = fork();
    if (child < 0) fail("fork");
    static side s;
    if (child == 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(sockets[0]);
        open_side(&s, argv[2], nbytes, sockets[1]);
        serve(&s, sockets[1]);
        _exit(0);
    }
    close(sockets[1]);
    open_side(&s, argv[1], nbytes, sockets[0]);
    if (recv(sockets[0], &ready, 1, MSG_WAITALL) != 1) fail("the target is gone");
    (void)batch(&s, 64, 1, 1);
    printf("{\"ready\": true, \"how\": \"C, libibverbs, %s to %s, a chain per batch, sleeps on the channel\"}\n", argv[1], argv[2]);
    fflush(stdout);
    obey(&s);
    close(sockets[0]);
    (void)kill(child, SIGKILL);
    (void)waitpid(child, NULL, 0);
    return 0;
}
