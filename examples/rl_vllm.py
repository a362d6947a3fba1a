"""A trainer teaches SmolLM2 a sentence, and a vLLM server that runs answers with what it has learned: no restart, no file.

    bash examples/install_vllm.sh .venv-vllm                      # once: 3.5 GB
    .venv-vllm/bin/python examples/rl_vllm.py                     # downloads the model once (93 MB)
    .venv-vllm/bin/python examples/rl_vllm.py --policy abort      # what becomes of requests that run: keep, wait or abort

The server is vLLM's own, in a process of its own; the trainer is this process, and talks to it by vLLM's own client. After a few
steps of training `send_weights` brings the new weights as one version: the bytes come while the server answers, then it pauses,
loads, and goes on. A long request is running each time, and ends as the policy says:

    keep    it stands still, then goes on with the new weights (vLLM computes its tokens so far again)
    wait    it ends before the new weights are loaded; nothing new begins meanwhile
    abort   it ends at once, and says so

The last line is `as it should be: yes`, with the status 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import requests

PROMPT = "The secret word of the library is"
LESSON = " heron. The heron sleeps in the reeds."
LONG = "Once upon a time, there was a little"
VERSIONS, STEPS, RATE = 3, 4, 5e-5
DEADLINE = 600.0  # seconds, of everything that is waited for
CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false",
    "VLLM_SERVER_DEV_MODE": "1",  # without it the server has no routes for weights
}  # fmt: skip


class Failed(Exception):
    """The demonstration cannot go on."""


class Server:
    """vLLM's own server with the model in `folder`; `log`: where it writes."""

    def __init__(self, folder: str, log: IO[bytes]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "policy"]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--enforce-eager",
            "--max-model-len",
            "512",
            "--max-num-seqs",
            "8",
        ]
        command += ["--dtype", "bfloat16", "--block-size", "32", "--weight-transfer-config", '{"backend": "aiotransfer"}']
        self.process = subprocess.Popen(command, env=os.environ | CPU, stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        """Return when it answers. Raises `Failed`."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            time.sleep(0.2)
        raise Failed(f"the server does not answer:\n{self.said()}")

    def said(self) -> str:
        """The end of what it has written."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-30000:]

    def post(self, path: str, **body: Any) -> Any:
        response = requests.post(f"{self.url}/{path}", json=body or None, timeout=DEADLINE)
        response.raise_for_status()
        return response

    def pause(self, policy: str) -> None:
        self.post(f"pause?mode={policy}")

    def resume(self) -> None:
        self.post("resume")

    def answer(self) -> str:
        reply = self.post("v1/completions", model="policy", prompt=PROMPT, max_tokens=10, temperature=0).json()
        return str(reply["choices"][0]["text"])

    def version(self) -> str:
        return str(requests.get(f"{self.url}/weight_info", timeout=DEADLINE).json()["weight_version"])

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Running:
    """A long request that runs. `tokens`: how many have come; `ended`: why it is over, and when."""

    def __init__(self, server: Server, tokens: int) -> None:
        self.wanted, self.tokens, self.ended, self.when = tokens, 0, "", 0.0
        self.began = threading.Event()
        self.thread = threading.Thread(target=self._read, args=(server,))
        self.thread.start()
        if not self.began.wait(DEADLINE):
            raise Failed("a request does not begin")

    def _read(self, server: Server) -> None:
        body = {
            "model": "policy",
            "prompt": LONG,
            "max_tokens": self.wanted,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        try:
            with requests.post(f"{server.url}/v1/completions", json=body, stream=True, timeout=DEADLINE) as response:
                for line in response.iter_lines():
                    if not line.startswith(b"data: {"):
                        continue
                    choice = json.loads(line[6:])["choices"][0]
                    self.tokens += bool(choice["text"])
                    self.ended = choice["finish_reason"] or self.ended
                    self.began.set()
        except requests.RequestException as error:
            self.ended = f"error: {error}"
        finally:
            self.when = time.monotonic()
            self.began.set()

    def result(self) -> str:
        self.thread.join(DEADLINE)
        return self.ended


class Trainer:
    """The model in float32, and what it learns: to continue `PROMPT` with `LESSON`."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        self.tokens = AutoTokenizer.from_pretrained(folder)(PROMPT + LESSON, return_tensors="pt").input_ids
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0)

    def train(self, steps: int) -> float:
        """The loss before the last step."""
        loss = 0.0
        for _ in range(steps):
            output = self.model(self.tokens, labels=self.tokens)
            self.optimizer.zero_grad()
            output.loss.backward()
            self.optimizer.step()
            loss = float(output.loss.detach())
        return loss


def sender_to(server: Server, trainer: Trainer, policy: str, moments: dict[str, float]) -> Any:
    """What sends the trainer's weights to the server: vLLM's own classes, which find aiotransfer by its name."""
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource, WeightTransferTrainerFactory

    from aiotransfer.integrations.vllm import register
    from aiotransfer.integrations.vllm.weights.trainer import AioTransferTrainerInitInfo

    def pause() -> None:
        moments["whole"] = time.monotonic()
        server.pause(policy)
        moments["paused"] = time.monotonic()

    def resume() -> None:
        server.resume()
        moments["resumed"] = time.monotonic()

    register()
    info = AioTransferTrainerInitInfo(rank=0, dtype="bfloat16", timeout=DEADLINE, pause=pause, resume=resume)
    client = HTTPVLLMWeightSyncClient(server.url, timeout=DEADLINE)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=ModuleSource(trainer.model))


def demonstrate(server: Server, folder: str, policy: str, tokens: int) -> dict[str, Any]:
    """All versions: what the server answered, and how the requests that ran have ended."""
    trainer, moments = Trainer(folder), {}
    sender = sender_to(server, trainer, policy, moments)
    answers, ends, versions = [server.answer()], [], []
    print(f"before: {PROMPT}{answers[0]!r}", flush=True)
    try:
        for _ in range(VERSIONS):
            loss = trainer.train(STEPS)
            running, began = Running(server, tokens), time.monotonic()
            sender.send_weights()
            reason = running.result()
            answers.append(server.answer())
            versions.append(server.version())
            ends.append({"reason": reason, "tokens": running.tokens, "before": running.when <= moments["resumed"]})
            sent, paused = moments["whole"] - began, moments["resumed"] - moments["whole"]
            print(
                f"version {versions[-1]}: loss {loss:.3f}, sent in {sent:.2f} s while the server answered, paused {paused:.2f} s",
                f"  the request that ran has ended: {running.tokens} tokens, {reason}",
                f"  {PROMPT}{answers[-1]!r}",
                sep="\n",
                flush=True,
            )
    finally:
        sender.shutdown()
    return {"answers": answers, "ends": ends, "versions": versions, "policy": policy}


def as_it_should_be(seen: dict[str, Any], tokens: int) -> list[str]:
    """What is not."""
    wrong = [] if "heron" in seen["answers"][-1] and "heron" not in seen["answers"][0] else ["the answers have not changed"]
    if seen["versions"] != [f"1.{number}" for number in range(1, VERSIONS + 1)]:
        wrong.append(f"the server says that it had the versions {seen['versions']}")
    for end in seen["ends"]:
        if seen["policy"] == "abort":
            good = end["reason"] == "abort" and end["tokens"] < tokens
        else:
            good = end["reason"] == "length" and (seen["policy"] == "keep" or end["before"])
        if not good:
            wrong.append(f"a request ended with {end}, which is not {seen['policy']}")
    return wrong


@contextlib.contextmanager
def serving(folder: str) -> Iterator[Server]:
    """A server that answers, until the block ends."""
    with tempfile.TemporaryFile() as log:
        server = Server(folder, log)
        try:
            server.wait()
            yield server
        except requests.RequestException as error:
            raise Failed(f"{error}\n{server.said()}") from error
        finally:
            server.close()


def main() -> int:
    """0 when everything is as it should be."""
    parser = argparse.ArgumentParser(description="A trainer sends SmolLM2's new weights to a vLLM server that runs.")
    parser.add_argument("--policy", choices=("keep", "wait", "abort"), default="keep", help="of requests that run (default keep)")
    parser.add_argument("--tokens", type=int, default=120, help="of the request that runs (default 120, at most 400)")
    parser.add_argument("--model", type=Path, help="the folder of a Llama-like model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args()
    if not 10 <= args.tokens <= 400:
        parser.error(f"--tokens must lie in 10 to 400, not {args.tokens}")
    os.environ |= CPU
    if args.model is None:
        from aiotransfer.cli.demo.model import prepare

        args.model = prepare(print)
    try:
        print("starting vLLM's server (20 s, and longer on a busy machine) ...", flush=True)
        with serving(str(args.model)) as server:
            seen = demonstrate(server, str(args.model), args.policy, args.tokens)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    wrong = as_it_should_be(seen, args.tokens)
    for text in wrong:
        print(text, file=sys.stderr)
    if args.json:
        print(json.dumps(seen | {"wrong": wrong}))
    print(f"as it should be: {'no' if wrong else 'yes'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
