#!/usr/bin/env bash
# CIFAR-100 from scratch on two CPU cores in half an hour. Its curve and figures: docs/RESULTS.md.
#
#   scripts/reproduce_cifar100_cpu.sh data/cifar100 data.download=true
#
# The first argument is the folder of the data set (a pack, a class-folder tree, or the place to download to), the others
# are passed on. Typed again after an interruption, it goes on where it was.
set -euo pipefail

root=${1:?"usage: $0 DATA_FOLDER [key=value ...]"}
run_dir=outputs/cifar100_cpu
moa-train experiment=cifar100_cpu data.root="$root" run_dir="$run_dir" resume=auto "${@:2}"
moa-eval ckpt="$run_dir"
