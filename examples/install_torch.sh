#!/usr/bin/env bash
# Installs the demo's libraries into the environment $1: a CPU build of torch, transformers, and a reader for GGUF weights.
set -euo pipefail
pip=("$1/bin/pip" --disable-pip-version-check)
echo "the demo needs torch (CPU build, about 200 MB), transformers and its helpers (about 60 MB);"
echo "the model itself (93 MB) is downloaded by the demo. Everything goes into $1 and ~/.cache/aiotransfer."
# The plain index may carry CUDA builds of many gigabytes: ask for a CPU build first, wherever it can be had.
"${pip[@]}" install --progress-bar on 'torch==2.13.0+cpu' 2>/dev/null \
    || "${pip[@]}" install --progress-bar on torch --index-url https://download.pytorch.org/whl/cpu \
    || "${pip[@]}" install --progress-bar on torch
"${pip[@]}" install --quiet --progress-bar on --editable '.[demo]'
