#!/usr/bin/env bash
# Trains a small MOA on scikit-learn's handwritten digits, as in the README: offline, about a minute on two cores.
#
#   scripts/reproduce_digits.sh [key=value ...]
set -euo pipefail

run_dir=outputs/digits-$(date +%Y%m%d-%H%M%S)
moa-train run_dir="$run_dir" "$@"
# The second command rebuilds the model and the data from the checkpoint and returns the same counts.
moa-eval ckpt="$run_dir"
