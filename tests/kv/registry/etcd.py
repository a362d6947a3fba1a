"""An etcd server of our own, where Debian's `etcd-server` and the client are installed."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path


def missing() -> str | None:
    """Why there is no etcd here."""
    if shutil.which("etcd") is None:
        return "no server (apt-get install etcd-server)"
    if importlib.util.find_spec("etcd3gw") is None:
        return "no client (pip install 'aiotransfer[etcd]')"
    return None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Etcd:
    """Started at once; `stop` and `start` it again: its data stay."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self._peer_port = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        url, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self._peer_port}"
        command = [
            "etcd", "--data-dir", str(self.directory), "--listen-client-urls", url, "--advertise-client-urls", url,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
            "--heartbeat-interval", "50", "--election-timeout", "500",
        ]  # fmt: skip
        with open(self.directory.with_suffix(".log"), "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                    if b"true" in answer.read():
                        return
            except OSError:
                pass
            assert time.monotonic() < until, self.directory.with_suffix(".log").read_text()[-2000:]
            time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None
