/* Connections to an endpoint of libfabric's tcp provider that are half made.
 *
 * Any host that reaches the port of an endpoint may connect to it and say nothing, and the provider waits for the request for ever, with a
 * descriptor of ours for each. So the kernel is told to keep such connections to itself until the first byte has come (it does so for
 * hours): at_ofi_defer. A peer sends its request at once.
 *
 * A stranger that sends a request that parses is let in by that provider: it takes a descriptor for each, and one that claims to
 * come from the peer takes the place of the peer's own connection. So the door is shut as soon as the peer is in (at_ofi_shut_door): the
 * socket that listens gives way to one that is bound to the same port and does not, under the same number, as the provider goes on
 * using that. The kernel refuses what comes afterwards. Those who came in before the peer are shut down; they have not sent a control message.
 *
 * Closing. That provider (seen in 1.17 and 2.5) accepts a connection, and reads the request that follows it later; by then it looks at the
 * endpoint, also when that was closed in between, and reads freed memory (fi_dupinfo within fi_cq_read, found by the address sanitizer).
 * The request may come any time, from a process that was stopped, say. So each accepted connection of an endpoint is shut down first:
 * the provider meets the end of the stream instead of the request, and forgets the connection. Accepting happens only within fi_cq_read,
 * which no other thread calls meanwhile; what waits in the backlog goes with the listening socket. */
#define _GNU_SOURCE
#if __has_include(<rdma/fabric.h>) && __has_include(<rdma/fi_rma.h>)

#include "ofi.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define DEFERRED (24 * 3600) /* seconds, for as long as the kernel will */
#define RECEIVED_AT 128 /* bytes_received in struct tcp_info, which some headers do not know yet */
#define FEW 1024
#define NEAR 64     /* descriptors above the first free one among which a new one is looked for first */
#define LOOKS 8 /* each may let one more in; a host with so many connections has other troubles */

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

int at_ofi_first_free(const at_fab *fab) {
    int fd = dup(fab->kick_fd);
    if (fd >= 0) (void)close(fd);
    return fd;
}

int at_ofi_defer(struct fid_ep *ep, int first) {
    in_port_t port = port_of_endpoint(ep);
    int found = -1;
    if (port == 0) return -1;
    for (int fd = first; first >= 0 && fd < first + NEAR; fd++)
        if (defer_at(fd, port)) return fd;
    DIR *folder = opendir("/proc/self/fd");
    if (folder == NULL) return -1;
    for (const struct dirent *entry; found < 0 && (entry = readdir(folder)) != NULL;)
        if (entry->d_name[0] != '.' && defer_at(atoi(entry->d_name), port)) found = atoi(entry->d_name);
    (void)closedir(folder);
    return found;
}

/* A socket that is bound to where `old` listens, and does not listen; -1. */
static int bound_beside(int old) {
    struct sockaddr_storage address;
    socklen_t n = sizeof address, m = sizeof(int);
    int yes = 1, no = 0, only6 = 0;
    if (getsockname(old, (struct sockaddr *)&address, &n) != 0) return -1;
    int fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return -1;
    if (address.ss_family == AF_INET6 && getsockopt(old, IPPROTO_IPV6, IPV6_V6ONLY, &only6, &m) == 0)
        (void)setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only6, sizeof only6);
    int rc = setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (rc == 0) rc = setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &yes, sizeof yes);
    if (rc == 0) rc = setsockopt(old, SOL_SOCKET, SO_REUSEPORT, &yes, sizeof yes); /* for this moment: both are ours */
    if (rc == 0) rc = bind(fd, (const struct sockaddr *)&address, n);
    (void)setsockopt(old, SOL_SOCKET, SO_REUSEPORT, &no, sizeof no);
    if (rc == 0) rc = setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &no, sizeof no);
    if (rc == 0) rc = setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &no, sizeof no); /* else another process could listen there */
    if (rc == 0) return fd;
    (void)close(fd);
    return -1;
}

/* A connection that was accepted at the port, and by which no control message can have come. */
static int is_stranger(int fd, in_port_t port) {
    uint64_t info[RECEIVED_AT / sizeof(uint64_t) + 1];
    socklen_t n = sizeof info;
    return role_at(fd, port) == 0 && getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &n) == 0 && n == sizeof info &&
           info[RECEIVED_AT / sizeof(uint64_t)] < sizeof(at_fab_ctrl);
}

/* How many strangers have been shut down, from this descriptor on, up to `end` or to where no more are in use. */
static int drop_from(int fd, int conn, in_port_t port) {
    int found = 0;
    for (int unused = 0; fd < conn && unused < NEAR; fd++) {
        errno = 0;
        found += is_stranger(fd, port) && shutdown(fd, SHUT_RDWR) == 0; /* the door itself is not connected */
        unused = errno == EBADF ? unused + 1 : 0;
    }
    return found;
}

/* The system gives the first free number to each that is let in: `first` or a greater one, unless others were closed meanwhile. To look at
 * some thousand takes milliseconds, so of many the small ones are looked at where there are strangers. (To read /proc/self/fd takes ten
 * times as long.) */
static void drop_strangers(int first, in_port_t port) {
    int from = first < FEW ? 0 : first;
    if (drop_from(from, INT_MAX, port) != 0 && from > 0) (void)drop_from(0, from, port);
}

int at_ofi_shut_door(const at_fab_conn *conn) {
    in_port_t port = port_of_endpoint(conn->ep);
    int instead = port != 0 && role_at(conn->door, port) == 1 ? bound_beside(conn->door) : -1;
    if (instead < 0) return -1;
    int rc = dup3(instead, conn->door, O_CLOEXEC);
    (void)close(instead);
    if (rc < 0) return -1;
    drop_strangers(conn->first, port);
    return 0;
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

void at_ofi_shut_half_open(at_fab *fab, struct fid_ep *ep) {
    in_port_t port = port_of_endpoint(ep);
    for (int i = 0; port != 0 && i < LOOKS; i++) {
        (void)fi_cq_read(at_ofi_of(fab)->cq, NULL, 0); /* accepts, and meets the ends of those that were shut down */
        if (!shut_down_at(port)) return;
    }
}

#endif
