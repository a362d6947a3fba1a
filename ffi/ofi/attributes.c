/* What libfabric is told about memory that is registered, apart from the call that tells it, so that it can be tested without a device.
 *
 * Memory of a GPU is named by its address there, with the interface and the ordinal; as a dma-buf, by the descriptor that its driver
 * handed out, and then the attributes hold that in place of the pieces. Numbers and layout are those of libfabric's public headers
 * (fi_domain.h of 1.20 and later), which older ones lack. */
#if __has_include(<rdma/fabric.h>) && __has_include(<rdma/fi_rma.h>)

#include "ofi.h"

#include <string.h>

#define MR_DMABUF ((uint64_t)1 << 40) /* FI_MR_DMABUF (API 1.20) */

uint64_t at_ofi_attributes(at_ofi_attr *out, const at_fab_memory *memory, uint64_t access, uint64_t key) {
    memset(out, 0, sizeof *out);
    out->piece = (struct iovec){(void *)(uintptr_t)memory->address, (size_t)memory->nbytes};
    struct fi_mr_attr *attr = &out->room.attr;
    attr->iov_count = 1;
    attr->access = access;
    attr->requested_key = key;
    attr->mr_iov = &out->piece;
    if (memory->cuda < 0) return 0;
    attr->iface = FI_HMEM_CUDA;
    attr->device.cuda = memory->cuda;
    if (memory->dmabuf_fd < 0) return 0;
    out->dmabuf.fd = memory->dmabuf_fd;
    out->dmabuf.offset = memory->address - memory->dmabuf_start;
    out->dmabuf.len = (size_t)memory->nbytes;
    out->dmabuf.base_addr = (void *)(uintptr_t)memory->dmabuf_start;
    attr->mr_iov = (const struct iovec *)(const void *)&out->dmabuf; /* one member of a union, in newer headers */
    return MR_DMABUF;
}

int at_ofi_attributes_of(const at_fab_memory *memory, uint64_t access, uint64_t key, uint64_t out[10]) {
    at_ofi_attr filled;
    out[0] = at_ofi_attributes(&filled, memory, access, key);
    const struct fi_mr_attr *attr = &filled.room.attr;
    out[1] = attr->iov_count;
    out[2] = attr->access;
    out[3] = attr->requested_key;
    out[4] = (uint64_t)attr->iface;
    out[5] = (uint64_t)attr->device.cuda;
    if (out[0] == 0) {
        out[6] = (uint64_t)(uintptr_t)attr->mr_iov->iov_base;
        out[7] = attr->mr_iov->iov_len;
        out[8] = out[9] = 0;
    } else {
        const at_ofi_dmabuf *dmabuf = (const at_ofi_dmabuf *)(const void *)attr->mr_iov;
        out[6] = (uint64_t)(uintptr_t)dmabuf->base_addr;
        out[7] = dmabuf->len;
        out[8] = dmabuf->offset;
        out[9] = (uint64_t)dmabuf->fd;
    }
    return AT_OK;
}

#endif
