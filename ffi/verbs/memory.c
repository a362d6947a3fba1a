/* Memory regions of libibverbs. Writes may pass each other on the bus (relaxed ordering) where the caller's data goes: no reader looks at
 * it before a completion that waits for them. */
#if __has_include(<infiniband/verbs.h>)

#include "verbs.h"

#include <errno.h>

static int one(at_vrb *vrb, const at_fab_memory *memory, unsigned access, struct ibv_mr **mr) {
    *mr = at_vrb_library.register_memory(vrb->pd, (void *)(uintptr_t)memory->address, (size_t)memory->nbytes, memory->address, access);
    return *mr != NULL ? 0 : errno != 0 ? errno : EIO;
}

int at_vrb_enroll(at_fab *fab, const at_fab_memory *memory, unsigned use, at_fab_mr *out) {
    at_vrb *vrb = at_vrb_of(fab);
    unsigned access = (use & (AT_USE_LOCAL | AT_USE_CTRL | AT_USE_REMOTE_WRITE) ? IBV_ACCESS_LOCAL_WRITE : 0u) |
                      (use & AT_USE_REMOTE_WRITE ? IBV_ACCESS_REMOTE_WRITE : 0u) | (use & AT_USE_REMOTE_READ ? IBV_ACCESS_REMOTE_READ : 0u);
    if (!(use & AT_USE_CTRL)) access |= IBV_ACCESS_RELAXED_ORDERING;
    struct ibv_mr *mr = NULL;
    int rc = EOPNOTSUPP;
    if (memory->dmabuf_fd >= 0 && at_vrb_library.register_dmabuf != NULL) {
        mr = at_vrb_library.register_dmabuf(vrb->pd, memory->address - memory->dmabuf_start, (size_t)memory->nbytes, memory->address,
                                            memory->dmabuf_fd, (int)access);
        rc = mr != NULL ? 0 : errno;
    }
    if (rc != 0) rc = one(vrb, memory, access, &mr);
    if (rc == EFAULT && use == AT_USE_LOCAL) rc = one(vrb, memory, access & ~(unsigned)IBV_ACCESS_LOCAL_WRITE, &mr); /* memory to be read only */
    if (rc == 0) *out = (at_fab_mr){.mr = mr, .key = mr->rkey, .base = memory->address};
    return rc;
}

void at_vrb_dismiss(at_fab *fab, void *mr) {
    (void)fab;
    (void)at_vrb_library.deregister(mr);
}

void *at_vrb_desc(void *mr) { return mr; }

/* Asked with a descriptor that is none: a device that knows the call finds fault with that, another one with the call. */
int at_vrb_takes_dmabufs(at_vrb *vrb) {
    if (at_vrb_library.register_dmabuf == NULL) return 0;
    struct ibv_mr *mr = at_vrb_library.register_dmabuf(vrb->pd, 0, 4096, 0, -1, IBV_ACCESS_LOCAL_WRITE);
    if (mr != NULL) (void)at_vrb_library.deregister(mr);
    return mr != NULL || errno == EBADF;
}

#endif
