#!/usr/bin/env bash
# Installs each rival into $1/NAME with the Python $2. Says how much is downloaded; goes on when one cannot be had.
set -uo pipefail
echo "installing the rivals into $1: NIXL (60 MB), UCXX (60 MB), Mooncake (40 MB), Monarch (200 MB), a CPU build of torch (200 MB)"
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then # what Mooncake is linked with
    apt-get install -qq -y libibverbs1 libnuma1 libcurl4 > /dev/null 2>&1 || echo "apt-get could not install libibverbs1 libnuma1 libcurl4"
fi

install() { # name, then arguments of pip
    local name=$1 folder=$root/$1
    shift
    "$python" -m venv "$folder" || return
    rm -f "$folder/why"
    "$folder/bin/pip" --disable-pip-version-check install --quiet "$@" 2> "$folder/log" \
        || grep -m 1 -i error "$folder/log" > "$folder/why" || echo "pip failed" > "$folder/why"
    [ -e "$folder/why" ] && echo "$name does not install: $(cat "$folder/why")"
    echo "  $name"
}

root=$1 python=$2
install ours --editable . uvloop==0.23.0 'matplotlib>=3.8'
install streams numpy uvloop==0.23.0
install nixl numpy && install nixl --no-deps nixl-cu12==1.5.1
install ucxx numpy && install ucxx --no-deps ucxx-cu12==0.52.0 libucxx-cu12==0.52.0 'libucx-cu12<1.22,>=1.19'
install mooncake numpy && install mooncake --no-deps mooncake-transfer-engine-non-cuda==0.3.13.post1
install monarch numpy torchmonarch==0.7.0
install gloo numpy torch==2.13.0+cpu 2> /dev/null || true
[ -e "$root/gloo/why" ] && install gloo numpy torch --index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple
exit 0
