#!/usr/bin/env bash
# Measure the tables of docs/PERFORMANCE.md on this machine, which should be idle otherwise (half an hour on two cores).
#
#   scripts/performance.sh FOLDER OUTPUT        FOLDER holds CIFAR-100; tables and JSON files go to the folder OUTPUT
#
# The instruction set avx2 makes a better CPU look like one that has neither AVX-512 nor bf16.
set -eu
data=$1 output=$2 program=moa-bench
mkdir -p "$output"
bench() {
    name=$1
    shift
    echo "$(date +%T) $name"
    "$program" "$@" --json "$output/$name.json" > "$output/$name.txt"
}
swin=timm/swin_tiny_patch4_window7_224
small="$swin:img_size=32,patch_size=4,window_size=4,embed_dim=96,depths=(2,2),num_heads=(3,6),mlp_ratio=2.0,drop_path_rate=0.0"

bench load-digits load --rounds 4 --isa native avx2
bench load-cifar load --rounds 6 experiment=cifar100_plain "data.root=$data"
bench start start --rounds 5 --isa native avx2
bench step-cifar-fp32 step experiment=cifar100_plain --batch 256 --precision fp32 --rounds 5 --seconds 0.3 \
    --against "$small" --isa avx2 avx512 native
bench step-cifar-bf16 step experiment=cifar100_plain --batch 256 --precision bf16 --rounds 5 --seconds 0.3 \
    --against "$small"
bench trace-cifar-bf16 trace experiment=cifar100_plain --batch 256 --precision bf16 --rounds 9 --against "$small"
bench step-digits step --precision fp32 --rounds 5 --seconds 0.3 --isa avx2 native
bench step-224-fp32 step model=moa_t data=imagenet --batch 8 --precision fp32 --rounds 3 --seconds 0.1 \
    --against "$swin" --isa avx2 native
bench step-224-bf16 step model=moa_t data=imagenet --batch 8 --precision bf16 --rounds 3 --seconds 0.1 --against "$swin"
echo "$(date +%T) the default command, as on a CPU with AVX2"
export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
(time -p moa-train "run_dir=$output/digits" tracking.progress=plain) > "$output/digits.txt" 2>&1
date +%T
