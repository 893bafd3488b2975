#!/bin/sh
# Installs what an image needs of Debian. A base that has all of it needs no network.
#
# usage: packages.sh cpu|cuda [--simulate]
#
# Debian's packages are pinned by the release that the base is of and no further: a fix of a hole replaces the package
# that had it, which is then nowhere to be had.
set -eu

backend=$1
simulate=${2:-}

# The first process of a container (see the Dockerfile's ENTRYPOINT), what vLLM's CPU kernels are linked to, and lscpu,
# without which vLLM does not start on CPUs.
packages="tini libnuma1 util-linux"
if [ "$backend" = cuda ]; then
    # Triton compiles a launcher in C for each kernel when it first runs it, and torch.compile may want C++: the CUDA
    # build does not start without. On CPUs engines keep PyTorch from compiling (tiers/engine.py), and Numba brings
    # LLVM with it.
    packages="$packages g++ libc6-dev"
fi

missing=
for package in $packages; do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done

if [ -n "$simulate" ]; then
    # shellcheck disable=SC2086  # names, one word each
    exec apt-get install --simulate --yes --no-install-recommends $packages
fi
if [ -n "$missing" ]; then
    apt-get update
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $missing
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
fi
