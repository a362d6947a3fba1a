/* The hand of the fabric provider that calls libfabric: tcp, efa. Compiled where its headers are, opened at run time. */
#ifndef AT_OFI_H
#define AT_OFI_H

#include "fabric/fabric.h"

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

typedef struct {
    at_fab fab; /* first */
    pthread_mutex_t lock; /* each call into libfabric; after the lane's */
    struct fi_info *info;
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fid_av *av;
    struct fid_cq *cq;
    struct fid_ep *shared; /* of all peers, where they cannot have one each */
    struct fid_wait *wait; /* NULL: fi_trywait does what it says */
} at_ofi;

typedef struct { /* struct fi_mr_dmabuf, which headers before 1.20 lack */
    int fd;
    uint64_t offset;
    size_t len;
    void *base_addr;
} at_fab_dmabuf;

typedef struct {
    union { /* larger than any libfabric's of today: newer ones look at fields that old headers do not have */
        struct fi_mr_attr attr;
        uint8_t more[sizeof(struct fi_mr_attr) + 128];
    } room;
    struct iovec piece;
    at_fab_dmabuf dmabuf;
} at_fab_attr;

/* attributes.c. What a registration says: returns its flags. `out` points into itself, and stays where it is. */
uint64_t at_fab_attributes(at_fab_attr *out, const at_fab_memory *memory, uint64_t access, uint64_t key);

/* load.c. The library, once loaded. */
extern struct at_fab_calls {
    int (*getinfo)(uint32_t, const char *, const char *, uint64_t, const struct fi_info *, struct fi_info **);
    void (*freeinfo)(struct fi_info *);
    struct fi_info *(*dupinfo)(const struct fi_info *);
    int (*fabric)(struct fi_fabric_attr *, struct fid_fabric **, void *);
    uint32_t (*version)(void);
    const char *(*strerror)(int);
} at_fab_library;
void at_fab_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* device.c */
void at_fab_device_prepare(struct fid_ep *ep);                     /* before it is enabled */
void at_fab_device_ask(struct fid_ep *ep, at_fab_facts *facts);    /* afterwards */
void at_fab_device_limits(at_fab_facts *facts, uint64_t most_rma, int emulated);
/* open.c */
uint32_t at_fab_flags_of(int device, uint64_t order, size_t data_bytes, int mr_mode, uint32_t without);

/* halfway.c, with the lock */
void at_fab_shut_halfway(at_ofi *ofi, struct fid_ep *ep);

/* hand.c */
extern const at_hand at_ofi_hand;

#endif
