#!/usr/bin/env bash
# Trains on CIFAR-100 from scratch, in half an hour on two CPU cores. Results: docs/RESULTS.md.
#
#   scripts/reproduce_cifar100_cpu.sh data/cifar100 data.download=true
#
# The first argument is the data folder: a pack, a class-folder tree, or the folder to download to. All other arguments
# are passed to moa-train. Run the same command again after an interruption to resume.
set -euo pipefail

root=${1:?"usage: $0 DATA_FOLDER [key=value ...]"}
run_dir=outputs/cifar100_cpu
moa-train experiment=cifar100_cpu data.root="$root" run_dir="$run_dir" resume=auto "${@:2}"
moa-eval ckpt="$run_dir"
