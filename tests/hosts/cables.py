"""Two hosts with several cables between them: one for control and one for each rail. Nothing leaves the machine.

    with Cables(2) as cables:                   a rail is cables.left.rails[0], an address; rails cannot reach each other
        cables.limit(400)                       Mbit/s of each rail, each way
        cables.cut(0)                           somebody pulls the first rail's cable
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tests.hosts.net import KEY, NOWHERE, inside, ip


class End:
    """One of the two hosts."""

    def __init__(self, namespace: str, side: int, rails: int) -> None:
        self.namespace = namespace
        self.address = f"10.98.0.{side}"
        self.listen = f"{self.address}:0"
        self.rails = [f"10.98.{i + 1}.{side}" for i in range(rails)]
        self._processes: list[subprocess.Popen[bytes]] = []

    def inside(self) -> Any:
        """A context: the calling thread lives on this host."""
        return inside(self.namespace)

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process of this host; it is killed at the end."""
        environ = {**os.environ, "AIOTRANSFER_KEY": KEY}
        process = subprocess.Popen(["ip", "netns", "exec", self.namespace, *command], env=environ, **options)
        self._processes.append(process)
        return process

    def signal(self, number: int) -> None:
        """To all its processes."""
        for process in self._processes:
            process.send_signal(number)

    def close(self) -> None:
        """Its processes die, and it goes."""
        for process in self._processes:
            process.kill()
            process.wait()
        ip("netns", "del", self.namespace)


class Cables:
    """Two hosts, and eth0 for control, eth1 and so on for rails."""

    def __init__(self, rails: int) -> None:
        self.rails = rails
        token = f"at{os.getpid():x}-{secrets.token_hex(3)}"
        self._names = [f"{token}-{side}" for side in (1, 2)]

    def __enter__(self) -> Cables:
        for name in self._names:
            ip("netns", "add", name)
        self.left, self.right = (End(name, side, self.rails) for side, name in enumerate(self._names, 1))
        try:
            for i in range(self.rails + 1):
                ip("-n", self._names[0], "link", "add", "name", f"eth{i}", "type", "veth", "peer", "name", f"eth{i}",
                   "netns", self._names[1])  # fmt: skip
            for end in (self.left, self.right):
                for device, address in enumerate([end.address, *end.rails]):
                    ip("-n", end.namespace, "address", "add", f"{address}/24", "dev", f"eth{device}")
                    ip("-n", end.namespace, "link", "set", f"eth{device}", "up")
                ip("-n", end.namespace, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Nothing of it is left."""
        self.left.close()
        self.right.close()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- what may happen ----

    def limit(self, mbit: int) -> None:
        """How fast each rail is."""
        for name in self._names:
            for i in range(self.rails):
                subprocess.run(
                    ["tc", "-n", name, "qdisc", "replace", "dev", f"eth{i + 1}", "root", "tbf",
                     "rate", f"{mbit}mbit", "burst", "128kb", "latency", "50ms"], check=True,
                )  # fmt: skip

    def cut(self, rail: int) -> None:
        """Somebody pulls a cable, at the right side: the left one's has no light any more."""
        ip("-n", self.right.namespace, "link", "set", f"eth{rail + 1}", "down")

    def mend(self, rail: int) -> None:
        """And puts it in again."""
        ip("-n", self.right.namespace, "link", "set", f"eth{rail + 1}", "up")

    def hush(self, rail: int) -> None:
        """What goes either way gets lost, without a word."""
        for end, other in ((self.left, self.right), (self.right, self.left)):
            ip("-n", end.namespace, "neigh", "replace", other.rails[rail], "lladdr", NOWHERE, "dev", f"eth{rail + 1}",
               "nud", "permanent")  # fmt: skip

    def unhush(self, rail: int) -> None:
        """It gets there again."""
        for end, other in ((self.left, self.right), (self.right, self.left)):
            ip("-n", end.namespace, "neigh", "del", other.rails[rail], "dev", f"eth{rail + 1}")

    def take_address(self, rail: int) -> None:
        """The left side's end of it loses its address."""
        ip("-n", self.left.namespace, "address", "del", f"{self.left.rails[rail]}/24", "dev", f"eth{rail + 1}")

    def give_address(self, rail: int) -> None:
        """And gets it back."""
        ip("-n", self.left.namespace, "address", "add", f"{self.left.rails[rail]}/24", "dev", f"eth{rail + 1}")
