"""Coverage-guided fuzzing of every decoder (`decoders.py`), with atheris (libFuzzer for Python).

    python -m tests.reliability.fuzz --runs 1200000                      (`make fuzz`)
    python -m tests.reliability.fuzz --only "shm offer" --runs 100000    one decoder
    python -m tests.reliability.fuzz --only frame --input FILE           one input again

Each decoder is fuzzed in a process of its own from valid encodings, for its share of the runs, with bounded memory and time for
each input. An input that ends in anything but a value or the one documented error stops the run and is kept, with the way to
repeat it. A second part (`absurd.py`) sends valid messages with absurd values, a sixtieth as many.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.reliability import absurd
from tests.reliability.decoders import DECODERS, Decoder
from tests.reliability.reports import publish
from tests.reliability.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "reliability" / "fuzz.md"
FOUND = ROOT / "build" / "fuzz"  # inputs that failed
FUZZED = ("aiotransfer.control.frames", "aiotransfer.control.handshake", "aiotransfer.control.resume",
          "aiotransfer.model.descriptor", "aiotransfer.providers.port", "aiotransfer.providers.shm.messages",
          "aiotransfer.providers.shm.fd_passing", "aiotransfer.providers.loopback", "aiotransfer.providers.fabric.messages",
          "aiotransfer.kv.protocol.layout", "aiotransfer.kv.protocol.messages")  # fmt: skip
CHECKS = "tests.reliability.decoders"
MOST_SECONDS, MOST_MIB, MOST_BYTES = 0.5, 512, 20_000  # for one input: CPU time, memory of the process, length
EVERY = 10_000
BYTES_FOR_EACH_ABSURD = 60  # inputs of bytes for each message with absurd values, which takes as much longer


def fuzz(decoder: Decoder, runs: int, seed: int, folder: Path) -> None:
    """Fuzz one decoder in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports():  # the checks, too: what parsed is worth keeping, though a decoder in C shows no branch
        for name in [name for name in sys.modules if name.startswith((*FUZZED, CHECKS))]:
            del sys.modules[name]
        for name in FUZZED:
            importlib.import_module(name)
        fresh = importlib.import_module(CHECKS)
    check = next(d.check for d in fresh.DECODERS if d.name == decoder.name)
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, valid in enumerate(decoder.seeds()):
        (corpus / str(i)).write_bytes(valid)
    counts = {"inputs": 0, "parsed": 0, "slowest": 0.0, "MiB": 0}

    def one(data: bytes) -> None:
        begun = time.thread_time()
        parsed = check(data)
        taken = time.thread_time() - begun
        assert taken < MOST_SECONDS, f"{len(data)} bytes took {taken:.2f} s"
        counts["inputs"] += 1
        counts["parsed"] += parsed
        counts["slowest"] = max(counts["slowest"], taken)
        if counts["inputs"] % EVERY == 0 or counts["inputs"] >= runs:
            counts["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            (folder / "counts").write_text(json.dumps(counts))

    FOUND.mkdir(parents=True, exist_ok=True)
    limits = [f"-rss_limit_mb={MOST_MIB}", "-timeout=20", f"-max_len={MOST_BYTES}", f"-artifact_prefix={FOUND}/"]
    atheris.Setup([sys.argv[0], f"-runs={runs}", f"-seed={seed}", "-print_final_stats=1", *limits, str(corpus)], one)
    atheris.Fuzz()


def shares(runs: int, chosen: list[Decoder], seed: int) -> list[dict[str, object]]:
    """Every decoder for its share. Raises `SystemExit` when one of them failed."""
    rows = []
    for decoder in chosen:
        share = -(-runs // len(chosen))
        with tempfile.TemporaryDirectory() as name:
            command = [sys.executable, "-m", "tests.reliability.fuzz", "--child", name, "--only", decoder.name,
                       "--runs", str(share), "--seed", str(seed)]  # fmt: skip
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode != 0:
                print(done.stdout[-3000:], done.stderr[-6000:], sep="\n")
                raise SystemExit(f"{decoder.name}: a decoder failed; `--only {decoder.name!r} --input FILE` repeats it")
            counts = json.loads((Path(name) / "counts").read_text())
            covered = [line.split("cov: ")[1].split()[0] for line in done.stderr.splitlines() if "cov: " in line]
            facts = {"name": decoder.name, "what": decoder.what, "seeds": len(decoder.seeds()), "covered": int(covered[-1])}
            rows.append({**facts, **counts})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def report(rows: list[dict[str, object]], runs: int, seed: int, seconds: float) -> str:
    """A page of the documentation."""
    total = sum(int(str(row["inputs"])) for row in rows)
    lines = "\n".join(
        f"| {row['name']} | {row['what']} | {row['seeds']} | {row['inputs']:,} | {row['parsed']:,} | {row['covered']} "
        f"| {float(str(row['slowest'])) * 1e3:.1f} ms | {row['MiB']} MiB |"
        for row in rows
    )
    return f"""# Fuzzing report

Written by `make fuzz` (`python -m tests.reliability.fuzz --runs {runs} --seed {seed} --report`).

{total:,} inputs of at most {MOST_BYTES:,} bytes in {seconds:,.0f} s, guided by coverage from valid encodings: each parsed,
and then what it meant held together, or was refused with the one documented error, within {MOST_SECONDS} s of processor time and
{MOST_MIB} MiB.
An input that fails is kept in `build/fuzz/`; `python -m tests.reliability.fuzz --only NAME --input FILE` repeats it.

| decoder | bytes of | seeds | inputs | parsed | branches covered | slowest | memory |
|---|---|--:|--:|--:|--:|--:|--:|
{lines}
"""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.reliability.fuzz")
    parser.add_argument("--runs", type=int, default=120_000, help="inputs, over all decoders")
    parser.add_argument("--seed", type=int, help="default: random, printed")
    parser.add_argument("--only", help="one decoder")
    parser.add_argument("--input", type=Path, help="a file that failed")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name} into the documentation")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chosen = [d for d in DECODERS if arguments.only in (None, d.name)]
    if arguments.input is not None:
        print("parsed" if chosen[0].check(arguments.input.read_bytes()) else "refused")
        return 0
    seed = random.randrange(1, 1 << 31) if arguments.seed is None else arguments.seed
    if arguments.child is not None:
        fuzz(chosen[0], arguments.runs, seed, arguments.child)
        return 0
    print(f"{arguments.runs} inputs over {len(chosen)} decoders, seed {seed}", flush=True)
    begun = time.monotonic()
    text = report(shares(arguments.runs, chosen, seed), arguments.runs, seed, time.monotonic() - begun)
    if arguments.only is None:
        text += "\n" + absurd.report(arguments.runs // BYTES_FOR_EACH_ABSURD, seed, TARGETS)
    publish(REPORT, text, write=arguments.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
