#!/usr/bin/env bash
# Trains MOA-T on ImageNet-1K with the published recipe (300 epochs, batch size 512), on all GPUs of this machine.
#
#   scripts/reproduce_paper_imagenet.sh /data/imagenet
#
# The first argument is a folder with class folders in train/ and val/. All other arguments are passed to moa-train. Run
# the same command again after an interruption to resume. This project has not had the hardware for the complete run.
set -euo pipefail

root=${1:?"usage: $0 DATA_FOLDER [key=value ...]"}
run_dir=outputs/paper_imagenet
torchrun --nproc-per-node gpu -m moa_train.cli.train \
    experiment=paper_imagenet_moa_t data.root="$root" run_dir="$run_dir" resume=auto "${@:2}"
torchrun --nproc-per-node gpu -m moa_train.cli.evaluate ckpt="$run_dir"
