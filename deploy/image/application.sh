#!/bin/sh
# Makes Assay's own modules ready to run in the folder above this one's, and sees whether they do.
#
# usage: application.sh
#
# They are compiled here, for whoever runs them may not write beside them.
set -eu

cd "$(dirname "$0")/../.."
.venv/bin/python -m compileall -q --invalidation-mode unchecked-hash server tiers kernels
.venv/bin/assay --version
