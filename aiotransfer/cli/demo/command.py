"""`demo`: prompts are read by two prefill ranks and continued by a decode rank, the KV cache crossing layer
by layer.

The workers are `examples/kv_handoff.py`. This command prepares the model, starts them, and one again that was
killed (`--chaos`), shows the texts, and compares them with a single process: its last line is
`tokens equal: yes`, or `tokens equal: no` with exit status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from aiotransfer.cli.demo.model import prepare
from aiotransfer.errors import TransferError

PROMPTS = (
    "A long time ago, on the edge of a quiet forest, there stood a small library. Its keeper, an old woman named Ada, knew "
    "every book by heart, and she lent them to anyone who promised to bring back a story of their own. One winter evening a "
    "young girl knocked at the door, her hands red from the cold, and asked whether there was a book about the sea. Ada smiled "
    "and said that",
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is",
    "To make a simple soup, first cut an onion and two carrots into small pieces. Then",
)
MOST_PROMPT = 900  # tokens


class WorkerFailed(Exception):
    """A worker process ended without its result."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--prompt", action="append", help="a text to continue; may be given several times (default: three texts)")
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2", help="tiny: random weights, no download")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate (default 48)")
    parser.add_argument("--chaos", action="store_true", help="kill a prefill rank in the middle of the last prompt")
    parser.add_argument("--checksums", action="store_true", help="compare a checksum of every page")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--flip-byte", action="store_true", help=argparse.SUPPRESS)


def example_path() -> Path:
    """Where the workers are: installed with the package, or in the checkout."""
    package = Path(__file__).parents[2]
    for path in (package / "_examples" / "kv_handoff.py", package.parent / "examples" / "kv_handoff.py"):
        if path.exists():
            return path
    raise FileNotFoundError("kv_handoff.py was not installed with the package")


class Worker:
    """One OS process that prints JSON lines."""

    def __init__(self, role: str, job: dict[str, Any]) -> None:
        self.role = role
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(example_path()), role, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
        )

    def next(self) -> dict[str, Any]:
        """The next line. Raises `WorkerFailed` with what it said on stderr."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            raise WorkerFailed(f"the {self.role} worker ended with status {status}:\n{self.errors.read().decode()[-4000:]}")
        fields: dict[str, Any] = json.loads(line)
        return fields

    def tell(self, text: str) -> None:
        """Write one line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def rest(self) -> list[dict[str, Any]]:
        """Read all lines that it still prints, to its end."""
        assert self.process.stdout is not None
        return [json.loads(line) for line in self.process.stdout]

    def end(self) -> None:
        """Close its standard input: the process ends when it sees that."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def dead(self, seconds: float) -> bool:
        """Whether it has ended, or does so soon."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def result(self) -> Any:
        """Read its lines until one has a result, and return that."""
        while "result" not in (fields := self.next()):
            pass
        return fields["result"]

    def close(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                stream.close()


class Text:
    """Tokens to text and back; the tiny model has numbers for words."""

    def __init__(self, model: str, directory: str) -> None:
        self._tokenizer: Any = None
        if model != "tiny":
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(directory)

    def encode(self, prompt: str) -> list[int]:
        """The prompt as the numbers of its tokens."""
        if self._tokenizer is None:
            return [2 + (ord(c) * 37 + i * 11) % 998 for i, c in enumerate(prompt)][:MOST_PROMPT]
        return [int(t) for t in self._tokenizer(prompt)["input_ids"]]

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens."""
        if self._tokenizer is None:
            return " ".join(map(str, tokens))
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when the tokens are equal."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"the demo needs {' and '.join(missing)}: run `make demo`, or pip install 'aiotransfer[demo]' (CPU builds do)",
            file=sys.stderr,
        )
        return 2
    if not 1 <= args.tokens <= 100:
        print(f"--tokens must lie in 1 to 100, not {args.tokens}", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    say = (lambda *_, **__: None) if args.json else print
    directory = ""
    try:
        if args.model == "smollm2":
            directory = str(prepare(lambda text: print(text, file=sys.stderr)))
        text = Text(args.model, directory)
        args.prompt = args.prompt or list(PROMPTS)
        prompts = [text.encode(prompt) for prompt in args.prompt]
        for prompt in prompts:
            if not 1 <= len(prompt) <= MOST_PROMPT:
                print(f"a prompt must have 1 to {MOST_PROMPT} tokens, not {len(prompt)}", file=sys.stderr)
                return 2
        return _run(args, directory, text, prompts, say)
    except (WorkerFailed, TransferError) as error:
        print(error, file=sys.stderr)
        return 1


class Ranks:
    """The prefill ranks: started, and started again when one is killed."""

    def __init__(self, job: dict[str, Any], decoder: Worker, die: str) -> None:
        self._job, self._decoder = job, decoder
        jobs = [job | {"rank": 0}, job | {"rank": 1, "die": die}]
        self.workers = [Worker("prefill", one) for one in jobs]
        for rank in range(2):
            self._introduce(rank)

    def _introduce(self, rank: int) -> None:
        while "address" not in (fields := self.workers[rank].next()):
            pass
        self._decoder.tell(json.dumps({"rank": rank, "address": fields["address"]}))

    def replace_dead(self) -> list[int]:
        """Start a new one for each that has ended; which ranks those are."""
        dead = [rank for rank, worker in enumerate(self.workers) if worker.dead(0.5)]
        for rank in dead:
            self.workers[rank].close()
            self.workers[rank] = Worker("prefill", self._job | {"rank": rank})
            self._introduce(rank)
        return dead

    def figures(self) -> list[dict[str, Any]]:
        """What they say of the requests that they have finished, when they have ended."""
        found = []
        for worker in self.workers:
            worker.end()
            found += [fields["figures"] for fields in worker.rest() if "figures" in fields]
        return found

    def close(self) -> None:
        """Kill them if they still run."""
        for worker in self.workers:
            worker.close()


def _run(args: argparse.Namespace, directory: str, text: Text, prompts: list[list[int]], say: Any) -> int:
    job: dict[str, Any] = {"model": args.model, "directory": directory, "tokens": args.tokens, "prompts": prompts}
    job |= {"flip_byte": args.flip_byte, "checksums": args.checksums}
    die = f"prompt {len(prompts) - 1}, attempt 1" if args.chaos else ""
    closing: list[Any] = []
    try:
        closing.append(decoder := Worker("decode", job))
        closing.append(ranks := Ranks(job, decoder, die))
        pids = " and ".join(str(worker.process.pid) for worker in ranks.workers)
        say(f"{len(prompts)} prompts; prefill by processes {pids} (half of the heads each), decode by {decoder.process.pid}")
        while "result" not in (fields := decoder.next()):
            if "lost" in fields:
                dead = ranks.replace_dead()
                say(f"prompt {fields['lost']}: prefill rank {dead} was killed in the middle of it; asking its successor")
        answers = fields["result"]["answers"]
        figures = _figures(prompts, answers, ranks.figures())
        closing.append(reference := Worker("alone", job))
        expected = reference.result()
    finally:
        for worker in reversed(closing):
            worker.close()
    equal = [answer["tokens"] for answer in answers] == expected
    result = {"model": args.model, "prompts": figures, "tokens_equal": equal, "chaos": args.chaos}
    if args.json:
        print(json.dumps(result | {"tokens": [answer["tokens"] for answer in answers]}))
    else:
        for answer, prompt in zip(answers, args.prompt, strict=True):
            say(f"\n> {prompt}\n{text.decode(answer['tokens'])}")
        _show(figures)
        print(f"tokens equal: {'yes' if equal else 'no'}")
    return 0 if equal else 1


def _figures(prompts: list[list[int]], answers: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per prompt. The share that is hidden: of the time that writes took, what was over when the
    model was."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        mine = [figures for figures in ranks if figures["id"] == answer["id"]]
        writes = [write for figures in mine for write in figures["writes"]]
        computed = max((figures["computed"] for figures in mine), default=answer["landed"])
        seconds = [landed - posted for _, _, posted, landed in writes]
        after = max(0.0, answer["landed"] - computed)
        found.append(
            {
                "prompt_tokens": len(prompt),
                "provider": answer["provider"],
                "attempts": answer["attempts"],
                "writes": len(writes),
                "bytes": sum(write[0] for write in writes),
                "prefill_seconds": computed - min((figures["started"] for figures in mine), default=computed),
                "first_token_seconds": answer["first"] - answer["asked"],
                "added_seconds": after,
                "write_seconds": seconds,
                "hidden_share": max(0.0, min(1.0, 1 - after / sum(seconds))) if sum(seconds) else 0.0,
            }
        )
    return found


def _show(figures: list[dict[str, Any]]) -> None:
    print("\n prompt  tokens      bytes  writes  prefill  first token  added   hidden  attempts")
    for number, one in enumerate(figures):
        print(
            f"{number:7} {one['prompt_tokens']:7} {one['bytes']:10,} {one['writes']:7} {1e3 * one['prefill_seconds']:5.0f} ms"
            f" {1e3 * one['first_token_seconds']:9.0f} ms {1e3 * one['added_seconds']:4.1f} ms {100 * one['hidden_share']:6.1f} %"
            f" {one['attempts']:9}"
        )
