"""Guards of the providers."""

from __future__ import annotations

from tests.guards.mutant import Mutant

GUARDS = (
    Mutant(
        "pods: the kernel names the process at the other end", "aiotransfer/providers/shm/pidfd.py",
        "        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)\n", "        return -1\n", "tests/hosts/test_pods.py",
    ),
    Mutant(
        "lifetime: a lane keeps registered memory", "aiotransfer/providers/lane.py",
        """        self.holdings.hold("region", int(region), keep)\n""", "", "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "lifetime: a forgotten lane ends", "aiotransfer/providers/lane.py",
        "        weakref.finalize(self, self.holdings.end).atexit = False", "        weakref", "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "lifetime: native threads end before the interpreter", "aiotransfer/providers/holdings.py",
        "atexit.register(_at_exit)", "atexit", "tests/engine/test_lifetime.py",
    ),
    Mutant(
        "lifetime: descriptors that nobody took", "aiotransfer/providers/elsewhere.py",
        "        if self:\n            close_elsewhere(self)\n", "        pass\n", "tests/providers/shm/test_fd_passing.py",
    ),
    Mutant(
        "hostile: forged loopback memory", "aiotransfer/providers/loopback.py",
        "if not owner.covers(grant):", "if False:", "tests/control/test_hostile_limits.py",
    ),
    Mutant(
        "what strangers sent is not closed on the loop", "aiotransfer/providers/elsewhere.py",
        "    _closer.close(fds)\n", "    for fd in fds:\n        _close(fd)\n", "tests/providers/shm/test_fd_listener.py",
    ),
    Mutant(
        "exit: every thread that was started has begun", "aiotransfer/providers/elsewhere.py",
        "atexit.register(_at_exit)", "atexit", "tests/providers/test_elsewhere.py",
    ),
    Mutant(
        "what a refused offer brought is not closed on the loop", "aiotransfer/providers/shm/provider.py",
        "            close_elsewhere([*fds, *(fd for fd in (process, mem) if fd >= 0)])\n",
        "            fd_passing.close_all([*fds, *(fd for fd in (process, mem) if fd >= 0)])\n",
        "tests/control/test_slow_descriptors.py",
    ),
    Mutant(
        "every descriptor of a packet is taken", "aiotransfer/providers/shm/fd_passing.py",
        "MOST_BYTES, KERNEL_FDS, socket", "MOST_BYTES, MOST_FDS, socket", "tests/control/test_slow_descriptors.py",
    ),
    Mutant(
        "what strangers sent is only looked at", "aiotransfer/providers/shm/fd_listener.py",
        "parse(sock.recv(MOST_BYTES + 1, socket.MSG_PEEK), 0)", "parse(socket.recv_fds(sock, MOST_BYTES, 4)[0], 0)",
        "tests/providers/shm/test_fd_listener.py",
    ),
    Mutant(
        "another user is dropped at once", "aiotransfer/providers/shm/fd_listener.py",
        "welcome = self._uid in (None, uid)", "welcome = True", "tests/providers/shm/test_fd_listener.py",
    ),
    Mutant(
        "one at random makes room: descriptors", "aiotransfer/providers/shm/fd_listener.py",
        "random.choice([stranger for stranger in self._strangers.values() if users[stranger.uid] == most])",
        "next(stranger for stranger in self._strangers.values() if users[stranger.uid] == most)",
        "tests/providers/shm/test_fd_listener.py",
    ),
    Mutant(
        "a friend waits in line", "aiotransfer/providers/shm/fd_passing.py",
        "        sock = await _Line(name, seconds).wait(loop)\n", "        raise\n", "tests/providers/shm/test_fd_listener.py",
    ),
)  # fmt: skip
