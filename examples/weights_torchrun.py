"""New weights in place between two jobs of torchrun: one trains and publishes, the other one infers.

    torchrun --standalone --nproc-per-node 2 examples/weights_torchrun.py train --listen 127.0.0.1:7070
    torchrun --standalone --nproc-per-node 2 examples/weights_torchrun.py infer --trainers 127.0.0.1:7070

Either may be started first, and the inference job may be stopped and started again while the other one trains. Each job is a
group of its own: its ranks meet over the store of their torchrun, by `aiotransfer.rendezvous`. All that the inference job has to
know of the other is the address of the first trainer rank, which listens where it is told to. Between hosts give both jobs one
AIOTRANSFER_KEY, `--listen` and `--trainers` the address of the first trainer's host, and torchrun its options for several hosts
(`--nnodes`, `--rdzv-backend c10d`, `--rdzv-endpoint`). `weights_fsdp.py` shows both sides as ranks of one job.

The last line of the inference job is `weights equal: yes`; `weights_words.py` has the model. Only the public API is used.
"""

from __future__ import annotations

import argparse
import asyncio
import os

import weights_words as model

import aiotransfer as at
from aiotransfer import rendezvous, weights

VERSIONS = 3
STEPS = 4  # of training before each version
DEADLINE = 60.0  # seconds, of everything that is waited for


async def train(listen: str) -> None:
    """A trainer rank: train, publish, and so on. Rank 0 listens where the inference ranks look for it."""
    where = listen if os.environ["RANK"] == "0" else rendezvous.listen_address()
    async with at.open_engine(listen=where, name="trainer", timeout=DEADLINE) as engine:
        group = await rendezvous.from_environment(engine)
        if len(group) != model.TRAINERS:
            raise SystemExit(f"this model is cut for {model.TRAINERS} trainer ranks: torchrun --nproc-per-node {model.TRAINERS}")
        learner = model.Learner(group.rank)
        layout = model.trainer_layout().bind(group.rank, learner.memory)
        async with weights.Publisher(engine, layout, group=group) as publisher:
            for number in range(1, VERSIONS + 1):
                loss = await asyncio.to_thread(learner.train, STEPS)
                async with publisher.publish(number):  # waits for an inference instance, all of whose ranks are there
                    pass
                if group.rank == 0:
                    print(f"version {number}: loss {loss:.3f}", flush=True)
            await group.barrier()  # no rank leaves while another one is still in its last publish


async def infer(trainers: str) -> None:
    """An inference rank: look at each version as it comes."""
    async with at.open_engine(listen=rendezvous.listen_address(), name="inference", timeout=DEADLINE) as engine:
        group = await rendezvous.from_environment(engine)
        if len(group) != model.SERVERS:
            raise SystemExit(f"this model is cut for {model.SERVERS} inference ranks: torchrun --nproc-per-node {model.SERVERS}")
        peer = await engine.connect(trainers)  # tries until the trainers are there
        seen: list[str] = []
        async with weights.Subscriber(engine, model.server_layout(), instance="chat", rank=group.rank) as subscriber:
            async with asyncio.timeout(DEADLINE):
                async for _ in subscriber:
                    async with subscriber.reading() as version:  # a forward step
                        if unequal := await asyncio.to_thread(model.unequal, subscriber.tensors, group.rank):
                            raise SystemExit(
                                f"rank {group.rank}, version {version}: the rows of {unequal} are not what they sent"
                            )
                    seen.append(str(version))
                    if version.number == VERSIONS:
                        break
        await group.barrier()  # an unequal rank has ended: no rank comes beyond this then
        if group.rank == 0:
            print(f"versions {', '.join(seen)} by {peer.path.provider}\nweights equal: yes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trainer ranks or inference ranks, started by torchrun.")
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("train").add_argument("--listen", required=True, metavar="HOST:PORT", help="of the first trainer rank")
    jobs.add_parser("infer").add_argument("--trainers", required=True, metavar="HOST:PORT", help="the same address")
    args = parser.parse_args()
    asyncio.run(train(args.listen) if args.job == "train" else infer(args.trainers))


if __name__ == "__main__":
    main()
