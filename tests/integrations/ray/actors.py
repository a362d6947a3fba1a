"""Real actors, moved by `aiotransfer`: one scenario for each call, in a Ray of this machine alone.

    python -m tests.integrations.ray.actors SCENARIO

Prints what was seen, a line "ok" at the end, and returns 1 where something was wrong. `test_actors.py` runs all of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray
import torch

from aiotransfer.integrations import ray as aioray

SECONDS = 90.0  # of every wait that is expected to end
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
aioray.register()  # before the class that names it


def pattern(nbytes: int, seed: int) -> torch.Tensor:
    """Bytes that differ by place and by seed."""
    values = torch.arange(-(-nbytes // 8), dtype=torch.int64)
    values.mul_(0x9E3779B97F4A7C1).add_(seed)
    return values.view(torch.uint8)[:nbytes]


class Actor:
    """Has tensors, and takes those of others."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.kept: Any = None

    @ray.method(tensor_transport="aiotransfer")
    def make(self, nbytes: int, seed: int = 0) -> Any:
        """A tensor."""
        return pattern(nbytes, seed)

    @ray.method(tensor_transport="aiotransfer")
    def make_many(self, sizes: list[int]) -> Any:
        """Several tensors in one object, with other things beside them."""
        return {"sizes": sizes, "tensors": [pattern(nbytes, seed) for seed, nbytes in enumerate(sizes)]}

    def check(self, given: Any, nbytes: int, seed: int = 0) -> bool:
        """Whether that is the tensor of `make`."""
        return bool(torch.equal(given, pattern(nbytes, seed)))

    def check_many(self, given: Any) -> bool:
        """Whether these are the tensors of `make_many`."""
        sizes = given["sizes"]
        return all(torch.equal(one, pattern(sizes[seed], seed)) for seed, one in enumerate(given["tensors"]))

    def keep(self, given: Any) -> int:
        """Keep a tensor."""
        self.kept = given
        return int(given.numel())

    def check_kept(self, nbytes: int, seed: int = 0) -> bool:
        """Whether the tensor that was kept is still as it was; it is forgotten."""
        kept, self.kept = self.kept, None
        return self.check(kept, nbytes, seed)

    @ray.method(concurrency_group="beside")
    def seen(self) -> Any:
        """The statistics of the transport of this process."""
        return aioray.statistics()

    @ray.method(concurrency_group="beside")
    def process(self) -> int:
        """The number of this process."""
        return os.getpid()


def actors(count: int) -> list[Any]:
    """So many actors, which are up."""
    made = [ray.remote(num_cpus=0, concurrency_groups={"beside": 1})(Actor).remote() for _ in range(count)]
    get([one.process.remote() for one in made])
    return made


def get(what: Any) -> Any:
    """What Ray has of it, soon."""
    return ray.get(what, timeout=SECONDS)


def until(what: Callable[[], object], said: str) -> None:
    """Wait for a condition. Exits where it does not come true."""
    deadline = time.monotonic() + SECONDS
    while not what():
        if time.monotonic() > deadline:
            sys.exit(f"WRONG: it never came to this: {said}")
        time.sleep(0.02)


def must(what: object, said: str) -> None:
    """Exit where it is not so."""
    if not what:
        sys.exit(f"WRONG: {said}")


def fails(call: Callable[[], Any]) -> str:
    """The error of a call (of its submission, or of its result), which must be one of Ray's."""
    begin = time.monotonic()
    try:
        get(call())
    except ray.exceptions.RayError as error:
        text = str(error).strip().splitlines()[-1].strip()
        print(f"  after {time.monotonic() - begin:.1f} s: {type(error).__name__}: {text[:150]}")
        return f"{type(error).__name__}: {error}"
    sys.exit("WRONG: a call succeeded that could not")


def free(actor: Any) -> None:
    """Nothing of a fetch is left in an actor."""
    until(lambda: get(actor.seen.remote()).running_fetches == 0, "no fetch is under way")
    until(lambda: get(actor.seen.remote()).receive_bytes_in_use == 0, "the memory of received tensors is free")


def sizes() -> None:
    """Objects of 1 KiB to 1 GiB, as arguments of a task, and by `ray.get` in the driver."""
    left, right = actors(2)
    for nbytes in (KIB, 4097, 64 * KIB, MIB, 16 * MIB, 256 * MIB, GIB):
        made = left.make.remote(nbytes, nbytes)
        must(get(right.check.remote(made, nbytes, nbytes)), f"{nbytes} bytes arrive")
        if nbytes <= 16 * MIB:
            must(torch.equal(get(made), pattern(nbytes, nbytes)), f"{nbytes} bytes arrive in the driver")
        del made
    until(lambda: get(left.seen.remote()).registered_bytes == 0, "the sender's memory is released")
    free(right)
    seen = get(right.seen.remote())
    must(list(seen.ways.values()).count("shm") == len(seen.ways), f"by shm: {seen.ways}")
    print(f"  {seen.fetched_objects} objects, {seen.fetched_bytes} bytes")


def many() -> None:
    """Many objects at once, between actors that all send and receive; many tensors in one object."""
    group = actors(3)
    lengths = [1 + 7919 * number % (3 * MIB) for number in range(30)]
    made = [group[number % 3].make.remote(nbytes, number) for number, nbytes in enumerate(lengths)]
    calls = [
        group[(number + step) % 3].check.remote(made[number], nbytes, number)
        for number, nbytes in enumerate(lengths)
        for step in (1, 2)
    ]
    must(all(get(calls)), "all objects arrive at the two others")
    objects = [one.make_many.remote([(number * 37) % 5000 for number in range(500)]) for one in group]
    calls = [group[(number + step) % 3].check_many.remote(ref) for number, ref in enumerate(objects) for step in (1, 2)]
    must(all(get(calls)), "all tensors of an object arrive at the two others")
    del made, calls, objects
    for one in group:
        until(lambda one=one: get(one.seen.remote()).registered_bytes == 0, "the sender's memory is released")  # type: ignore[misc]
        free(one)


def driver() -> None:
    """Objects that the driver puts, tensors that go into memory that was given, and a timeout of `ray.get`."""
    left, right = actors(2)
    put = ray.put(pattern(3 * MIB, 5), _tensor_transport="aiotransfer")
    must(get(right.check.remote(put, 3 * MIB, 5)), "what the driver put arrives")
    made, target = left.make.remote(2 * MIB, 9), torch.zeros(2 * MIB, dtype=torch.uint8)
    ray.experimental.set_target_for_ref(made, [target])
    found = get(made)
    must(found is target and torch.equal(target, pattern(2 * MIB, 9)), "the bytes are in the memory that was given")
    large = left.make.remote(512 * MIB)
    until(lambda: get(left.seen.remote()).offered_objects == 1, "the object is there")
    try:
        ray.get(large, timeout=0.002)
    except ray.exceptions.GetTimeoutError:
        print("  ray.get ended at its timeout")
    else:
        sys.exit("WRONG: ray.get had no timeout")
    until(lambda: aioray.statistics().running_fetches == 0, "no fetch is under way")
    del made, target
    until(lambda: aioray.statistics().receive_bytes_in_use == 0, "the memory of the driver is free")
    must(get(right.check.remote(large, 512 * MIB)), "the same object is fetched afterwards")


def source_killed() -> None:
    """The actor that has an object is killed before, while and after another one fetches it."""
    nbytes = 512 * MIB
    spare, taker = actors(2)
    first = actors(1)[0]
    made = first.make.remote(MIB, 1)
    must(get(taker.check.remote(made, MIB, 1)), "the two are connected")
    print("before:")
    other = first.make.remote(MIB, 2)
    get(first.seen.remote())
    ray.kill(first)
    fails(lambda: taker.check.remote(other, MIB, 2))
    free(taker)
    print("while:")
    second = actors(1)[0]
    large = second.make.remote(nbytes, 3)
    until(lambda: get(second.seen.remote()).offered_objects == 1, "the object is there")
    call = taker.check.remote(large, nbytes, 3)
    until(lambda: get(taker.seen.remote()).running_fetches == 1, "the fetch is under way")
    ray.kill(second)
    fails(lambda: call)
    free(taker)
    print("after:")
    third = actors(1)[0]
    must(get(taker.keep.remote(third.make.remote(16 * MIB, 4))) == 16 * MIB, "it arrives")
    ray.kill(third)
    must(get(taker.check_kept.remote(16 * MIB, 4)), "what has arrived stays")
    must(get(taker.check.remote(spare.make.remote(MIB, 5), MIB, 5)), "the receiver goes on with another sender")
    free(taker)


def taker_killed() -> None:
    """The actor that fetches is killed before, while and after: the one that has the object goes on, its memory is released."""
    source = actors(1)[0]
    last = kill_takers(source.make.remote(512 * MIB, 3), 512 * MIB)
    until(lambda: get(source.seen.remote()).registered_bytes == 0, "the sender's memory is released")
    free(last)


def kill_takers(large: Any, nbytes: int) -> Any:
    """Three actors that are killed, each at another moment; the fourth, which has the object in the end."""
    for moment in ("before", "while", "after"):
        print(f"{moment}:")
        taker = actors(1)[0]
        if moment == "before":
            ray.kill(taker)
            fails(lambda taker=taker: taker.check.remote(large, nbytes, 3))  # type: ignore[misc]
        elif moment == "while":
            call = taker.check.remote(large, nbytes, 3)
            until(lambda taker=taker: get(taker.seen.remote()).running_fetches == 1, "the fetch is under way")  # type: ignore[misc]
            ray.kill(taker)
            fails(lambda call=call: call)  # type: ignore[misc]
        else:
            must(get(taker.keep.remote(large)) == nbytes, "it arrives")
            ray.kill(taker)
    last = actors(1)[0]
    must(get(last.check.remote(large, nbytes, 3)), "another receiver has it")
    return last


def stopped() -> None:
    """A process that is stopped holds a fetch up until its deadline, which `test_actors.py` makes short: both actors live on."""
    source, taker = actors(2)
    processes = get([source.process.remote(), taker.process.remote()])
    made = source.make.remote(4 * MIB, 1)
    until(lambda: get(source.seen.remote()).offered_objects == 1, "the object is there")
    os.kill(processes[0], signal.SIGSTOP)
    try:
        error = fails(lambda: taker.check.remote(made, 4 * MIB, 1))
        must("aiotransfer" in error, "the error is the transport's")
        free(taker)
    finally:
        os.kill(processes[0], signal.SIGCONT)
    must(get([source.process.remote(), taker.process.remote()]) == processes, "both actors are alive")
    must(get(taker.check.remote(source.make.remote(4 * MIB, 2), 4 * MIB, 2)), "and go on")
    free(taker)


SCENARIOS = {one.__name__: one for one in (sizes, many, driver, source_killed, taker_killed, stopped)}


def main() -> int:
    """A Ray of this machine alone, gone afterwards with its files."""
    directory = tempfile.mkdtemp(prefix="ray")  # short: Ray puts sockets beneath it
    ray.init(
        num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=directory, log_to_driver=False,
        configure_logging=False, object_store_memory=100 << 20,
    )  # fmt: skip
    try:
        SCENARIOS[sys.argv[1]]()
        print("ok")
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
