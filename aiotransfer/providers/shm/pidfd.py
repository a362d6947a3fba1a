"""Descriptors of processes, by which a death is seen and proved.

A process of another PID namespace has no number here (a sibling pod reads 0 as the sender's), but a
descriptor of it works all the same. The kernel hands one out for the other end of a socket since Linux 6.5
(SO_PEERPIDFD); before that the peer sends one of itself.
"""

from __future__ import annotations

import errno
import functools
import os
import socket

SO_PEERPIDFD = getattr(socket, "SO_PEERPIDFD", 77)
_KINDS = ("anon_inode:[pidfd]", "pidfd:")
_UNKNOWN = (errno.ENOPROTOOPT, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@functools.cache
def kernel_knows_peers() -> bool:
    """Whether the kernel of this host, which is that of every peer by a Unix socket, hands out descriptors of
    peers."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        try:
            os.close(one.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError as error:
            if error.errno in _UNKNOWN:
                return False
            raise
    return True


def for_peers() -> list[int]:
    """What an offer carries beside the memory: a descriptor of this process (the caller's), where the kernel
    gives peers none.

    Raises `OSError` for want of descriptors.
    """
    if kernel_knows_peers():
        return []
    try:
        return [os.pidfd_open(os.getpid())]
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):  # before Linux 5.3, or forbidden by a seccomp filter
            return []
        raise


def of_peer(sock: socket.socket, pid: int, sent: int) -> int:
    """Of the process at the other end of a Unix socket; -1 when there is no way to have one.

    `pid`: its number as the socket's credentials have it (0: none in this namespace). `sent`: the descriptor
    that the peer sent of itself, or -1; it is used only where the kernel knows no better, and stays the
    caller's. Raises `OSError` when the process is gone, or for want of descriptors.
    """
    if kernel_knows_peers():
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    if pid > 0:
        return os.pidfd_open(pid)
    if sent >= 0 and os.readlink(f"/proc/self/fd/{sent}").startswith(_KINDS):
        return os.dup(sent)
    return -1
