/* libfabric as a driver of the fabric provider. */
#ifndef AT_OFI_H
#define AT_OFI_H

#include "fabric/fabric.h"

#include "ofi/decls.h"

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

typedef struct {
    at_fab fab; /* first */
    struct fi_info *info;
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fid_av *av;
    struct fid_cq *cq;
    struct fid_wait *wait; /* NULL: fi_trywait does what it says */
    uint16_t first_port, last_port, next_port; /* of endpoints; first_port 0: any. next_port with fab->lock */
} at_ofi;

static inline at_ofi *at_ofi_of(at_fab *fab) { return (at_ofi *)fab; }

typedef struct { /* struct fi_mr_dmabuf, which headers before 1.20 lack */
    int fd;
    uint64_t offset;
    size_t len;
    void *base_addr;
} at_ofi_dmabuf;

typedef struct {
    union { /* larger than any libfabric's of today: newer ones look at fields that old headers do not have */
        struct fi_mr_attr attr;
        uint8_t more[sizeof(struct fi_mr_attr) + 128];
    } room;
    struct iovec piece;
    at_ofi_dmabuf dmabuf;
} at_ofi_attr;

/* What a registration says: returns its flags. `out` points into itself, and stays where it is. */
uint64_t at_ofi_attributes(at_ofi_attr *out, const at_fab_memory *memory, uint64_t access, uint64_t key);

/* The library, once loaded. */
extern struct at_ofi_calls {
    int (*getinfo)(uint32_t, const char *, const char *, uint64_t, const struct fi_info *, struct fi_info **);
    void (*freeinfo)(struct fi_info *);
    struct fi_info *(*dupinfo)(const struct fi_info *);
    int (*fabric)(struct fi_fabric_attr *, struct fid_fabric **, void *);
    uint32_t (*version)(void);
    const char *(*strerror)(int);
} at_ofi_library;

/* device.c */
void at_ofi_device_prepare(struct fid_ep *ep);                     /* before it is enabled */
void at_ofi_device_ask(struct fid_ep *ep, at_fab_facts *facts);    /* afterwards */
void at_ofi_device_limits(at_fab_facts *facts, uint64_t most_rma, int emulated);
/* open.c */
uint32_t at_ofi_flags_of(int device, uint64_t order, size_t data_bytes, int mr_mode, uint32_t without);

/* half_open.c, with fab->lock */
int at_ofi_first_free(const at_fab *fab);        /* the number that the next descriptor will have */
int at_ofi_defer(struct fid_ep *ep, int first); /* strangers who say nothing get no descriptor of ours; first: that number, before it was made.
                                                   * The descriptor by which it listens, or -1 */
int at_ofi_shut_door(const at_fab_conn *conn); /* its peer is in: no other comes in any more. 0, or -1: the door stays open */
void at_ofi_shut_half_open(at_fab *fab, struct fid_ep *ep);

/* driver.c */
extern const at_fab_driver at_ofi_driver;
void at_ofi_free(at_fab *fab);

#endif
