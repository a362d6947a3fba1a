/* What libfabric itself gives: two processes that write into each other's memory as directly as C can.
 *
 *     fabric_reference LIBRARY PROVIDER REGION_BYTES
 *
 * `make bench-tcp` measures ours against it. Everything that decides about speed is as in ffi/fabric: the same hints, one endpoint of
 * type RDM on either side, delivery complete and remote completion data on every write, at most WINDOW work requests under way, and
 * whoever has nothing to do sleeps in poll() on the descriptor of the completion queue, armed by fi_trywait. What it leaves out is
 * everything else: it checks nothing, serves one peer, and ends at the first error.
 *
 * It forks before it loads the library, so that each side has one of its own: the child is the target. The parent obeys one line at
 * a time, a JSON object of exactly this form, and answers with one:
 *
 *     {"case": "stream", "arguments": [65536, 1024], "times": 3}    ->  {"seconds": 0.0123}    for one of the three
 *
 *     stream  bytes, count      so many writes, one after the other in memory; over when all are delivered
 *     pages   bytes, per        TABLE writes of random places, `per` of them in one work request (1 to 4)
 *     latency                   64 bytes there and 64 bytes back, each with an immediate, PINGS times: the median of a round trip */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#define WINDOW 64u
#define BATCH 64
#define TABLE 4096u
#define PINGS 1000u
#define PING_BYTES 64u
#define MOST_IOV 4u

typedef struct {
    uint8_t name[128];
    size_t name_bytes;
    uint64_t base, key;
} address;

/* From the parent to the child, and back when it is ready. */
typedef struct {
    uint64_t pings; /* so many writes of ours are to be answered by one each */
} order;

typedef struct {
    struct fi_info *info;
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fid_av *av;
    struct fid_cq *cq;
    struct fid_wait *wait; /* before 2.0, where fi_trywait does nothing and the descriptor would stay readable for ever */
    struct fid_ep *ep;
    struct fid_mr *mr;
    int fd;
    fi_addr_t to;
    address there;
    uint8_t *memory;
    size_t nbytes;
    uint64_t under_way, arrived;
    char version[16];
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

static void check(long rc, const char *what) {
    if (rc != 0) fail("%s: %s", what, strerror((int)(rc < 0 ? -rc : rc)));
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- opening ---- */

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (found == NULL) fail("no %s", name);
    return found;
}

static void find(side *s, const char *file, const char *provider) {
    void *library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) fail("%s cannot be loaded", file);
    int (*getinfo)(uint32_t, const char *, const char *, uint64_t, const struct fi_info *, struct fi_info **);
    struct fi_info *(*dupinfo)(const struct fi_info *);
    int (*fabric)(struct fi_fabric_attr *, struct fid_fabric **, void *);
    uint32_t (*version)(void);
    *(void **)&getinfo = symbol(library, "fi_getinfo");
    *(void **)&dupinfo = symbol(library, "fi_dupinfo");
    *(void **)&fabric = symbol(library, "fi_fabric");
    *(void **)&version = symbol(library, "fi_version");
    struct fi_info *hints = dupinfo(NULL);
    if (hints == NULL) fail("no memory");
    hints->caps = FI_MSG | FI_RMA | FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE | FI_SEND | FI_RECV;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
    hints->domain_attr->cq_data_size = 4;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->data_progress = FI_PROGRESS_AUTO;
    hints->tx_attr->msg_order = hints->rx_attr->msg_order = FI_ORDER_WAW;
    hints->fabric_attr->prov_name = strdup(provider);
    uint32_t asked = version() < FI_VERSION(1, 22) ? version() : FI_VERSION(1, 22);
    check(getinfo(asked, "127.0.0.1", NULL, FI_SOURCE, hints, &s->info), "getinfo");
    (void)snprintf(s->version, sizeof s->version, "%u.%u", FI_MAJOR(version()), FI_MINOR(version()));
    check(fabric(s->info->fabric_attr, &s->fabric, NULL), "fabric");
}

static void exchange(side *s, int socket) {
    address here = {.name_bytes = sizeof here.name, .key = fi_mr_key(s->mr)};
    check(fi_getname(&s->ep->fid, here.name, &here.name_bytes), "getname");
    if (s->info->domain_attr->mr_mode & FI_MR_VIRT_ADDR) here.base = (uint64_t)(uintptr_t)s->memory;
    if (write(socket, &here, sizeof here) != sizeof here) fail("the other side is gone");
    if (recv(socket, &s->there, sizeof s->there, MSG_WAITALL) != sizeof s->there) fail("the other side is gone");
    if (fi_av_insert(s->av, s->there.name, 1, &s->to, 0, NULL) != 1) fail("av_insert");
}

static void open_side(side *s, const char *file, const char *provider, size_t nbytes, int socket) {
    find(s, file, provider);
    check(fi_domain(s->fabric, s->info, &s->domain, NULL), "domain");
    struct fi_av_attr av = {.type = FI_AV_TABLE};
    check(fi_av_open(s->domain, &av, &s->av, NULL), "av");
    struct fi_cq_attr cq = {.size = 16384, .format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_FD};
    struct fi_wait_attr wait = {.wait_obj = FI_WAIT_FD};
    if (strcmp(provider, "net") == 0) {
        check(s->fabric->ops->wait_open(s->fabric, &wait, &s->wait), "wait set");
        cq.wait_obj = FI_WAIT_SET;
        cq.wait_set = s->wait;
    }
    check(fi_cq_open(s->domain, &cq, &s->cq, NULL), "cq");
    check(fi_control(s->wait != NULL ? &s->wait->fid : &s->cq->fid, FI_GETWAIT, &s->fd), "descriptor of the queue");
    check(fi_endpoint(s->domain, s->info, &s->ep, NULL), "endpoint");
    check(fi_ep_bind(s->ep, &s->av->fid, 0), "bind");
    check(fi_ep_bind(s->ep, &s->cq->fid, FI_TRANSMIT | FI_RECV), "bind");
    check(fi_enable(s->ep), "enable");
    s->nbytes = nbytes;
    s->memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); /* as ours from allocate() */
    if (s->memory == MAP_FAILED) fail("no memory");
    memset(s->memory, 1, nbytes);
    check(fi_mr_reg(s->domain, s->memory, nbytes, FI_WRITE | FI_REMOTE_WRITE, 0, 1, 0, &s->mr, NULL), "memory region");
    exchange(s, socket);
}

/* ---- writing ---- */

static int drain(side *s) {
    struct fi_cq_data_entry entries[BATCH];
    int count = 0;
    for (;;) {
        ssize_t n = fi_cq_read(s->cq, entries, BATCH);
        if (n == -FI_EAGAIN) return count;
        if (n < 0) fail("a completion failed: %s", strerror((int)-n));
        for (ssize_t i = 0; i < n; i++) {
            if (entries[i].flags & FI_REMOTE_WRITE) s->arrived++;
            else s->under_way--;
        }
        count += (int)n;
    }
}

/* Until the queue has something, or `other` (-1: none), or `ms` have passed. */
static void wait_on(side *s, int other, int ms) {
    struct fid *fids[1] = {&s->cq->fid};
    struct pollfd fds[2] = {{.fd = s->fd, .events = POLLIN}, {.fd = other, .events = POLLIN}};
    int armed = s->wait != NULL ? s->wait->ops->wait(s->wait, 0) == -FI_ETIMEDOUT : fi_trywait(s->fabric, fids, 1) == 0;
    if (armed) (void)poll(fds, 2, ms);
}

static void bring_on(side *s) {
    if (drain(s) == 0) wait_on(s, -1, 100);
}

static struct fi_context2 contexts[WINDOW]; /* the software providers do not use them */

static void post(side *s, const uint64_t *here, const uint64_t *there, size_t count, uint64_t nbytes) {
    struct iovec from[MOST_IOV];
    struct fi_rma_iov to[MOST_IOV];
    void *desc[MOST_IOV] = {NULL, NULL, NULL, NULL};
    for (size_t i = 0; i < count; i++) {
        from[i] = (struct iovec){s->memory + here[i], nbytes};
        to[i] = (struct fi_rma_iov){.addr = s->there.base + there[i], .len = nbytes, .key = s->there.key};
        if (s->info->domain_attr->mr_mode & FI_MR_LOCAL) desc[i] = fi_mr_desc(s->mr);
    }
    struct fi_msg_rma message = {.msg_iov = from, .desc = desc, .iov_count = count, .addr = s->to, .rma_iov = to, .rma_iov_count = count,
                                 .context = &contexts[s->under_way % WINDOW], .data = (uint64_t)(count - 1) << 32 | 1u};
    while (s->under_way == WINDOW) bring_on(s);
    for (;;) {
        ssize_t rc = fi_writemsg(s->ep, &message, FI_COMPLETION | FI_DELIVERY_COMPLETE | FI_REMOTE_CQ_DATA);
        if (rc == 0) break;
        if (rc != -FI_EAGAIN) check(rc, "write");
        if (drain(s) == 0) wait_on(s, -1, 1); /* the end of this refusal raises no event */
    }
    s->under_way++;
}

static void finish(side *s) {
    while (s->under_way != 0) bring_on(s);
}

static double stream(side *s, uint64_t nbytes, uint64_t count, uint64_t times) {
    uint64_t places = s->nbytes / nbytes;
    double start = now();
    for (uint64_t k = 0; k < times; k++) {
        for (uint64_t i = 0; i < count; i++) {
            uint64_t at = i % places * nbytes;
            post(s, &at, &at, 1, nbytes);
        }
        finish(s);
    }
    return (now() - start) / (double)times;
}

static void shuffle(uint64_t *places, uint64_t count, uint64_t step, uint64_t seed) {
    for (uint64_t i = 0; i < count; i++) places[i] = i * step;
    for (uint64_t i = count - 1; i > 0; i--) {
        seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        uint64_t k = (seed >> 33) % (i + 1), place = places[k];
        places[k] = places[i];
        places[i] = place;
    }
}

static double pages(side *s, uint64_t nbytes, uint64_t per, uint64_t times) {
    static uint64_t *here, *there, of;
    uint64_t count = s->nbytes / nbytes;
    if (per == 0 || per > MOST_IOV || count < TABLE) fail("pages: %llu of %llu bytes", (unsigned long long)per, (unsigned long long)nbytes);
    if (of != nbytes) {
        free(here);
        free(there);
        here = malloc(count * sizeof *here);
        there = malloc(count * sizeof *there);
        if (here == NULL || there == NULL) fail("no memory");
        shuffle(here, count, nbytes, 1);
        shuffle(there, count, nbytes, 2);
        of = nbytes;
    }
    double start = now();
    for (uint64_t k = 0; k < times; k++) {
        for (uint64_t i = 0; i < TABLE; i += per) post(s, here + i, there + i, TABLE - i < per ? TABLE - i : per, nbytes);
        finish(s);
    }
    return (now() - start) / (double)times;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double latency(side *s, int socket) {
    static double samples[PINGS];
    uint64_t place = 0;
    order answer = {.pings = PINGS};
    if (write(socket, &answer, sizeof answer) != sizeof answer || recv(socket, &answer, sizeof answer, MSG_WAITALL) != sizeof answer)
        fail("the target is gone");
    s->arrived = 0;
    for (uint64_t k = 0; k < PINGS; k++) {
        double start = now();
        post(s, &place, &place, 1, PING_BYTES);
        while (s->arrived == k || s->under_way != 0) bring_on(s);
        samples[k] = now() - start;
    }
    qsort(samples, PINGS, sizeof *samples, ascending);
    return samples[PINGS / 2];
}

static void serve(side *s, int socket) {
    uint64_t answered = 0, pings = 0, place = 0;
    for (;;) {
        order next;
        ssize_t n = recv(socket, &next, sizeof next, MSG_DONTWAIT);
        if (n == 0) _exit(0);
        if (n == sizeof next) {
            s->arrived = answered = 0;
            pings = next.pings;
            if (write(socket, &next, sizeof next) != sizeof next) _exit(0); /* ready */
        }
        if (drain(s) == 0) wait_on(s, socket, -1);
        while (answered < pings && answered < s->arrived) {
            post(s, &place, &place, 1, PING_BYTES);
            answered++;
        }
    }
}

static void obey(side *s, int socket) {
    char line[256], name[16];
    while (fgets(line, sizeof line, stdin) != NULL) {
        unsigned long long a[2] = {0, 0}, times = 1;
        const char *rest = strstr(line, "\"times\":");
        if (sscanf(line, "{\"case\": \"%15[a-z]\", \"arguments\": [%llu, %llu", name, &a[0], &a[1]) < 1 || rest == NULL ||
            sscanf(rest, "\"times\": %llu", &times) != 1 || times == 0)
            fail("not an order");
        double seconds = -1;
        if (strcmp(name, "stream") == 0 && a[0] != 0 && a[0] <= s->nbytes) seconds = stream(s, a[0], a[1], times);
        else if (strcmp(name, "pages") == 0 && a[0] != 0) seconds = pages(s, a[0], a[1], times);
        else if (strcmp(name, "latency") == 0) seconds = latency(s, socket);
        if (seconds < 0) printf("{\"missing\": true}\n");
        else printf("{\"seconds\": %.9f}\n", seconds);
        fflush(stdout);
    }
}

int main(int argc, char **argv) {
    int sockets[2];
    if (argc != 4) fail("usage: fabric_reference LIBRARY PROVIDER REGION_BYTES");
    size_t nbytes = strtoull(argv[3], NULL, 10);
    check(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), "socketpair");
    pid_t child = fork();
    if (child < 0) fail("fork");
    static side s;
    if (child == 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(sockets[0]);
        open_side(&s, argv[1], argv[2], nbytes, sockets[1]);
        serve(&s, sockets[1]);
    }
    close(sockets[1]);
    open_side(&s, argv[1], argv[2], nbytes, sockets[0]);
    (void)stream(&s, 64, 1, 1);
    printf("{\"ready\": true, \"how\": \"C, libfabric %s, %s:%s, window %u, delivery complete, fd waits\"}\n", s.version,
           s.info->fabric_attr->prov_name, s.info->domain_attr->name, WINDOW);
    fflush(stdout);
    obey(&s, sockets[0]);
    close(sockets[0]);
    (void)waitpid(child, NULL, 0);
    return 0;
}
