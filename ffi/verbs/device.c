/* Which device, which port, which address: by rule, and the choice is reported.
 *
 * On Ethernet an address is an entry of the port's GID table; only RoCE v2 can be routed. The one that carries the local address of the
 * control connection comes first, then those of IPv4, then those of IPv6 that reach beyond the link. InfiniBand has its own addresses. */
#if __has_include(<infiniband/verbs.h>)

#include "verbs.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define IB_RANK 2

static int is_mapped(const union ibv_gid *gid) {
    static const uint8_t prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
    return memcmp(gid->raw, prefix, sizeof prefix) == 0;
}

/* How well an address (GID) fits the one of this host: 4, equal, down to 1; 0: it cannot be used. */
static int rank_of(const at_vrb *vrb, const union ibv_gid *gid) {
    uint8_t wanted[16] = {0};
    struct in_addr v4;
    if (inet_pton(AF_INET, vrb->node, &v4) == 1) {
        wanted[10] = wanted[11] = 0xff;
        memcpy(wanted + 12, &v4, 4);
    } else if (inet_pton(AF_INET6, vrb->node, wanted) != 1) {
        memset(wanted, 0, sizeof wanted);
    }
    if (memcmp(gid->raw, wanted, 16) == 0) return 4;
    if (is_mapped(gid)) return 3;
    return gid->raw[0] == 0xfe && (gid->raw[1] & 0xc0) == 0x80 ? 0 : 2; /* link-local ones lead nowhere else */
}

/* The best address of a port: its rank, 0: it has none, or is down. */
static int look_at(at_vrb *vrb, struct ibv_context *context, uint8_t port) {
    struct ibv_port_attr attr;
    memset(&attr, 0, sizeof attr);
    if (at_vrb_library.query_port(context, port, &attr) != 0 || attr.state != IBV_PORT_ACTIVE) return 0;
    struct ibv_gid_entry entry;
    int best = 0;
    for (uint32_t i = 0; i < 256 && i < (uint32_t)attr.gid_tbl_len; i++) {
        if (at_vrb_library.query_gid(context, port, i, &entry, 0, sizeof entry) != 0) continue; /* an unused place */
        int rank = entry.gid_type == IBV_GID_TYPE_ROCE_V2 ? rank_of(vrb, &entry.gid) : entry.gid_type == IBV_GID_TYPE_IB ? IB_RANK : 0;
        if (rank <= best) continue;
        best = rank;
        vrb->ethernet = entry.gid_type == IBV_GID_TYPE_ROCE_V2;
        vrb->gid = entry.gid;
        vrb->gid_index = i;
    }
    vrb->port = port;
    vrb->lid = attr.lid;
    vrb->mtu = attr.active_mtu;
    return best;
}

int at_vrb_look_up(at_vrb *vrb) {
    at_vrb seen = *vrb;
    if (look_at(&seen, vrb->context, vrb->port) == 0) return ENETDOWN;
    vrb->gid = seen.gid;
    vrb->gid_index = seen.gid_index;
    vrb->lid = seen.lid;
    vrb->mtu = seen.mtu;
    return 0;
}

static int consider(at_vrb *vrb, struct ibv_device *device, int best) {
    struct ibv_context *context = at_vrb_library.open_device(device);
    struct ibv_device_attr attr;
    if (context == NULL) return best;
    int ports = at_vrb_library.query_device(context, &attr) == 0 ? attr.phys_port_cnt : 0, taken = 0;
    for (int port = 1; port <= ports; port++) {
        at_vrb seen = *vrb;
        int rank = look_at(&seen, context, (uint8_t)port);
        if (rank <= best) continue;
        best = rank;
        taken = 1;
        seen.context = vrb->context;
        *vrb = seen;
    }
    if (taken && vrb->context != NULL) (void)at_vrb_library.close_device(vrb->context);
    if (taken) vrb->context = context;
    else (void)at_vrb_library.close_device(context);
    return best;
}

int at_vrb_choose(at_vrb *vrb, const char *device) {
    int count = 0, best = 0, named = 0;
    struct ibv_device **devices = at_vrb_library.get_device_list(&count);
    for (int i = 0; devices != NULL && i < count; i++) {
        if (device != NULL && strcmp(at_vrb_library.get_device_name(devices[i]), device) != 0) continue;
        named = 1;
        best = consider(vrb, devices[i], best);
    }
    at_fab_facts *facts = &vrb->fab.facts;
    char gid[INET6_ADDRSTRLEN] = "";
    if (best > 0) {
        (void)inet_ntop(AF_INET6, vrb->gid.raw, gid, sizeof gid);
        (void)snprintf(facts->domain, sizeof facts->domain, "%.19s/%hhu %.39s", at_vrb_library.get_device_name(vrb->context->device),
                       vrb->port, gid);
        (void)snprintf(facts->fabric, sizeof facts->fabric, "%s, GID %u", vrb->ethernet ? "RoCE v2" : "InfiniBand", (unsigned)vrb->gid_index);
    } else {
        at_fab_say(!named && device != NULL ? "there is no device %s" : count == 0 ? "no RDMA device is to be seen" :
                   "no port of %s is active and has an address (RoCE v2, not link-local, or InfiniBand)", device != NULL ? device : "any device");
    }
    if (devices != NULL) at_vrb_library.free_device_list(devices);
    return best > 0 ? 0 : ENODEV;
}

#endif
