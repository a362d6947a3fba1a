"""A layer of a synchronous model, on two ranks; here they are threads, else processes."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

import aiotransfer as at
from aiotransfer import moe


class Experts:
    """What the model calls: returns when the results are back."""

    def __init__(self, thread: at.EngineThread, a2a: moe.AllToAll) -> None:
        self.thread, self.a2a = thread, a2a

    def forward(self, x: np.ndarray, topk_idx: np.ndarray, topk_weights: np.ndarray) -> np.ndarray:
        d = self.thread.run(self.a2a.dispatch(x, topk_idx, topk_weights))
        y = d.x * 2  # the experts of this rank, in the model's thread
        return self.thread.run(self.a2a.combine(y, d.handle))


async def meet(engine: at.Engine, addresses: list[str]) -> moe.AllToAll:
    sizes = {"num_experts": 2, "hidden": 8, "dtype": "float32", "max_tokens": 16, "topk": 1}
    return await moe.AllToAll(engine, engine.group(addresses), **sizes)  # made on the loop that it belongs to


def rank(number: int) -> float:
    with at.run_in_thread() as thread:  # an engine on a loop in a thread of its own
        addresses[number] = str(thread.engine.address)
        all_known.wait()
        layer = Experts(thread, thread.run(meet(thread.engine, addresses)))
        out = layer.forward(np.ones((4, 8), np.float32), np.array([[0], [1], [0], [1]]), np.ones((4, 1), np.float32))
        thread.run(layer.a2a.aclose())
        return float(out.sum())


addresses, all_known = ["", ""], Barrier(2)
with ThreadPoolExecutor(2) as ranks:
    print(list(ranks.map(rank, range(2))))
