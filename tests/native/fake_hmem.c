/* A libfabric whose tcp takes memory of a GPU: the real library (REAL_LIBFABRIC), and in front of it what a provider with FI_HMEM does.
 *
 * The GPU is that of fake_cuda.c, loaded from AIOTRANSFER_LIBCUDA: its addresses may be touched by nobody, so whatever reaches the real
 * library has been translated here first. A registration is translated only if it names the interface and the ordinal, or a dma-buf that
 * really is that memory; an operation only if its descriptor is of such a registration. Everything else faults.
 * fake_hmem_count tells how many registrations came as plain device memory (0), as dma-bufs (1), and were refused (2), and how many
 * operations had device memory (3). FAKE_HMEM_REFUSE=dmabuf refuses those, as a kernel without them does. */
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_rma.h>

#define DMABUF ((uint64_t)1 << 40)
#define ORDINAL 1
#define MOST 256

static void *real, *gpu;
static int (*real_getinfo)(uint32_t, const char *, const char *, uint64_t, const struct fi_info *, struct fi_info **);
static void (*real_freeinfo)(struct fi_info *);
static struct fi_info *(*real_dupinfo)(const struct fi_info *);
static int (*real_fabric)(struct fi_fabric_attr *, struct fid_fabric **, void *);
static uint32_t (*real_version)(void);
static const char *(*real_strerror)(int);
static void *(*backing)(uint64_t);
static uint32_t counts[4];
static void *known[MOST]; /* descriptors of device memory */
static size_t known_count;

static struct fi_ops_fabric fabric_ops;
static struct fi_ops_domain domain_ops;
static struct fi_ops_mr mr_ops;
static struct fi_ops_rma rma_ops;
static const struct fi_ops_fabric *real_fabric_ops;
static const struct fi_ops_domain *real_domain_ops;
static const struct fi_ops_mr *real_mr_ops;
static const struct fi_ops_rma *real_rma_ops;

uint32_t fake_hmem_count(unsigned which) { return __atomic_load_n(&counts[which % 4], __ATOMIC_SEQ_CST); }
static void count(unsigned which) { (void)__atomic_add_fetch(&counts[which], 1, __ATOMIC_SEQ_CST); }

static void find(void *library, const char *name, void *where) {
    void *symbol = library != NULL ? dlsym(library, name) : NULL;
    if (symbol == NULL) abort();
    memcpy(where, &symbol, sizeof symbol);
}

__attribute__((constructor)) static void load(void) {
    real = dlopen(getenv("REAL_LIBFABRIC"), RTLD_NOW | RTLD_LOCAL);
    gpu = dlopen(getenv("AIOTRANSFER_LIBCUDA"), RTLD_NOW | RTLD_LOCAL);
    find(real, "fi_getinfo", &real_getinfo);
    find(real, "fi_freeinfo", &real_freeinfo);
    find(real, "fi_dupinfo", &real_dupinfo);
    find(real, "fi_fabric", &real_fabric);
    find(real, "fi_version", &real_version);
    find(real, "fi_strerror", &real_strerror);
    find(gpu, "fake_cuda_backing", &backing);
}

void fi_freeinfo(struct fi_info *info) { real_freeinfo(info); }
struct fi_info *fi_dupinfo(const struct fi_info *info) { return real_dupinfo(info); }
uint32_t fi_version(void) { return real_version() < FI_VERSION(1, 20) ? FI_VERSION(1, 20) : real_version(); } /* the first with dma-bufs */
const char *fi_strerror(int code) { return real_strerror(code); }

static struct fi_info *without_device(const struct fi_info *info) {
    struct fi_info *plain = real_dupinfo(info);
    plain->caps &= ~FI_HMEM;
    plain->tx_attr->caps &= ~FI_HMEM;
    plain->rx_attr->caps &= ~FI_HMEM;
    plain->domain_attr->mr_mode &= ~FI_MR_HMEM;
    return plain;
}

int fi_getinfo(uint32_t version, const char *node, const char *service, uint64_t flags, const struct fi_info *hints, struct fi_info **out) {
    if (version > real_version()) version = real_version();
    struct fi_info *plain = without_device(hints);
    int rc = real_getinfo(version, node, service, flags, plain, out);
    real_freeinfo(plain);
    for (struct fi_info *info = rc == 0 ? *out : NULL; info != NULL && (hints->caps & FI_HMEM); info = info->next) {
        info->caps |= FI_HMEM;
        info->domain_attr->mr_mode |= FI_MR_HMEM;
    }
    return rc;
}

/* ---- registrations ---- */

static int register_device(struct fid *fid, const struct fi_mr_attr *attr, uint64_t flags, struct fid_mr **mr) {
    const struct { int fd; uint64_t offset; size_t len; void *base_addr; } *buf = (const void *)attr->mr_iov;
    const char *refuse = getenv("FAKE_HMEM_REFUSE");
    struct iovec there = {0};
    if (attr->device.cuda != ORDINAL || attr->iov_count != 1) {
        count(2);
        return -FI_EINVAL;
    }
    if (flags & DMABUF) {
        struct stat given;
        uint64_t address = (uint64_t)(uintptr_t)buf->base_addr + buf->offset;
        if ((refuse != NULL && strcmp(refuse, "dmabuf") == 0) || fstat(buf->fd, &given) != 0) {
            count(2);
            return -FI_EOPNOTSUPP;
        }
        there = (struct iovec){backing(address), buf->len};
    } else {
        there = (struct iovec){backing((uint64_t)(uintptr_t)attr->mr_iov->iov_base), attr->mr_iov->iov_len};
    }
    if (there.iov_base == NULL || known_count == MOST) {
        count(2);
        return -FI_EFAULT;
    }
    struct fi_mr_attr plain = *attr;
    plain.iface = FI_HMEM_SYSTEM;
    plain.device.cuda = 0;
    plain.mr_iov = &there;
    int rc = real_mr_ops->regattr(fid, &plain, flags & ~DMABUF, mr);
    if (rc == 0) {
        count(flags & DMABUF ? 1 : 0);
        known[known_count++] = (*mr)->mem_desc;
    }
    return rc;
}

static int mr_regattr(struct fid *fid, const struct fi_mr_attr *attr, uint64_t flags, struct fid_mr **mr) {
    return attr->iface == FI_HMEM_CUDA ? register_device(fid, attr, flags, mr) : real_mr_ops->regattr(fid, attr, flags, mr);
}

/* ---- operations ---- */

static int is_known(void *desc) {
    for (size_t i = 0; i < known_count; i++)
        if (desc != NULL && known[i] == desc) return 1;
    return 0;
}

static ssize_t translated(struct fid_ep *ep, const struct fi_msg_rma *message, uint64_t flags,
                          ssize_t (*go)(struct fid_ep *, const struct fi_msg_rma *, uint64_t)) {
    struct iovec here[8];
    struct fi_msg_rma plain = *message;
    int any = 0;
    for (size_t i = 0; i < message->iov_count; i++) {
        here[i] = message->msg_iov[i];
        void *there = message->desc != NULL && is_known(message->desc[i]) ? backing((uint64_t)(uintptr_t)here[i].iov_base) : NULL;
        if (there == NULL) continue;
        here[i].iov_base = there;
        any = 1;
    }
    if (any) count(3);
    plain.msg_iov = here;
    return go(ep, &plain, flags);
}

static ssize_t rma_writemsg(struct fid_ep *ep, const struct fi_msg_rma *message, uint64_t flags) {
    return translated(ep, message, flags, real_rma_ops->writemsg);
}
static ssize_t rma_readmsg(struct fid_ep *ep, const struct fi_msg_rma *message, uint64_t flags) {
    return translated(ep, message, flags, real_rma_ops->readmsg);
}

/* ---- the objects: their tables are copied once, with ours in them ---- */

static int domain_endpoint(struct fid_domain *domain, struct fi_info *info, struct fid_ep **ep, void *context) {
    struct fi_info *plain = without_device(info);
    int rc = real_domain_ops->endpoint(domain, plain, ep, context);
    real_freeinfo(plain);
    if (rc != 0) return rc;
    if (info->ep_attr->type == FI_EP_RDM) { /* others are the provider's own, for what these do */
        real_rma_ops = (*ep)->rma;
        rma_ops = *real_rma_ops;
        rma_ops.writemsg = rma_writemsg;
        rma_ops.readmsg = rma_readmsg;
        (*ep)->rma = &rma_ops;
    }
    return 0;
}

static int fabric_domain(struct fid_fabric *fabric, struct fi_info *info, struct fid_domain **domain, void *context) {
    struct fi_info *plain = without_device(info);
    int rc = real_fabric_ops->domain(fabric, plain, domain, context);
    real_freeinfo(plain);
    if (rc != 0) return rc;
    real_domain_ops = (*domain)->ops;
    domain_ops = *real_domain_ops;
    domain_ops.endpoint = domain_endpoint;
    (*domain)->ops = &domain_ops;
    real_mr_ops = (*domain)->mr;
    mr_ops = *real_mr_ops;
    mr_ops.regattr = mr_regattr;
    (*domain)->mr = &mr_ops;
    return 0;
}

int fi_fabric(struct fi_fabric_attr *attr, struct fid_fabric **fabric, void *context) {
    int rc = real_fabric(attr, fabric, context);
    if (rc != 0) return rc;
    real_fabric_ops = (*fabric)->ops;
    fabric_ops = *real_fabric_ops;
    fabric_ops.domain = fabric_domain;
    (*fabric)->ops = &fabric_ops;
    return 0;
}
