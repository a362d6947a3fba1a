"""A descriptor whose last `close` takes its time."""

from __future__ import annotations

import socket
import struct

LINGER = 30  # seconds, for which the close of a descriptor may wait


def slow_to_close() -> tuple[socket.socket, list[socket.socket]]:
    """A socket with unsent bytes that lingers, and what must stay open meanwhile."""
    door = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(door.getsockname())
    theirs, _ = door.accept()
    ours.setblocking(False)
    try:
        while True:
            ours.send(bytes(1 << 16))
    except BlockingIOError:
        pass
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER))
    return ours, [door, theirs]
