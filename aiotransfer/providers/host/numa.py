"""On which NUMA node memory of this process is, as the kernel says."""

from __future__ import annotations

import ctypes
import platform

SYSCALLS = {"x86_64": 239, "aarch64": 236}  # get_mempolicy, which the C library does not wrap
OF_ADDRESS = 1 | 2  # MPOL_F_NODE | MPOL_F_ADDR


def node_of(address: int) -> int | None:
    """The node of the page at this address; None where the kernel does not say (a seccomp filter, nothing
    mapped there).

    A page that was never touched is given a place by the question.
    """
    number = SYSCALLS.get(platform.machine())
    if number is None:
        return None
    try:
        call = ctypes.CDLL(None).syscall
    except (OSError, AttributeError):
        return None
    node = ctypes.c_int(-1)
    call.restype = ctypes.c_long
    result = call(
        ctypes.c_long(number), ctypes.byref(node), None, ctypes.c_ulong(0), ctypes.c_void_p(address), ctypes.c_ulong(OF_ADDRESS)
    )
    return node.value if result == 0 and node.value >= 0 else None
