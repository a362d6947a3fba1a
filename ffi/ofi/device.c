/* What devices (EFA) are asked and told beyond what every provider is: options of the endpoint, with their numbers.
 *
 * Old headers lack most of the names. The numbers are those of libfabric's public headers (fi_endpoint.h and fi_ext.h of 2.x), where
 * options are only ever added at the end. An option that the library does not know is no error: its default is the old behaviour. */
#if __has_include(<rdma/fabric.h>) && __has_include(<rdma/fi_rma.h>)

#include "ofi.h"

#include <stdbool.h>

enum {
    OPT_CUDA_API_PERMITTED = 10,      /* bool: may the provider call CUDA? It may deadlock with other callers of CUDA (API 1.18) */
    OPT_SHARED_MEMORY_PERMITTED = 11, /* bool: with it there is no descriptor for the queue, and a copy more on one host */
    OPT_MAX_RMA_SIZE = 14,            /* size_t: of one work request */
    OPT_EFA_EMULATED_WRITE = -(0xefa << 16) + 2 /* bool: writes are messages that the other side's processor carries out */
};

static void permit(struct fid_ep *ep, int option, bool value) { (void)fi_setopt(&ep->fid, FI_OPT_ENDPOINT, option, &value, sizeof value); }

void at_ofi_device_prepare(struct fid_ep *ep) {
    permit(ep, OPT_CUDA_API_PERMITTED, false);
    permit(ep, OPT_SHARED_MEMORY_PERMITTED, false);
}

void at_ofi_device_limits(at_fab_facts *facts, uint64_t most_rma, int emulated) {
    if (most_rma != 0 && most_rma < facts->most_bytes) facts->most_bytes = most_rma;
    if (emulated) facts->flags |= AT_FAB_DELIVERY; /* a completion says no more than that it was sent, then */
}

void at_ofi_device_ask(struct fid_ep *ep, at_fab_facts *facts) {
    size_t most = 0, n = sizeof most;
    if (fi_getopt(&ep->fid, FI_OPT_ENDPOINT, OPT_MAX_RMA_SIZE, &most, &n) != 0) most = 0;
    bool emulated = false;
    n = sizeof emulated;
    if (fi_getopt(&ep->fid, FI_OPT_ENDPOINT, OPT_EFA_EMULATED_WRITE, &emulated, &n) != 0) emulated = false;
    at_ofi_device_limits(facts, most, emulated);
}

#endif
