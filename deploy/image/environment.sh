#!/bin/sh
# Makes one of the two Python environments, in the folder above this one's: .venv or .venv-quantize.
#
# usage: environment.sh cpu|cuda gateway|quantize
#
# Only what others wrote is fetched: it is a layer of gigabytes, which must not change with every line of Assay. Its own
# modules are laid beside it later, where the environment looks for them.
set -eu

backend=$1
environment=$2
cd "$(dirname "$0")/../.."

# pyproject.toml names it, and its text is nothing that a layer should depend on.
[ -e README.md ] || : >README.md

python3 deploy/install.py --backend "$backend" --only "$environment" --without-source

# What a later installation here would want to know; there is none.
find .venv .venv-quantize -maxdepth 1 -name install.log -delete 2>/dev/null || true
