#!/usr/bin/env bash
# The published recipe of MOA-T on ImageNet-1K: 300 epochs, batch 512, on all GPUs of this machine.
#
#   scripts/reproduce_paper_imagenet.sh /data/imagenet
#
# The first argument is a folder with class folders below train/ and val/, the others are passed on. Typed again after an
# interruption, it goes on where it was. This project has not had the hardware to run it to its end.
set -euo pipefail

root=${1:?"usage: $0 DATA_FOLDER [key=value ...]"}
run_dir=outputs/paper_imagenet
torchrun --nproc-per-node gpu -m moa_train.cli.train \
    experiment=paper_imagenet data.root="$root" run_dir="$run_dir" resume=auto "${@:2}"
torchrun --nproc-per-node gpu -m moa_train.cli.evaluate ckpt="$run_dir"
