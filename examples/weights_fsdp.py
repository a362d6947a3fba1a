"""New weights in place: four FSDP2 trainers push what they learn into a running inference instance of two tensor-parallel ranks.

    python examples/weights_fsdp.py                              # 22 million parameters; make demo-weights
    python examples/weights_fsdp.py --tiny --steps 2             # a small model, in seconds
    torchrun --nproc-per-node 6 examples/weights_fsdp.py --tiny  # ranks 0 to 3 train, 4 and 5 infer; no rank is killed

The trainers shard every parameter over all ranks with `fully_shard`, over gloo. The inference ranks keep q, k, v in one tensor
and gate and up in another, cut by heads and by rows, and the embedding, which is also the head, by words: `weights_model.py` has
both, and the rules that say so. After each version the bits of all weights are compared with those that `full_tensor()` gives at
the trainers, and the logits of both sides with each other. One inference rank is killed in the middle of an update and started
again: that update ends by name, the other rank keeps the version before, and the next update brings both the new one.

The text is that of Python's own help. The program ends with status 1 when anything is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import weights_model as parts
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from weights_model import FULL, SERVERS, TINY, Shape

import aiotransfer as at
from aiotransfer import rendezvous, weights

TRAINERS = 4
VERSIONS, KILLED = 4, 3  # how many are published; in the middle of which an inference rank is killed
ANSWER = 8  # words
TOLERANCE = 1e-5  # of logits, relative to the largest
DEADLINE = 100.0  # seconds, of one step of the demonstration

# ---- the roles ----


class Trainer:
    """A rank that trains and publishes."""

    def __init__(self, shape: Shape, mesh: DeviceMesh) -> None:
        torch.manual_seed(0)
        self.shape, self.text, self.rank = shape, parts.Text(shape.words), mesh.get_local_rank()
        self.group = mesh.get_group()
        model: Any = parts.Model(shape)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if shape == FULL else 1e-2)
        self.layout = weights.layout_of(model, ranks=TRAINERS)

    def loss(self) -> torch.Tensor:
        """Of this rank's words; rare ones, which all have number 0, do not count."""
        batch = self.text.batch(self.rank)
        return cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)

    def train(self, steps: int) -> float:
        """The loss of all ranks after `steps`."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        with torch.no_grad():
            mean = self.loss() / TRAINERS
        dist.all_reduce(mean, group=self.group)
        return float(mean)

    def reference(self) -> dict[str, Any]:
        """What the inference ranks should have and say, by torch alone. All ranks take part; rank 0 has the result."""
        with torch.no_grad():
            logits = self.model(self.text.prompt())
            whole = {name: thing.full_tensor() for name, thing in self.model.state_dict().items()}
        if self.rank:
            return {}
        return {
            "logits": logits.numpy(),
            "digests": [parts.digests(parts.expected(whole, self.shape, r)) for r in range(SERVERS)],
        }

    def step(
        self, thread: at.EngineThread, publisher: weights.Publisher, steps: int, number: int, midway: Callable[[], None]
    ) -> dict[str, Any]:
        """Train, but not before the first version, then publish. `midway` is called while bytes are on their way."""
        began = time.perf_counter()
        loss = self.train(steps if number > 1 else 0)
        trained = time.perf_counter()
        said = {"loss": loss, "train_s": trained - began, "parameters": self.parameters, **self.reference()}

        async def publish() -> None:
            async with publisher.publish(number):
                await asyncio.to_thread(midway)

        began = time.perf_counter()
        try:
            thread.run(publish())
        except weights.UpdateError as error:
            said["missing"] = error.missing
        return said | {"publish_s": time.perf_counter() - began}


class Server:
    """A rank that infers."""

    def __init__(self, shape: Shape, rank: int, group: Any) -> None:
        self.shape, self.rank, self.group, self.text = shape, rank, group, parts.Text(shape.words)
        layout = parts.inference_layout(shape)
        zeros = {
            name: torch.zeros_like(tensor, device="cpu")
            for name, tensor in parts.expected(parts.whole_of(shape), shape, rank).items()
        }
        self.layout = layout.bind(rank, zeros)

    async def answer(self, subscriber: weights.Subscriber) -> dict[str, Any]:
        """Logits of the prompt, and what comes behind it: under one version, which stays while this computes."""
        async with subscriber.reading() as version:
            return {"version": str(version), **await asyncio.to_thread(self.compute, subscriber.tensors)}

    @torch.no_grad()
    def compute(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        tensors = {name: tensor.detach() for name, tensor in tensors.items() if name != "head.weight"}  # that is the embedding
        ids = self.text.prompt()
        logits = parts.infer(tensors, self.shape, self.rank, self.group, ids)
        for _ in range(ANSWER):
            ids = torch.cat([ids, parts.infer(tensors, self.shape, self.rank, self.group, ids)[:, -1:].argmax(-1)], 1)
        answer = self.text.read(ids[0, parts.PROMPT :].tolist())
        return {"logits": logits.numpy(), "answer": answer, "digests": parts.digests(tensors)}


async def publisher_of(engine: at.Engine, trainer: Trainer, addresses: list[str]) -> weights.Publisher:
    """The role of a trainer rank; `addresses` are those of all of them."""
    return weights.Publisher(engine, trainer.layout, group=engine.group(addresses), rules=parts.RULES)


async def subscriber_of(engine: at.Engine, server: Server) -> weights.Subscriber:
    """The role of an inference rank, which is connected to the first trainer."""
    return weights.Subscriber(engine, server.layout, instance="chat")


def open_group(name: str, rank: int, ranks: int) -> None:
    """This process' gloo group, over a file."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    seconds = datetime.timedelta(seconds=DEADLINE)
    dist.init_process_group("gloo", init_method=f"file://{name}", rank=rank, world_size=ranks, timeout=seconds)


def trainer_main(rank: int, job: dict[str, Any], main: Connection) -> None:
    """A trainer process: it does as the main process says, round by round."""
    torch.set_num_threads(1)
    open_group(job["folder"] + "/trainers", rank, TRAINERS)
    trainer = Trainer(job["shape"], dist.init_device_mesh("cpu", (TRAINERS,)))
    with at.run_in_thread(name=f"trainer {rank}", timeout=DEADLINE / 2) as thread:
        main.send(str(thread.engine.address))
        addresses = main.recv()

        def midway() -> None:
            main.send("midway")
            main.recv()  # the inference rank is dead

        publisher = thread.run(publisher_of(thread.engine, trainer, addresses))
        while (order := main.recv()) is not None:
            kills = order["number"] == KILLED and rank == 0
            main.send(trainer.step(thread, publisher, job["steps"], order["number"], midway if kills else lambda: None))
        thread.run(publisher.aclose())
    dist.destroy_process_group()


def server_main(rank: int, job: dict[str, Any], main: Connection) -> None:
    """An inference process."""
    torch.set_num_threads(1)
    server = Server(job["shape"], rank, None)
    with at.run_in_thread(name=f"inference {rank}", timeout=DEADLINE / 2) as thread:
        thread.run(thread.engine.connect(job["leader"]))
        subscriber = thread.run(subscriber_of(thread.engine, server))
        main.send(None)
        while (order := main.recv()) is not None:
            if order == "version":
                main.send(str(subscriber.version))
            elif order == "answer":
                if job["spoil"] and rank == 1:
                    subscriber.tensors["layers.0.qkv"][5, 5] += 1
                main.send(thread.run(server.answer(subscriber)))
            else:  # a group of the ranks that live now
                if dist.is_initialized():
                    dist.destroy_process_group()
                open_group(order, rank, SERVERS)
                main.send(None)
        thread.run(subscriber.aclose())


# ---- the main process ----


class Failed(Exception):
    """The demonstration cannot go on."""


class Ranks:
    """Processes of one side; what still runs at the end of the block is killed."""

    def __init__(self, main: Callable[..., None], ranks: int, job: dict[str, Any]) -> None:
        self.context = multiprocessing.get_context("forkserver")  # imports torch once
        self.main, self.job = main, job
        self.pipes: dict[int, Connection] = {}
        self.processes: dict[int, Any] = {}
        for rank in range(ranks):
            self.start(rank)

    def start(self, rank: int) -> None:
        here, there = self.context.Pipe()
        process = self.context.Process(target=self.main, args=(rank, self.job, there), daemon=True)
        process.start()
        there.close()
        self.pipes[rank], self.processes[rank] = here, process

    def kill(self, rank: int) -> None:
        self.processes[rank].kill()
        self.processes[rank].join()
        self.pipes[rank].close()

    def ask(self, what: Any) -> list[Any]:
        """Tell all ranks, and what they answer."""
        for pipe in self.pipes.values():
            pipe.send(what)
        return [self.hear(rank) for rank in self.pipes]

    def hear(self, rank: int) -> Any:
        """What a rank says next. Raises `Failed`."""
        if not wait([self.pipes[rank]], DEADLINE):
            raise Failed(f"{self.main.__name__} {rank} has not answered for {DEADLINE:g} s")
        try:
            return self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join()
            raise Failed(f"{self.main.__name__} {rank} ended with status {self.processes[rank].exitcode}") from None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for rank, process in self.processes.items():
            if kind is None:
                self.pipes[rank].send(None)
                process.join(20)
            process.kill()
            process.join()
            self.pipes[rank].close()


class Record:
    """What is printed, and whether all of it is as it should be."""

    def __init__(self, say: Callable[..., None]) -> None:
        self.say = say
        self.losses: list[float] = []
        self.answers: list[str] = []
        self.unequal: list[str] = []
        self.worst = 0.0
        self.loss: dict[str, Any] | None = None  # of the rank that was killed

    def compare(self, number: int, trained: Any, answers: list[Any]) -> None:
        """One version: what rank 0 of the trainers said, and all inference ranks."""
        if not self.losses:
            self.say(f"{trained['parameters']:,} parameters; {TRAINERS} FSDP2 ranks to {SERVERS} tensor-parallel ranks")
        reference = torch.from_numpy(trained["logits"])
        for rank, answer in enumerate(answers):
            wanted, got = trained["digests"][rank], answer["digests"]
            unequal = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
            self.unequal += [f"version {answer['version']}, rank {rank}: {name}" for name in unequal]
            if not answer["version"].endswith(f".{number}"):
                self.unequal.append(f"rank {rank} has version {answer['version']}, not {number}")
            difference = float((torch.from_numpy(answer["logits"]) - reference).abs().max() / reference.abs().max())
            self.worst = max(self.worst, difference if math.isfinite(difference) else math.inf)
        if missing := trained.get("missing"):
            self.unequal.append(f"version {number} has not come: {missing}")
        self.losses.append(trained["loss"])
        self.answers.append(answers[0]["answer"])
        self.say(
            f"version {answers[0]['version']}: loss {trained['loss']:.3f}, trained {trained['train_s']:.1f} s, "
            f"published {1e3 * trained['publish_s']:.0f} ms; the inference side answers: {answers[0]['answer']}"
        )

    def outcome(self) -> dict[str, Any]:
        return {
            "losses": self.losses, "loss_falls": self.losses[-1] < self.losses[0], "answers": self.answers,
            "answers_change": len(set(self.answers)) > 1, "logits_difference": self.worst, "unequal": self.unequal,
            "logits_equal": self.worst <= TOLERANCE, "weights_equal": not self.unequal, "killed": self.loss,
        }  # fmt: skip


def demonstrate(job: dict[str, Any], record: Record) -> None:
    """All versions, and the loss of an inference rank. Raises `Failed`."""
    with Ranks(trainer_main, TRAINERS, job) as trainers:
        addresses = [trainers.hear(rank) for rank in range(TRAINERS)]
        for pipe in trainers.pipes.values():
            pipe.send(addresses)
        with Ranks(server_main, SERVERS, job | {"leader": addresses[0]}) as servers:
            [servers.hear(rank) for rank in range(SERVERS)]
            servers.ask(job["folder"] + "/first")
            for number in range(1, VERSIONS + 1):
                for pipe in trainers.pipes.values():
                    pipe.send({"number": number})
                if number == KILLED:
                    lose_a_rank(trainers, servers, record)
                    continue
                said = [trainers.hear(rank) for rank in range(TRAINERS)]
                if missing := said[0].get("missing"):
                    raise Failed(f"version {number} has not come: {missing}")
                record.compare(number, said[0], servers.ask("answer"))


def lose_a_rank(trainers: Ranks, servers: Ranks, record: Record) -> None:
    """Rank 1 of the instance is killed while bytes are on their way to it, and started again."""
    if (said := trainers.hear(0)) != "midway":
        raise Failed(f"version {KILLED} was not offered: {said.get('missing')}")
    servers.kill(1)
    trainers.pipes[0].send(None)
    said = [trainers.hear(rank) for rank in range(TRAINERS)]
    servers.pipes[0].send("version")
    kept = servers.hear(0)
    record.loss = {"missing": said[0].get("missing", {}), "kept": kept}
    record.losses.append(said[0]["loss"])
    record.say(f"version {KILLED}: inference rank 1 was killed; rank 0 keeps {kept}")
    for rank, reason in record.loss["missing"].items():
        record.say(f"  {rank}: {reason}")
    if not kept.endswith(f".{KILLED - 1}") or set(record.loss["missing"]) != {"chat/0", "chat/1"}:
        raise Failed(f"rank 0 has {kept}, and the trainers miss {record.loss['missing']}")
    servers.start(1)
    servers.hear(1)
    servers.ask(servers.job["folder"] + "/second")
    record.say("inference rank 1 is back")


# ---- started by torchrun ----


def torchrun(shape: Shape, steps: int, record: Record) -> None:
    """The same without a main process: `aiotransfer.rendezvous` brings the engines of all ranks together. Rank 0 records."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # for several hosts, name the network there
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=DEADLINE))
    rank = dist.get_rank()
    if dist.get_world_size() != TRAINERS + SERVERS:
        raise SystemExit(f"this needs {TRAINERS + SERVERS} ranks: torchrun --nproc-per-node {TRAINERS + SERVERS} ...")
    mesh, inferring = DeviceMesh("cpu", list(range(TRAINERS))), dist.new_group(list(range(TRAINERS, TRAINERS + SERVERS)))
    with at.run_in_thread(listen=rendezvous.listen_address(), name=f"rank {rank}", timeout=DEADLINE / 2) as thread:
        everyone = thread.run(rendezvous.from_environment(thread.engine))
        if rank < TRAINERS:
            trainer = Trainer(shape, mesh)
            publisher = thread.run(publisher_of(thread.engine, trainer, list(map(str, everyone.members[:TRAINERS]))))
        else:
            server = Server(shape, rank - TRAINERS, inferring)
            subscriber = thread.run(subscriber_of(thread.engine, server))
        for number in range(1, VERSIONS):
            said: Any = trainer.step(thread, publisher, steps, number, lambda: None) if rank < TRAINERS else None
            dist.barrier()  # all trainers have published
            if rank >= TRAINERS:
                said = thread.run(server.answer(subscriber))
            found: list[Any] | None = None if rank else [None] * (TRAINERS + SERVERS)
            dist.gather_object(said, found)
            if found is not None:
                record.compare(number, found[0], found[TRAINERS:])
        thread.run(publisher.aclose() if rank < TRAINERS else subscriber.aclose())
    dist.destroy_process_group()


def main() -> int:
    """0 when everything is equal."""
    parser = argparse.ArgumentParser(description="FSDP2 trainers push new weights into tensor-parallel inference ranks.")
    parser.add_argument("--steps", type=int, default=3, help="of training before each version but the first (default 3)")
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--spoil", action="store_true", help=argparse.SUPPRESS)  # an inference rank holds a wrong number
    args = parser.parse_args()
    if not 1 <= args.steps <= 1000:
        parser.error(f"--steps must lie in 1 to 1000, not {args.steps}")
    say: Callable[..., None] = (lambda *_: None) if args.json else lambda text: print(text, flush=True)
    record = Record(say)
    shape = TINY if args.tiny else FULL
    if dist.is_torchelastic_launched():
        torch.set_num_threads(1)
        torchrun(shape, args.steps, record)
        return 0 if os.environ["RANK"] != "0" else finish(record, args.json)
    try:
        with tempfile.TemporaryDirectory() as folder:
            demonstrate({"folder": folder, "shape": shape, "steps": args.steps, "spoil": args.spoil}, record)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    return finish(record, args.json)


def finish(record: Record, as_json: bool) -> int:
    """The last lines, and the status."""
    outcome = record.outcome()

    def word(name: str) -> str:
        return "yes" if outcome[name] else "no"

    for text in record.unequal:
        print(text, file=sys.stderr)
    if as_json:
        print(json.dumps(outcome))
    else:
        print(f"loss falls: {word('loss_falls')} ({record.losses[0]:.3f} to {record.losses[-1]:.3f})")
        print(f"answers change: {word('answers_change')}")
        print(f"logits equal: {word('logits_equal')} (largest relative difference {record.worst:.1e})")
        print(f"weights equal: {word('weights_equal')}")
    return 0 if all(outcome[name] for name in ("loss_falls", "answers_change", "logits_equal", "weights_equal")) else 1


if __name__ == "__main__":
    sys.exit(main())
