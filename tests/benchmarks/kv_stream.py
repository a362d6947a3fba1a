"""What streaming a KV cache adds to the first token: a language model's own layers, one process that prefills, one that decodes.

    make bench-kv-stream                     (python tests/benchmarks/kv_stream.py [--model tiny] [--report])

For each prompt length, several times in one run, in turns: the forward pass alone in the prefill process, and the same with its
layers streamed. *Hidden* is the share of the writes' own time that was over when the model was. *Added* is all that is not the
model: the reservation, what comes after the last layer, and what the writes cost the model while it computes, against the
forward pass alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
LENGTHS = (64, 128, 256, 512, 768)
ROUNDS = 5


async def prefill(model: Any, job: dict[str, Any]) -> None:
    """Forward pass alone, then the same for a request, and so on."""
    import torch

    import aiotransfer as at
    from aiotransfer import kv
    from examples import kv_handoff as example

    async with at.open_engine(name="prefill", timeout=300) as engine:
        layout = example.layout_of(model.config, model.dtype)
        region = example.allocate(engine, layout, model.dtype)
        async with kv.Prefiller(engine, layout, region) as prefiller:
            print(json.dumps({"address": str(engine.address)}), flush=True)

            def forward(prompt: list[int], cache: Any) -> tuple[int, float, float]:
                began = time.time()
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
                return int(logits[0, -1].argmax()), began, time.time()

            said: list[str] = []
            for _ in range(len(LENGTHS) * (ROUNDS + 1)):
                async with await prefiller.accept() as request:
                    prompt = json.loads(request.data)
                    pages = list(range(layout.pages_of(len(prompt))))
                    table, pool = torch.tensor(pages), region.torch()
                    request.use(pages)

                    def write(layer: int, keys: Any, values: Any, to: Any = (pool, table)) -> None:
                        example.PagedLayer(to[0][layer], to[1]).put(keys, values)

                    def ready(layer: int, keys: Any, values: Any, write: Any = write, to: Any = request) -> None:
                        write(layer, keys, values)
                        to.layer_ready(layer)

                    paged = example.StreamingCache(model.config, write)  # what an engine without hand-off does as well
                    _, plain, plain_end = await asyncio.to_thread(forward, prompt, paged)
                    streaming = example.StreamingCache(model.config, ready)
                    token, began, ended = await asyncio.to_thread(forward, prompt, streaming)
                    await request.finish(token.to_bytes(4, "little"))
                record = prefiller.records[-1]
                figures = {
                    "plain": plain_end - plain, "began": began, "ended": ended, "waited": began - record.queued,
                    "writes": [(w.layer, w.nbytes, w.ready, w.posted, w.landed) for w in request.timeline],
                }  # fmt: skip
                said.append(json.dumps(figures))
            print("\n".join(said), flush=True)  # at the end: nobody reads before the other process has ended


async def decode(model: Any, address: str) -> None:
    """Ask for one prompt after the other."""
    import aiotransfer as at
    from aiotransfer import kv
    from examples import kv_handoff as example

    async with at.open_engine(name="decode", timeout=300) as engine:
        layout = example.layout_of(model.config, model.dtype)
        region = example.allocate(engine, layout, model.dtype)
        peer = await engine.connect(address)
        async with kv.Decoder(engine, layout, region) as decoder:
            for turn in range(ROUNDS + 1):
                for length in LENGTHS:
                    prompt = [(7 + 13 * k) % 900 for k in range(length)]
                    pages = list(range(layout.pages_of(length)))
                    name = f"{turn} {length}"
                    data = json.dumps(prompt).encode()
                    async with decoder.request(peer, name, pages, tokens=length, data=data) as handle:
                        await handle.arrived()
                        landed = time.time()
                    record = decoder.records[-1]
                    print(json.dumps({"landed": landed, "queued": record.queued, "reserved": record.reserved}), flush=True)


def measure(model: str) -> list[dict[str, Any]]:
    """One row per prompt length: medians of all rounds but the first."""
    from aiotransfer.cli.demo.model import prepare

    directory = str(prepare(lambda text: print(text, file=sys.stderr))) if model == "smollm2" else ""
    job = json.dumps({"model": model, "directory": directory})
    here = [sys.executable, __file__, "--worker"]
    with subprocess.Popen([*here, "prefill", job], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        address = json.loads(one.stdout.readline())["address"]
        with subprocess.Popen([*here, "decode", job, address], stdout=subprocess.PIPE, text=True) as two:
            there = [json.loads(line) for line in two.stdout or ()]
        figures = [json.loads(line) for line in one.stdout]
    rows = []
    for index, length in enumerate(LENGTHS):
        runs = list(zip(figures, there, strict=True))[len(LENGTHS) + index :: len(LENGTHS)]
        rows.append({"tokens": length} | {name: statistics.median(one(*run) for run in runs) for name, one in FIGURES.items()})
    return rows


def _hidden(here: dict[str, Any], there: dict[str, Any]) -> float:
    spent = sum(landed - posted for *_, posted, landed in here["writes"])
    after = sum(max(0.0, landed - max(posted, here["ended"])) for *_, posted, landed in here["writes"])
    return 1 - after / spent


FIGURES: dict[str, Any] = {
    "compute": lambda here, there: here["plain"],
    "layer": lambda here, there: here["plain"] / len(here["writes"]),
    "transfer": lambda here, there: statistics.median(landed - posted for *_, posted, landed in here["writes"]),
    "bytes": lambda here, there: sum(write[1] for write in here["writes"]),
    "hidden": _hidden,
    "after": lambda here, there: there["landed"] - here["ended"],
    "reserve": lambda here, there: there["reserved"] - there["queued"],
    "added": lambda here, there: (
        there["reserved"] - there["queued"] + there["landed"] - here["began"] - here["plain"]
    ),
}


def table(rows: list[dict[str, Any]]) -> str:
    """As the documentation has it."""
    lines = [
        "| prompt | cache | model alone | compute a layer | transfer a layer | hidden | after the model | added in all |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['tokens']} | {row['bytes'] / 2**20:.1f} MiB | {1e3 * row['compute']:.0f} ms | {1e3 * row['layer']:.2f} ms "
            f"| {1e3 * row['transfer']:.2f} ms | {100 * row['hidden']:.1f} % | {1e3 * row['after']:.1f} ms "
            f"| {1e3 * row['added']:.1f} ms ({100 * row['added'] / row['compute']:.1f} %) |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Compute and transfer of a layer, and what is added, by prompt length."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "aiotransfer"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    tokens = [row["tokens"] for row in rows]
    left.plot(tokens, [1e3 * row["layer"] for row in rows], "o-", label="compute")
    left.plot(tokens, [1e3 * row["transfer"] for row in rows], "o-", label="transfer")
    left.set(xlabel="prompt tokens", ylabel="ms for each layer", yscale="log")
    left.legend()
    right.bar([str(n) for n in tokens], [1e3 * row["compute"] for row in rows], label="model")
    right.bar([str(n) for n in tokens], [1e3 * max(0, row["added"]) for row in rows],
              bottom=[1e3 * row["compute"] for row in rows], label="added")  # fmt: skip
    right.set(xlabel="prompt tokens", ylabel="ms to the first token")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--report", action="store_true", help="write the plot of the documentation")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        from examples import kv_handoff as example

        role, job, *address = options.worker
        model = example.load_model(*json.loads(job).values())
        asyncio.run(prefill(model, json.loads(job)) if role == "prefill" else decode(model, *address))
        return
    rows = measure(options.model)
    print(table(rows))
    if options.report:
        plot(rows, ROOT / "docs" / "design" / "kv-stream.svg")


if __name__ == "__main__":
    main()
