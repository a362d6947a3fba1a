/* Connections to an endpoint of libfabric's tcp provider that are half made.
 *
 * Anyone who reaches the port of an endpoint may connect to it and say nothing, and the provider waits for the request for ever, with a
 * descriptor of ours for each. So the kernel is told to keep such connections to itself until the first byte has come (it does so for
 * hours): at_fab_defer. A peer sends its request at once.
 *
 * Closing. That provider (seen in 1.17 and 2.5) accepts a connection, and reads the request that follows it later; by then it looks at the
 * endpoint, also when that was closed in between, and reads freed memory (fi_dupinfo within fi_cq_read, found by the address sanitizer).
 * The request may come any time, from a process that was stopped, say. So whatever was accepted for an endpoint is shut down first: the
 * provider meets the end of the stream instead of the request, and forgets the connection. Accepting happens only within fi_cq_read,
 * which nobody else calls meanwhile; what waits in the backlog goes with the listening socket. */
#define _GNU_SOURCE
#if __has_include(<rdma/fabric.h>) && __has_include(<rdma/fi_rma.h>)

#include "ofi.h"

#include <dirent.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define DEFERRED (24 * 3600) /* seconds, for as long as the kernel will */
#define NEAR 64     /* descriptors above the first free one among which a new one is looked for first */
#define LOOKS 8 /* each may let one more in; who connects that often has other troubles */

static in_port_t port_of(const struct sockaddr_storage *address) {
    if (address->ss_family == AF_INET) return ((const struct sockaddr_in *)(const void *)address)->sin_port;
    if (address->ss_family == AF_INET6) return ((const struct sockaddr_in6 *)(const void *)address)->sin6_port;
    return 0;
}

/* A socket of ours at the port: 1: it listens there; 0: it was accepted there; -1: it is something else. */
static int role_at(int fd, in_port_t port) {
    struct sockaddr_storage address;
    socklen_t n = sizeof address;
    int listening = 0;
    if (getsockname(fd, (struct sockaddr *)&address, &n) != 0 || port_of(&address) != port) return -1;
    n = sizeof listening;
    return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &n) == 0 ? listening != 0 : -1;
}

static int defer_at(int fd, in_port_t port) {
    int seconds = DEFERRED;
    return role_at(fd, port) == 1 && setsockopt(fd, IPPROTO_TCP, TCP_DEFER_ACCEPT, &seconds, sizeof seconds) == 0;
}

static in_port_t port_of_endpoint(struct fid_ep *ep) {
    struct sockaddr_storage address;
    size_t n = sizeof address;
    memset(&address, 0, sizeof address);
    return fi_getname(&ep->fid, &address, &n) == 0 ? port_of(&address) : 0;
}

int at_fab_first_free(const at_fab *fab) {
    int fd = dup(fab->kick_fd);
    if (fd >= 0) (void)close(fd);
    return fd;
}

void at_fab_defer(struct fid_ep *ep, int first) {
    in_port_t port = port_of_endpoint(ep);
    if (port == 0) return;
    for (int fd = first; first >= 0 && fd < first + NEAR; fd++)
        if (defer_at(fd, port)) return;
    DIR *folder = opendir("/proc/self/fd");
    if (folder == NULL) return;
    for (const struct dirent *entry; (entry = readdir(folder)) != NULL;)
        if (entry->d_name[0] != '.' && defer_at(atoi(entry->d_name), port)) break;
    (void)closedir(folder);
}

static int shut_down_at(in_port_t port) {
    int found = 0;
    DIR *folder = opendir("/proc/self/fd");
    if (folder == NULL) return 0;
    for (const struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        int fd = atoi(entry->d_name);
        if (entry->d_name[0] == '.' || role_at(fd, port) != 0) continue;
        (void)shutdown(fd, SHUT_RDWR);
        found = 1;
    }
    (void)closedir(folder);
    return found;
}

void at_fab_shut_halfway(at_fab *fab, struct fid_ep *ep) {
    in_port_t port = port_of_endpoint(ep);
    for (int i = 0; port != 0 && i < LOOKS; i++) {
        (void)fi_cq_read(at_ofi_of(fab)->cq, NULL, 0); /* accepts, and meets the ends of those that were shut down */
        if (!shut_down_at(port)) return;
    }
}

#endif
