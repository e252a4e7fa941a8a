#!/usr/bin/env bash
# Runs an experiment of docs/RESULTS.md for several seeds and writes its table. The tables are listed in tables.yaml.
#
#   scripts/reproduce.sh small_moa seeds=0,1,2,3,4 data.root=data/cifar100
#   scripts/reproduce.sh imagenet seeds=0 data.root=/data/imagenet
#   scripts/reproduce.sh small_moa,small_overlap jobs=12 data.root=data/cifar100        (several small runs on one GPU)
#
# All other arguments are passed to moa-train. The command can be interrupted at any time and repeated: finished runs
# are kept, unfinished ones are resumed. LAUNCH='torchrun --nproc-per-node 8 -m moa_train.cli.train' uses several GPUs.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python scripts/tables.py run "$@"
python scripts/tables.py write
