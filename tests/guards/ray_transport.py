"""Guards of the tensor transport for Ray, and of what it needs of an engine's thread."""

from __future__ import annotations

from tests.guards.mutant import Mutant

NODE, FETCHES, POOL = (f"aiotransfer/integrations/ray/{name}.py" for name in ("node", "fetches", "pool"))
OF_NODES, OF_POOL = "tests/integrations/ray/test_node.py", "tests/integrations/ray/test_pool.py"
OF_TRANSPORT = "tests/integrations/ray/test_transport.py"
TRANSPORT, THREAD = "aiotransfer/integrations/ray/transport.py", "aiotransfer/engine/loop_thread.py"

GUARDS = (
    Mutant(
        "submit: a cancelled future waits for its coroutine", THREAD,
        "            self._loop.call_soon_threadsafe(self._cancel_task)\n",
        "            self._loop.call_soon_threadsafe(self._cancel_task)\n            self._end_cancelled()\n",
        "tests/engine/test_submit.py",
    ),
    Mutant(
        "submit: closing ends what runs", THREAD,
        "        await _end_tasks()  #", "        #", "tests/engine/test_submit.py",
    ),
    Mutant(
        "submit: the futures of a closed loop", THREAD, "                future._abandon()\n", "                pass\n",
        "tests/engine/test_submit.py",
    ),
    Mutant(
        "connecting: not after the close", "aiotransfer/engine/peers/paths.py",
        "        if not is_open(self._engine):  # closed while another way was tried\n", "        if False:\n",
        "tests/engine/test_closing_while_connecting.py",
    ),
    Mutant(
        "shm: no connection of an engine that was closed", "aiotransfer/providers/shm/provider.py",
        "        if not self._lane.usable:\n            raise ClosedError(", "        if False:\n            raise ClosedError(",
        "tests/engine/test_closing_while_connecting.py",
    ),
    Mutant(
        "Ray: an abort waits for the end", NODE, "        wait(fetches, ABORT_SECONDS)\n", "", f"{OF_NODES} {OF_TRANSPORT}",
    ),
    Mutant(
        "Ray: an abort that overtakes its fetch", NODE, "            if self._refused.pop(name, 0) is None:\n",
        "            if False:\n", OF_NODES,
    ),
    Mutant(
        "Ray: a late abort is not for the next fetch", NODE, "if not fetches and name not in self._ended:", "if not fetches:",
        OF_NODES,
    ),
    Mutant(
        "Ray: memory of a failed fetch is given back", FETCHES,
        "            lease.end(in_use=any(one.source_in_use() for one in posted))\n", "", OF_NODES,
    ),
    Mutant(
        "Ray: memory that may be written into is not used again", POOL,
        "(self._pool.lose if in_use else self._pool.give_back)(block)", "self._pool.give_back(block)", OF_POOL,
    ),
    Mutant(
        "Ray: idle memory is bounded", POOL, "        while self.idle_bytes > IDLE_BYTES:\n", "        while False:\n", OF_POOL,
    ),
    Mutant(
        "Ray: idle memory is let go", POOL, "            self._timer = self._loop.call_later(IDLE_SECONDS, self._expire)\n",
        "            pass\n", OF_POOL,
    ),
    Mutant(
        "Ray: a fetch has a deadline", FETCHES, "            async with asyncio.timeout(seconds):\n",
        "            async with asyncio.timeout(None):\n", OF_NODES,
    ),
    Mutant(
        "Ray: an offer names its descriptors", FETCHES,
        "not 0 <= p.descriptor < len(offer.descriptors)", "False", OF_NODES,
    ),
    Mutant(
        "Ray: memory is registered as long as an object needs it", "aiotransfer/integrations/ray/exports.py",
        "if one is not None and not one.objects:", "if one is not None:", OF_NODES,
    ),
    Mutant(
        "Ray: a wait that is over ends the fetch", TRANSPORT, "            if timeout > 0:\n", "            if False:\n",
        OF_TRANSPORT,
    ),
    Mutant(
        "Ray: dropping a fetch ends it", TRANSPORT, "        if future is not None:\n            future.cancel()\n", "",
        OF_TRANSPORT,
    ),
    Mutant(
        "Ray: another machine needs a key", TRANSPORT,
        "        _check_reach(obj_id, metadata)\n        try:", "        try:", OF_TRANSPORT,
    ),
    Mutant(
        "Ray: target buffers fit", TRANSPORT, "    if given != sizes:\n", "    if False:\n", OF_TRANSPORT,
    ),
)  # fmt: skip
