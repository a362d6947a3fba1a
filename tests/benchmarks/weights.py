"""New weights from 2 trainers to 2 inference ranks on one machine, beside a copy, broadcasts over gloo and safetensors files.

    make bench-weights                          about 2 GB of bfloat16 in all; needs 13 GB of memory
    make bench-weights ARGS="--gigabytes 0.5 --rounds 3 --json weights.json"
    make bench-weights ARGS=--report            the table and the plot of docs/design/weights.md; needs torch and safetensors

The trainers hold the rows of every matrix in halves, the inference ranks what tensor parallelism gives them: rows of some,
columns of the others. All memory is allocated and has been touched; the first two versions are not counted. In each round every
way is measured once, in the same four processes, and a ratio is the median over the rounds of the ratios within a round.

Copy: each trainer copies its own half to its own memory, both at once. gloo: each trainer broadcasts its tensors to both
inference ranks, both trainers at once, and those copy their part out. Files: each trainer saves its tensors to tmpfs, then each
inference rank reads its part of both files. Memory: how much that of a process grows meanwhile at most. On a busy machine look at
the processor time, which is that of all four processes. No speed is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.bench.session import machine
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.weights import Bound, Layout, Quantise
from tests.benchmarks.weights_model import BLOCK, RANKS, boxes, inference_layout, layers, numbers, overlap, shards, trainer_layout
from tests.benchmarks.weights_report import Figures, Taken, text, told, write

ROOT = Path(__file__).parents[2]
CONFIG = at.Config(peer_timeout=60)  # a busy machine is no lost peer
SECONDS, WARM = 300, 2  # versions that fill both buffers
RULE = Quantise("layers.{i}.{m}", "layers.{i}.{m}_scale", (BLOCK, BLOCK))


# ---- one process ----


class Memory:
    """Resident memory of this process."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._read("VmRSS")

    def grown(self) -> int:
        """Bytes, at most, since this was made."""
        return self._read("VmHWM") - self._before

    @staticmethod
    def _read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


@contextlib.contextmanager
def measured() -> Iterator[None]:
    """Tell the process that leads this one when the block began and ended, and how much memory grew."""
    memory, begin = Memory(), time.monotonic()
    yield
    say(begin=begin, end=time.monotonic(), memory=memory.grown())


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


class Others:
    """What is measured beside: broadcasts and files. `rank`: of the trainers, or of the inference ranks after them."""

    def __init__(self, count: int, number: int, folder: str) -> None:
        self.number, self.folder = number, Path(folder)
        self.trainer, self.inference = trainer_layout(count), inference_layout(count, small=False)
        self.is_trainer, self.rank = number < RANKS, number % RANKS
        self.memory: dict[str, Any] = {}
        self._groups: list[Any] = []
        self._mine: dict[int, Any] = {}
        self._buffers: dict[tuple[int, int], Any] = {}

    def prepare(self) -> None:
        """Memory of an inference rank, touched."""
        if not self.is_trainer:
            self._mine = boxes(self.inference, self.rank)
            self.memory = {name: np.full(box[1], 1, np.uint16) for name, box in self._mine.values()}

    def place(self, tensor: int, box: tuple[Any, Any], read: Callable[[Any], Any]) -> None:
        """Copy our part of a trainer's tensor: `read` gives a part of that."""
        name, mine = self._mine[tensor]
        if (both := overlap(box, mine)) is not None:
            self._torch(self.memory[name])[both[1]].copy_(read(both[0]))

    @staticmethod
    def _torch(array: Any) -> Any:
        import torch

        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)

    def gloo(self) -> None:
        """Everything by broadcasts."""
        dist: Any = importlib.import_module("torch.distributed")
        if not self._groups:
            store = dist.FileStore(str(self.folder / "store"), 2 * RANKS)
            dist.init_process_group("gloo", store=store, rank=self.number, world_size=2 * RANKS)
            ends = range(RANKS, 2 * RANKS)
            self._groups = [dist.new_group([trainer, *ends]) for trainer in range(RANKS)]
        dist.barrier()
        with measured():
            trainers = [self.rank] if self.is_trainer else range(RANKS)
            held = {trainer: boxes(self.trainer, trainer) for trainer in trainers}
            for tensor in range(len(self.trainer.names)):
                works = []
                for trainer in trainers:
                    name, box = held[trainer][tensor]
                    data = self._torch(self.memory[name] if self.is_trainer else self._buffer(trainer, box[1]))
                    works.append((dist.broadcast(data, trainer, self._groups[trainer], async_op=True), box, data))
                for work, box, data in works:
                    work.wait()
                    if not self.is_trainer:
                        self.place(tensor, box, data.__getitem__)

    def _buffer(self, trainer: int, extent: list[int]) -> Any:
        key = trainer, int(np.prod(extent))
        if key not in self._buffers:
            self._buffers[key] = np.ones(key[1], np.uint16)
        return self._buffers[key].reshape(extent)

    def save(self) -> None:
        """Our tensors to a file."""
        save_file = importlib.import_module("safetensors.torch").save_file
        with measured():
            save_file({name: self._torch(array) for name, array in self.memory.items()}, self.folder / f"{self.rank}")

    def load(self) -> None:
        """Our part of all files."""
        safe_open = importlib.import_module("safetensors").safe_open
        with measured():
            for trainer in range(RANKS):
                with safe_open(self.folder / f"{trainer}", "pt") as file:
                    for tensor, (name, box) in boxes(self.trainer, trainer).items():
                        self.place(tensor, box, file.get_slice(name).__getitem__)


async def lead(run: Callable[[dict[str, Any]], Any]) -> None:
    """Commands from the standard input, one after the other, to its end."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        await run(json.loads(line))


async def train(rank: int, args: argparse.Namespace) -> None:
    """A trainer."""
    others = Others(args.layers, rank, args.folder)
    others.memory = shards(others.trainer, rank)
    copies: dict[str, Any] = {}
    bound = Bound(others.trainer, rank, others.memory)
    async with at.open_engine(providers="shm", config=CONFIG, name=f"trainer {rank}") as engine:
        publisher: Any = None

        async def run(command: dict[str, Any]) -> None:
            nonlocal publisher
            match command["do"]:
                case "open":
                    publisher = weights.Publisher(
                        engine, bound, group=engine.group(command["members"]), timeout=SECONDS,
                        rules=[RULE] if args.small else [], staging_bytes=args.staging,
                    )  # fmt: skip
                    await publisher.__aenter__()
                    say(open=True)
                case "publish":
                    with measured():
                        async with publisher.publish(command["number"]):
                            pass
                case "copy":
                    if not copies:
                        copies.update({name: np.full_like(array, 1) for name, array in others.memory.items()})
                    with measured():
                        for name, array in others.memory.items():
                            np.copyto(copies[name], array)
                case "gloo":
                    others.gloo()
                case "save":
                    others.save()

        say(address=str(engine.address))
        try:
            await lead(run)
        finally:
            if publisher is not None:
                await publisher.aclose()


async def serve(rank: int, args: argparse.Namespace) -> None:
    """An inference rank."""
    others = Others(args.layers, RANKS + rank, args.folder)
    others.prepare()
    async with at.open_engine(providers="shm", config=CONFIG, name=f"inference {rank}") as engine:
        await engine.connect(args.trainer, timeout=SECONDS)
        layout = inference_layout(args.layers, small=args.small)
        async with weights.Subscriber(engine, layout, instance="a", rank=rank, timeout=SECONDS) as subscriber:

            async def run(command: dict[str, Any]) -> None:
                match command["do"]:
                    case "gloo":
                        others.gloo()
                    case "load":
                        others.load()
                    case "check":
                        await subscriber.ready()
                        say(equal=args.small or _equal(layout, rank, subscriber))

            say(open=True)
            await lead(run)


def _equal(layout: Layout, rank: int, subscriber: weights.Subscriber) -> bool:
    for name, box in boxes(layout, rank).values():
        memory = np.asarray(memory_of(subscriber.memory.active[name])).view(np.uint16)
        if not np.array_equal(memory.reshape(box[1]), numbers(layout.names.index(name), *box)):
            return False
    return True


# ---- the process that leads ----


class Worker:
    """One of the four."""

    def __init__(self, args: argparse.Namespace, *more: str) -> None:
        command = [
            sys.executable, "-m", "tests.benchmarks.weights", "--layers", str(args.layers), "--folder", args.folder,
            "--staging", str(args.staging), *more,
        ]  # fmt: skip
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environ
        )

    def tell(self, **what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def processor_seconds(self) -> float:
        """Of all its threads."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process has ended: {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


class Four:
    """Two trainers and two inference ranks."""

    def __init__(self, args: argparse.Namespace, *, small: bool) -> None:
        more = ["--small"] if small else []
        self.trainers = [Worker(args, "--role", f"trainer-{rank}", *more) for rank in range(RANKS)]
        members = [worker.hear()["address"] for worker in self.trainers]
        for worker in self.trainers:
            worker.tell(do="open", members=members)
            worker.hear()
        self.servers = [
            Worker(args, "--role", f"server-{rank}", "--trainer", members[0], *more) for rank in range(RANKS)
        ]  # fmt: skip
        for worker in self.servers:
            worker.hear()
        self.number = 0

    def all(self, workers: list[Worker], **what: Any) -> Taken:
        """All do it at once: from the first that began to the last that ended."""
        everyone = [*self.trainers, *self.servers]
        before = sum(worker.processor_seconds() for worker in everyone)
        for worker in workers:
            worker.tell(**what)
        said = [worker.hear() for worker in workers]
        used = sum(worker.processor_seconds() for worker in everyone) - before
        wall = max(one["end"] for one in said) - min(one["begin"] for one in said)
        return Taken(wall, used, max(one["memory"] for one in said))

    def publish(self) -> Taken:
        """The next version."""
        self.number += 1
        return self.all(self.trainers, do="publish", number=self.number)

    def check(self) -> None:
        """What has arrived is what was sent."""
        for worker in self.servers:
            worker.tell(do="check")
            if not worker.hear()["equal"]:
                raise SystemExit("what arrived is not what was sent")

    def close(self) -> None:
        for worker in [*self.servers, *self.trainers]:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
        for worker in [*self.servers, *self.trainers]:
            worker.process.wait(60)


def measure(args: argparse.Namespace, *, small: bool) -> dict[str, list[Taken]]:
    """Every way, `args.rounds` times."""
    ways: dict[str, list[Taken]] = {"copy": [], "aiotransfer": []}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        args.folder = folder
        four = Four(args, small=small)
        try:
            for turn in range(-WARM, args.rounds):
                taken = dict(one_round(four, args, small=small))
                if args.verbose:
                    print(turn, taken, file=sys.stderr, flush=True)
                for name, one in taken.items() if turn >= 0 else ():
                    ways.setdefault(name, []).append(one)
            four.check()
        finally:
            four.close()
    return ways


def one_round(four: Four, args: argparse.Namespace, *, small: bool) -> Iterator[tuple[str, Taken]]:
    """Every way once."""
    yield "copy", four.all(four.trainers, do="copy")
    yield "aiotransfer", four.publish()
    if small or args.alone or "torch" in args.absent:
        return
    yield "gloo", four.all([*four.trainers, *four.servers], do="gloo")
    if "safetensors" not in args.absent:
        saved, loaded = four.all(four.trainers, do="save"), four.all(four.servers, do="load")
        yield "files", Taken(saved.wall + loaded.wall, saved.cpu + loaded.cpu, max(saved.memory, loaded.memory))
        for file in Path(args.folder).glob("[01]"):
            file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of bfloat16 in all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--staging", type=int, default=64 << 20, help="the watermark of temporary memory, in bytes")
    parser.add_argument("--no-float8", action="store_true")
    parser.add_argument("--alone", action="store_true", help="neither gloo nor files")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--report", action="store_true", help="write the table and the plot of the documentation")
    parser.add_argument("--verbose", action="store_true", help="every round")
    for name in ("--role", "--trainer", "--folder"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        role, _, rank = args.role.partition("-")
        asyncio.run((train if role == "trainer" else serve)(int(rank), args))
        return
    args.layers = layers(args.gigabytes)
    args.absent = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    if args.report and (args.alone or args.no_float8):
        parser.error("the page has all ways: neither --alone nor --no-float8")
    if args.report and (lacking := [name for name in (*args.absent, "matplotlib") if importlib.util.find_spec(name) is None]):
        parser.error(f"the page needs {' and '.join(lacking)}, which make test-demo installs, or pip")
    nbytes = 2 * sum(int(np.prod(shape)) for shape in trainer_layout(args.layers).shapes)
    before = os.getloadavg()[0]
    large = measure(args, small=False)
    small = {} if args.no_float8 else measure(args, small=True)
    figures = Figures(nbytes, args.staging, machine("asyncio"), (before, os.getloadavg()[0]), large, small, args.absent)
    print(text(figures))
    if args.json:
        args.json.write_text(json.dumps(told(figures), indent=2))
    if args.report:
        write(figures)


if __name__ == "__main__":
    main()
