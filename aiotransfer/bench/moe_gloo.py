"""The exchange of `bench --cases moe` as a layer would do it over `torch.distributed`: `all_to_all_single` by
gloo.

Rows are gathered in the order of their experts, exchanged, and put in the order of this rank's experts;
results go the same way back and are summed in fp32. `bare` is the exchange alone. Memory is given and
touched, counts are exchanged in every step.
"""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta
from typing import Any

import numpy as np

SUMMED_AT_ONCE = 64  # tokens: what is summed stays in the cache


def available() -> bool:
    """Whether torch is installed, with gloo in it."""
    return importlib.util.find_spec("torch") is not None


class Gloo:
    """One rank's side. `one` and `two` are memory for as many rows as are sent or come."""

    def __init__(self, setup: Any, rows: Any, idx: Any, weights: Any, one: Any, two: Any) -> None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self.torch, self.dist = torch, dist
        dist.init_process_group(
            "gloo", init_method=f"file://{setup.store}", rank=setup.rank, world_size=setup.ranks, timeout=timedelta(seconds=300)
        )
        self.ranks = setup.ranks
        self.x, self.idx, self.weights = torch.from_numpy(rows), torch.from_numpy(idx), torch.from_numpy(weights)
        self.one, self.two = torch.from_numpy(one), torch.from_numpy(two)
        self.hidden = 7168
        self.out = torch.empty((len(rows), self.hidden), dtype=torch.bfloat16)
        self.send: list[int] = []
        self.receive: list[int] = []

    def _rows(self, memory: Any, n: int, nbytes: int) -> Any:
        return memory[: n * nbytes].view(n, nbytes)

    def bare(self, nbytes: int) -> None:
        """The exchange alone, with rows of so many bytes: as many as those of a dispatch."""
        source, target = self._rows(self.one, sum(self.send), nbytes), self._rows(self.two, sum(self.receive), nbytes)
        self.dist.all_to_all_single(target, source, self.receive, self.send)

    def dispatch(self) -> Any:
        """Returns the rows for the experts of this rank, as NumPy."""
        torch = self.torch
        flat = self.idx.reshape(-1)
        experts = 256
        local = experts // self.ranks
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=experts)
        theirs = torch.empty_like(counts)
        self.dist.all_to_all_single(theirs, counts)
        self.send = counts.view(self.ranks, local).sum(1).tolist()
        self.receive = theirs.view(self.ranks, local).sum(1).tolist()
        nbytes = self.x.shape[1]
        packed, came = self._rows(self.one, sum(self.send), nbytes), self._rows(self.two, sum(self.receive), nbytes)
        torch.index_select(self.x, 0, order // self.idx.shape[1], out=packed)
        self.dist.all_to_all_single(came, packed, self.receive, self.send)
        of = torch.repeat_interleave(torch.arange(experts) % local, theirs)
        self.by_expert = torch.argsort(of, stable=True)
        self.places = torch.empty_like(order)
        self.places[order] = torch.arange(len(order))
        rows = self._rows(self.one, sum(self.receive), nbytes)
        torch.index_select(came, 0, self.by_expert, out=rows)
        return rows.numpy()

    @property
    def results(self) -> Any:
        """Some memory as the results of the last dispatch."""
        return self._rows(self.two, sum(self.receive), 2 * self.hidden).view(self.torch.bfloat16).view(self.torch.int16).numpy()

    def combine(self, results: Any) -> Any:
        """Send `results` back over gloo and sum them; the sums as NumPy."""
        torch, bf16 = self.torch, self.torch.bfloat16
        y = torch.from_numpy(results.view(np.int16)).view(bf16)
        back = self._rows(self.one, sum(self.receive), 2 * self.hidden).view(bf16)
        came = self._rows(self.two, sum(self.send), 2 * self.hidden).view(bf16)
        order = torch.empty_like(self.by_expert)
        order[self.by_expert] = torch.arange(len(order))
        torch.index_select(y, 0, order, out=back)
        self.dist.all_to_all_single(came.view(torch.uint8), back.view(torch.uint8), self.send, self.receive)
        places = self.places.view(self.idx.shape)
        for begin in range(0, len(places), SUMMED_AT_ONCE):
            part = slice(begin, begin + SUMMED_AT_ONCE)
            total = torch.zeros((len(places[part]), self.hidden))
            for k in range(places.shape[1]):
                total += came[places[part, k]].float() * self.weights[part, k : k + 1]
            self.out[part] = total
        return self.out.view(torch.int16).numpy().view(np.uint16)

    def close(self) -> None:
        """Leave gloo's group, as every rank has to."""
        self.dist.destroy_process_group()
