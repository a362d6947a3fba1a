"""New weights in place between Ray actors: two trainers push what they learn into two inference instances of two ranks.

    pip install ray
    python examples/weights_ray.py                                      # all actors on this machine
    AIOTRANSFER_KEY=... python examples/weights_ray.py --address auto   # spread over the machines of a Ray cluster

Ray starts the actors, carries their addresses, and starts a killed actor again; weights go from memory to memory. Each actor's
engine and role live on the event loop of that actor, beside its other calls. In the middle of version 3 an inference actor is
killed: the other instance goes on with version 3, the killed rank's instance keeps version 2. Ray starts the actor again, and its
instance catches up from the other one, before the trainers publish anything else. The last line is `weights equal: yes`, and the
status 1 when it is not. `weights_words.py` has the model. Only the public API is used.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import ray
import weights_words as model

import aiotransfer as at
from aiotransfer import rendezvous, weights

INSTANCES = "left", "right"
VERSIONS, KILLED = 4, 3  # how many are published; in the middle of which an inference actor is killed
STEPS = 4  # of training before each version
DEADLINE = 60.0  # seconds, of everything that is waited for
ANSWER = 8  # words


def host() -> str:
    """This host's address as Ray knows it; loopback where there is no key, without which engines accept this host alone."""
    if "AIOTRANSFER_KEY" not in os.environ:
        return "127.0.0.1"
    node = ray.get_runtime_context().get_node_id()
    return next(str(one["NodeManagerAddress"]) for one in ray.nodes() if one["NodeID"] == node)


class Actor:
    """An engine that lives as long as the actor, on the actor's event loop."""

    async def open(self, name: str) -> str:
        """Open the engine; its address."""
        self.engine: Any = await at.open_engine(listen=f"{host()}:0", name=name, timeout=DEADLINE)
        return str(self.engine.address)

    async def close(self) -> None:
        """Leave in order."""
        await self.role.aclose()  # type: ignore[attr-defined]
        await self.engine.aclose()


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
class Trainer(Actor):
    """A trainer rank."""

    async def join(self, addresses: list[str], rank: int) -> None:
        """Meet the other trainer ranks; `addresses` has those of all, in the order of their ranks."""
        group = await rendezvous.from_list(self.engine, addresses)
        self.learner = await asyncio.to_thread(model.Learner, rank)
        self.role = weights.Publisher(self.engine, model.trainer_layout().bind(rank, self.learner.memory), group=group)
        self.entered: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self.released = asyncio.Event()

    async def train(self, steps: int) -> float:
        """The loss."""
        return await asyncio.to_thread(self.learner.train, steps)

    async def publish(self, number: int, hold: bool) -> dict[str, str]:
        """Bring a version to all inference ranks. Which ranks have not got it, and why. `hold`: stay in the middle of it until
        `release` is called."""
        try:
            async with self.role.publish(number):
                self.entered[number].set()
                if hold:
                    await self.released.wait()
        except weights.UpdateError as error:
            return dict(error.missing)
        return {}

    async def midway(self, number: int) -> None:
        """Returns when `publish` is in the middle of version `number`."""
        await self.entered[number].wait()

    async def release(self) -> None:
        """Let `publish` go on."""
        self.released.set()


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD", max_restarts=1, max_task_retries=-1)
class Server(Actor):
    """An inference rank. Calls wait while Ray starts it again."""

    async def serve(self, instance: str, rank: int, trainer: str) -> None:
        """Take versions from the trainers; `trainer` is the address of the first of them, which tells the others."""
        self.rank = rank
        await self.engine.connect(trainer)
        self.role = weights.Subscriber(self.engine, model.server_layout(), instance=instance, rank=rank)

    async def ready(self, number: int) -> str:
        """Returns when version `number` or a later one is here: the version."""
        async with asyncio.timeout(DEADLINE):
            async for version in self.role:
                if version.number >= number:
                    return str(version)
        raise RuntimeError("the subscriber is closed")

    async def version(self) -> str:
        """The present one."""
        return str(self.role.version)

    async def check(self) -> tuple[str, list[str]]:
        """The version, and what of it is not what the trainers signed."""
        async with self.role.reading() as version:
            return str(version), await asyncio.to_thread(model.unequal, self.role.tensors, self.rank)

    async def step(self, before: int, last: int) -> tuple[str, float, int]:
        """A forward step: the version, and the likeliest next word of this rank's part."""
        async with self.role.reading() as version:
            return (str(version), *model.best(self.role.tensors, self.rank, before, last))


class Failed(Exception):
    """The demonstration cannot go on."""


def get(calls: list[Any]) -> list[Any]:
    """What all of them return."""
    found: list[Any] = ray.get(calls, timeout=DEADLINE)
    return found


class Demonstration:
    """All actors, and what is found."""

    def __init__(self) -> None:
        self.trainers: list[Any] = [Trainer.remote() for _ in range(model.TRAINERS)]  # type: ignore[attr-defined]
        self.servers: dict[tuple[str, int], Any] = {
            (name, rank): Server.remote() for name in INSTANCES for rank in range(model.SERVERS)  # type: ignore[attr-defined]
        }  # fmt: skip
        self.words = model.text()[0]
        self.unequal: list[str] = []
        self.answers: list[str] = []
        self.losses: list[float] = []

    def run(self) -> bool:
        """Whether all was as it should be."""
        addresses = get([actor.open.remote(f"trainer {rank}") for rank, actor in enumerate(self.trainers)])
        get([actor.join.remote(addresses, rank) for rank, actor in enumerate(self.trainers)])
        get([self.servers[who].open.remote(f"{who[0]} {who[1]}") for who in self.servers])
        get([self.servers[who].serve.remote(*who, addresses[0]) for who in self.servers])
        for number in range(1, VERSIONS + 1):
            self.losses.append(sum(get([actor.train.remote(STEPS) for actor in self.trainers])) / model.TRAINERS)
            if number == KILLED:
                self.lose_one(number, addresses[0])
            elif missing := self.publish(number):
                raise Failed(f"version {number} has not come: {missing}")
            self.look(number)
        get([actor.close.remote() for actor in (*self.servers.values(), *self.trainers)])
        return self.outcome()

    def publish(self, number: int) -> dict[str, str]:
        """Which inference ranks have not got it, and why."""
        missing: dict[str, str] = get([actor.publish.remote(number, False) for actor in self.trainers])[0]
        return missing

    def lose_one(self, number: int, trainer: str) -> None:
        """Rank 1 of the last instance is killed in the middle of a version; then Ray starts it again."""
        who = INSTANCES[-1], 1
        published = [actor.publish.remote(number, actor is self.trainers[0]) for actor in self.trainers]
        get([self.trainers[0].midway.remote(number)])
        ray.kill(self.servers[who], no_restart=False)
        get([self.trainers[0].release.remote()])
        missing = get(published)[0]
        print(f"version {number}: rank {who[1]} of {who[0]} was killed in the middle of it")
        for rank, reason in missing.items():
            print(f"  {rank}: {reason}")
        kept = get([self.servers[who[0], 0].version.remote()])[0]
        if sorted(missing) != [f"{who[0]}/{rank}" for rank in range(model.SERVERS)] or not kept.endswith(f".{number - 1}"):
            raise Failed(f"rank 0 of {who[0]} has {kept}, and the trainers miss {missing}")
        get([self.servers[who].open.remote(f"{who[0]} {who[1]}")])  # by the same handle: Ray starts the actor again
        get([self.servers[who].serve.remote(*who, trainer)])
        came = get([self.servers[who[0], rank].ready.remote(number) for rank in range(model.SERVERS)])
        print(f"  rank {who[1]} of {who[0]} is back; {who[0]} has caught up with {', '.join(sorted(set(came)))}")

    def look(self, number: int) -> None:
        """Compare, and ask each instance for an answer."""
        for (name, rank), actor in self.servers.items():
            version, unequal = get([actor.check.remote()])[0]
            self.unequal += [f"version {version}, {name}/{rank}: {what}" for what in unequal]
            if not version.endswith(f".{number}"):
                self.unequal.append(f"{name}/{rank} has version {version}, not {number}")
        answers = {name: self.answer(name) for name in INSTANCES}
        if len(set(answers.values())) > 1:
            self.unequal.append(f"version {number}: the instances answer differently: {answers}")
        self.answers.append(answers[INSTANCES[0]])
        print(f"version {version}: loss {self.losses[-1]:.3f}; {' '.join(model.BEGINNING)} {self.answers[-1]}", flush=True)

    def answer(self, instance: str) -> str:
        """Some words from an instance, all of whose ranks take part in each step."""
        number = {word: k for k, word in enumerate(self.words)}
        said = [number[word] for word in model.BEGINNING]
        ranks = [self.servers[instance, rank] for rank in range(model.SERVERS)]
        for _ in range(ANSWER):
            found = get([actor.step.remote(*said[-2:]) for actor in ranks])
            if len({version for version, *_ in found}) > 1:
                self.unequal.append(f"{instance}: ranks answer by {sorted({version for version, *_ in found})}")
            said.append(max(found, key=lambda one: one[1])[2])
        return " ".join(self.words[k] for k in said[len(model.BEGINNING) :])

    def outcome(self) -> bool:
        """The last lines."""
        for text in self.unequal:
            print(text, file=sys.stderr)
        falls, change = self.losses[-1] < self.losses[0], len(set(self.answers)) > 1
        print(f"loss falls: {'yes' if falls else 'no'} ({self.losses[0]:.3f} to {self.losses[-1]:.3f})")
        print(f"answers change: {'yes' if change else 'no'}")
        print(f"weights equal: {'no' if self.unequal else 'yes'}")
        return falls and change and not self.unequal


def start(address: str | None, directory: str) -> None:
    """A Ray of this machine alone, with its files in `directory`, or the cluster at `address`."""
    if address is None:
        ray.init(
            num_cpus=8, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=directory, log_to_driver=False,
            configure_logging=False, object_store_memory=100 << 20,
        )  # fmt: skip
        return
    key = {name: value for name, value in os.environ.items() if name.startswith("AIOTRANSFER_")}
    ray.init(address=address, runtime_env={"working_dir": str(Path(__file__).parent), "env_vars": key})


def main() -> int:
    """0 when everything is as it should be."""
    parser = argparse.ArgumentParser(description="Trainers push new weights into running inference ranks; all are Ray actors.")
    parser.add_argument("--address", help="of a Ray cluster that runs already ('auto': the one of this host)")
    args = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="ray")  # short: Ray puts sockets beneath it
    start(args.address, directory)
    try:
        return 0 if Demonstration().run() else 1
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
