"""A switch in bad weather: every frame goes to all other ports, late, out of order, twice or not at all. Run by `Hosts`."""

from __future__ import annotations

import fcntl
import heapq
import json
import random
import select
import socket
import struct
import sys
import time

SIOCETHTOOL = 0x8946
OFFLOADS = (0x17, 0x1F, 0x24)  # checksums, segments of TCP, segments of all
ETH_P_ALL = 3
MOST_BYTES = 1 << 16
ROOM = 8 << 20
MOST_WAITING = 0.1  # seconds that a frame waits for its turn at a port; others are lost, as in a switch whose queue is full


def frames_as_sent(interface: str) -> None:
    """Whole checksums and no segments larger than a frame: what a relay takes off the wire is what the other side gets."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in OFFLOADS:
            value = bytearray(struct.pack("II", command, 0))
            address = struct.unpack("P", struct.pack("P", _address(value)))[0]
            fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sP16x", interface.encode(), address))


def _address(buffer: bytearray) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def relay(ports: list[socket.socket], delay: float, jitter: float, lost: float, doubled: float, rate: float) -> None:
    """For ever."""
    free = dict.fromkeys(ports, 0.0)  # when all that was taken for that port will have gone out
    due: list[tuple[float, int, socket.socket, bytes]] = []
    number = 0
    while True:
        now = time.monotonic()
        while due and due[0][0] <= now:
            _, _, port, frame = heapq.heappop(due)
            try:
                port.send(frame)
            except OSError:
                pass  # a queue that is full loses frames
        ready, _, _ = select.select(ports, [], [], max(0.0, due[0][0] - now) if due else None)
        for port in ready:
            frame, address = port.recvfrom(MOST_BYTES)
            if address[2] == socket.PACKET_OUTGOING:
                continue
            for other in ports:
                now = time.monotonic()
                leaves = max(now, free[other])
                if other is port or random.random() < lost or leaves - now > MOST_WAITING:
                    continue
                if rate:
                    free[other] = leaves = leaves + len(frame) / rate
                for _ in range(1 + (random.random() < doubled)):
                    number += 1
                    heapq.heappush(due, (leaves + delay + random.random() * jitter, number, other, frame))


def main() -> None:
    ports = []
    for name in sys.argv[2:]:
        port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            port.setsockopt(socket.SOL_SOCKET, option, ROOM)
        port.bind((name, ETH_P_ALL))
        ports.append(port)
    print("up", flush=True)
    relay(ports, *json.loads(sys.argv[1]))


if __name__ == "__main__":
    main()
