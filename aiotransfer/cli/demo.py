"""`demo`: prefill in one process, decode in another, the KV cache crossing page by page and layer by layer.

The workers are `examples/kv_handoff.py`. This command prepares the model, starts them, shows the text as it comes, and compares
it with a single process: its last line is `tokens equal: yes`, or `tokens equal: no` with exit status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from aiotransfer.cli import _demo_model
from aiotransfer.errors import TransferError

PROMPT = (
    "A long time ago, on the edge of a quiet forest, there stood a small library. Its keeper, an old woman named Ada, knew every "
    "book by heart, and she lent them to anyone who promised to bring back a story of their own. One winter evening a young girl "
    "knocked at the door, her hands red from the cold, and asked whether there was a book about the sea. Ada smiled and said that"
)
MOST_PROMPT = 900  # tokens
WORKER_SECONDS = 300.0


class WorkerFailed(Exception):
    """A worker process ended without its result."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--prompt", default=PROMPT, help="the text to continue")
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2", help="tiny: random weights, no download")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate (default 48)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--flip-byte", action="store_true", help=argparse.SUPPRESS)


def example_path() -> Path:
    """Where the workers are: installed with the package, or in the checkout."""
    package = Path(__file__).parent.parent
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
        """One line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def result(self) -> Any:
        """Skip to its result."""
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
        self._shown = ""
        self._tokens: list[int] = []
        if model != "tiny":
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(directory)

    def encode(self, prompt: str) -> list[int]:
        """The prompt's tokens."""
        if self._tokenizer is None:
            return [2 + (ord(c) * 37 + i * 11) % 998 for i, c in enumerate(prompt)][:MOST_PROMPT]
        return [int(t) for t in self._tokenizer(prompt)["input_ids"]]

    def more(self, token: int) -> str:
        """What one more token adds to the text."""
        self._tokens.append(token)
        if self._tokenizer is None:
            return f" {token}"
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if whole.endswith("\ufffd"):  # half of a character
            return ""
        added, self._shown = whole[len(self._shown) :], whole
        return str(added)


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
            directory = str(_demo_model.prepare(lambda text: print(text, file=sys.stderr)))
        text = Text(args.model, directory)
        prompt = text.encode(args.prompt)
        if not 1 <= len(prompt) <= MOST_PROMPT:
            print(f"the prompt must have 1 to {MOST_PROMPT} tokens, not {len(prompt)}", file=sys.stderr)
            return 2
        return _run(args, directory, text, prompt, say)
    except (WorkerFailed, TransferError) as error:
        print(error, file=sys.stderr)
        return 1


def _run(args: argparse.Namespace, directory: str, text: Text, prompt: list[int], say: Any) -> int:
    job: dict[str, Any] = {"model": args.model, "directory": directory, "tokens": args.tokens}
    workers: list[Worker] = []
    deadline = time.monotonic() + WORKER_SECONDS
    try:
        decoder = Worker("decode", job)
        prefiller = Worker("prefill", job | {"prompt": prompt, "flip_byte": args.flip_byte})
        workers += [decoder, prefiller]
        while "address" not in (fields := decoder.next()):
            pass
        prefiller.next()
        say(f"prompt ({len(prompt)} tokens): {args.prompt}\n\ncontinued by process {decoder.process.pid}, which never saw it:")
        prefiller.tell(fields["address"])
        first: float | None = None
        tokens: list[int] = []
        while len(tokens) < args.tokens:
            fields = decoder.next()
            first = fields.get("time", first)
            tokens.append(fields["token"])
            say(text.more(tokens[-1]), end="", flush=True)
            if time.monotonic() > deadline:
                raise WorkerFailed("the decode worker is too slow")
        say("\n")
        figures = prefiller.result()
        for worker in (decoder, prefiller):
            worker.process.wait(30)
        reference = Worker("alone", job | {"prompt": prompt})
        workers.append(reference)
        expected = reference.result()
    finally:
        for worker in workers:
            worker.close()
    equal = tokens == expected
    figures["first_token_seconds"] = (first or 0.0) - figures.pop("prefill_started")
    figures |= {"model": args.model, "tokens": tokens, "tokens_equal": equal}
    if args.json:
        print(json.dumps(figures))
    else:
        _show(figures)
        print(f"tokens equal: {'yes' if equal else 'no'}")
    return 0 if equal else 1


def _show(figures: dict[str, Any]) -> None:
    layers = [1e6 * s for s in figures["layer_transfer_seconds"]]
    print(f"prompt tokens           {figures['prompt_tokens']}")
    print(f"pages                   {figures['pages']} by {figures['provider']}")
    print(f"bytes                   {figures['bytes']:,}")
    print(f"prefill                 {1e3 * figures['prefill_seconds']:.1f} ms")
    print(f"first token after       {1e3 * figures['first_token_seconds']:.1f} ms")
    print("layer transfers (us)    " + " ".join(f"{us:.0f}" for us in layers))
    print(f"hidden behind compute   {100 * figures['hidden_share']:.1f} %")
