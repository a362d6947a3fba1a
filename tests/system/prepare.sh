#!/usr/bin/env bash
# Finds a Python of at least 3.11 with venv and headers, a C compiler, and the headers of libfabric and libibverbs; installs what is missing by apt when root.
set -euo pipefail

good() { # a Python that can make environments and compile extensions
    "$1" - 2>/dev/null <<'PY'
import os, sys, sysconfig
import ensurepip, venv
assert sys.version_info >= (3, 11)
assert os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
PY
}

find_python() {
    local name
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.14; do
        if command -v "$name" >/dev/null 2>&1 && good "$name"; then
            command -v "$name"
            return 0
        fi
    done
    return 1
}

compiler=${CC:-cc}
if ! find_python >/dev/null || ! command -v "${compiler%% *}" >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing a compiler and Python's headers by apt (about 200 MB)"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        apt-get install -y -qq --no-install-recommends gcc libc6-dev python3 python3-venv python3-dev >/dev/null
    else
        echo "missing: a C compiler, or Python >= 3.11 with venv and headers." >&2
        echo "As root: apt-get install gcc libc6-dev python3 python3-venv python3-dev" >&2
        exit 1
    fi
fi

# The network provider is compiled when libfabric's headers are there; without them everything else works, and says why this does not.
if [ ! -e /usr/include/rdma/fi_rma.h ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing libfabric and its headers by apt (about 5 MB)"
    export DEBIAN_FRONTEND=noninteractive
    (apt-get install -y -qq --no-install-recommends libfabric-dev || { apt-get update -qq &&
        apt-get install -y -qq --no-install-recommends libfabric-dev; }) >/dev/null 2>&1 || echo "not to be had: without tcp, then"
fi
if [ ! -e /usr/include/infiniband/verbs.h ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing libibverbs, its headers and its drivers by apt (about 4 MB)"
    export DEBIAN_FRONTEND=noninteractive
    (apt-get install -y -qq --no-install-recommends libibverbs-dev ibverbs-providers || { apt-get update -qq &&
        apt-get install -y -qq --no-install-recommends libibverbs-dev ibverbs-providers; }) >/dev/null 2>&1 || echo "not to be had: without verbs, then"
fi
python=$(find_python) || { echo "no Python >= 3.11 with venv and headers was found; set PYTHON=/path/to/python" >&2; exit 1; }
mkdir -p .make
echo "$python" > .make/python
