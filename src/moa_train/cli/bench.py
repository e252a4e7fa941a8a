"""moa-bench: measure speed and memory, alone or against other libraries."""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra

from moa_train.cli import app
from moa_train.cli.compose import typed
from moa_train.cli.overrides import check_overrides
from moa_train.plugins import DATASETS
from moa_train.runtime.command_line import leave_with, path
from moa_train.runtime.errors import UserError, choose
from moa_train.runtime.signals import Exit
from moa_train.schema import PRECISIONS, RunConfig
from moa_train.serialization import to_dict

if TYPE_CHECKING:
    from moa_train.bench.tables import Table

PARTS = {
    "step": "training and inference steps of models: speed, memory, share of peak performance (MFU)",
    "trace": "training steps on a CPU: time of each kind of operation and of each part of the model",
    "input": "input pipelines on one core, for training and evaluation: images/s in total and per stage",
    "loop": "the training loop, with logging and background checkpoints, compared with a bare loop",
    "checkpoint": "time to save (and how long training waits for it), verify and restore a checkpoint",
    "ranks": "several processes compared with one that has as many threads in total; on CUDA, several GPUs with one",
    "load": "training alongside 0, 1 and 2 busy processes, with adaptive and fixed numbers of threads",
    "start": "time from starting moa-train to the first step, compared with imports and building the model",
}

EXAMPLES = """moa-bench: measure speed and memory, alone or compared with other libraries.

Examples:
  moa-bench                                              all parts, small model and data set, takes minutes
  moa-bench step model=moa_t data=imagenet --batch 8 --against timm/swin_tiny_patch4_window7_224
  moa-bench step model=moa_t data=cifar100 --batch 64 --precision bf16 fp32 --compile off on --mode infer
  moa-bench step data=cifar100 --against timm/swin_tiny_patch4_window7_224:img_size=32,patch_size=1,window_size=4
  moa-bench step experiment=cifar100_cpu --precision fp32 --isa avx2 avx512
  moa-bench input data=imagenet data.root=/data/imagenet --batch 64 --against timm torchvision
  moa-bench loop checkpoint model=moa_t data=imagenet data.root=/data/imagenet engine.micro_batch_size=64"""

MODES = ("train", "infer")
IMAGELESS = {"step", "trace", "checkpoint"}
"""Parts that do not read the data set's images."""

_OVERRIDE = re.compile(r"[+~]*[\w./@]+=")


def bench(options: argparse.Namespace, config: RunConfig, overrides: list[str]) -> None:
    """Check all settings first, then measure part by part; print and write each table as soon as it is complete."""
    import torch

    from moa_train.assembly.process import set_up_process
    from moa_train.bench import tables
    from moa_train.bench.job import Job
    from moa_train.data.dataset import open_split
    from moa_train.runtime.device import pick_device
    from moa_train.runtime.distributed import Distributed

    device = pick_device(config.runtime.device)
    set_up_process(config.runtime, Distributed(device))
    job = Job(
        config,
        [*options.config_dir, *overrides],
        compose,
        DATASETS.load(config.data.name).num_classes or len(open_split(config.data, "train").classes),
        device,
        rounds=options.rounds,
        seconds=options.seconds,
        steps=options.steps,
        modes=options.mode,
        batches=options.batch,
        precisions=options.precision,
        compiles=[text == "on" for text in options.compile],
        checkpointings=[text == "on" for text in options.checkpointing],
        against=options.against,
        ranks=options.ranks,
    )
    measures = {}
    for part in options.parts or PARTS:
        try:
            measures[part] = import_module(f"moa_train.bench.{part}").prepare(job)
        except UserError as error:
            if options.parts or (part == [*PARTS][-1] and not measures):
                raise
            print(f"{part} is skipped: {error}", file=sys.stderr)
    header = {**tables.header(device, sys.orig_argv), "config": to_dict(config)}
    print(tables.describe(header))
    measured: list[Table] = []
    for part, measure in measures.items():
        if sys.stderr.isatty():
            print(f"measuring {part}", end="\r", file=sys.stderr)
        try:
            for table in measure():
                print(f"\n{table.text()}", flush=True)
                measured.append(table)
                tables.write(options.json, header, measured)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{device} ran out of memory. Choose a smaller --batch or engine.micro_batch_size."
            ) from error
    print(f"\nwrote {options.json}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options; Hydra parses the ``key=value`` arguments."""
    parts = "\n".join(f"  {name:<12}{text}" for name, text in PARTS.items())
    result = argparse.ArgumentParser(
        "moa-bench",
        usage="moa-bench [PART ...] [OPTION ...] [GROUP=OPTION ...] [KEY=VALUE ...]",
        description="Measure speed and memory, alone or compared with other libraries.\n"
        "Candidates run interleaved in one process; the report gives medians, ratios and their spread.\n\n"
        f"parts (default: all that this machine supports):\n{parts}\n\n"
        "GROUP=OPTION and KEY=VALUE choose the model, data and settings to measure; moa-train --help lists them.",
        epilog=EXAMPLES.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("parts", nargs="*", metavar="PART", help=argparse.SUPPRESS)
    result.add_argument(
        "--rounds", type=_count, default=7, metavar="COUNT", help="measurements per candidate (default: 7)"
    )
    result.add_argument("--seconds", type=float, default=0.5, help="minimum duration of a measurement (default: 0.5)")
    result.add_argument(
        "--steps", type=_count, default=100, metavar="COUNT", help="loop, ranks: steps per measurement (default: 100)"
    )
    result.add_argument(
        "--against", nargs="+", default=[], metavar="PEER",
        help="step, trace: timm/NAME, torchvision/NAME or moa-train/OPTION, optionally followed by :KEY=VALUE,...; "
        "input: timm or torchvision (default: none)",
    )  # fmt: skip
    result.add_argument("--mode", nargs="+", default=MODES, choices=MODES, help="step, input: modes (default: both)")
    result.add_argument(
        "--batch", nargs="+", type=_count, default=[], metavar="SIZE",
        help="step, trace, input: images per forward pass (default: as configured)",
    )  # fmt: skip
    result.add_argument(
        "--precision", nargs="+", default=[], choices=PRECISIONS, metavar="NAME",
        help="step, trace: auto, bf16, fp16 or fp32 (default: as configured)",
    )  # fmt: skip
    switch: dict[str, Any] = {"nargs": "+", "default": ["off"], "choices": ("off", "on")}
    result.add_argument("--compile", **switch, help="step: use torch.compile (default: off)")
    result.add_argument("--checkpointing", **switch, help="step: recompute activations in training (default: off)")
    result.add_argument(
        "--ranks", type=_count, default=2, metavar="COUNT", help="ranks: number of processes (default: 2)"
    )
    result.add_argument(
        "--isa", nargs="+", default=[], choices=ISAS,
        help="repeat the measurements with the CPU limited to each of these instruction sets",
    )  # fmt: skip
    result.add_argument("--config-dir", type=path, metavar="DIR", help="folder with your own recipes, as in moa-train")
    result.add_argument(
        "--json", type=path, metavar="FILE", help="file for the results (default: outputs/bench-TIME.json)"
    )
    return result


def compose(overrides: Sequence[str]) -> RunConfig:
    """Return the configuration composed from ``overrides``; Hydra has already read the options among them."""
    check_overrides(list(overrides), RunConfig)
    config: RunConfig = typed(hydra.compose("train", [text for text in overrides if not text.startswith("-")]))
    return config


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate options from ``key=value`` arguments, and check what can be checked without a configuration.

    Raises:
        UserError: a part is unknown, or a peer applies to none of the selected parts.
    """
    overrides = [text for text in arguments if _OVERRIDE.match(text)]
    options = parser().parse_args([text for text in arguments if not _OVERRIDE.match(text)])
    for part in options.parts:
        if part not in PARTS:
            raise UserError(choose("part", part, PARTS))
    for peer in options.against:
        suitable = ("step", "trace") if "/" in peer else ("input",)
        if options.parts and not set(suitable) & set(options.parts):
            raise UserError(
                f"--against {peer} applies to the part {' or '.join(suitable)}, but the selected parts are: "
                f"{', '.join(options.parts)}. Add {suitable[0]} to them."
            )
    options.config_dir = [f"--config-dir={options.config_dir}"] if options.config_dir else []
    options.json = options.json or Path("outputs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json"
    return options, overrides


ISAS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
"""Environment variables that make torch, oneDNN and MKL use no more than an instruction set of x86 processors."""


def bench_isas(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure each instruction set in its own process, one after the other, and return the exit code."""
    rest = list(arguments)
    for option, count in (("--isa", len(options.isa)), ("--json", 1)):
        if option in rest:
            del rest[rest.index(option) : rest.index(option) + 1 + count]
    rest = [text for text in rest if not text.startswith(("--isa=", "--json="))]
    for isa in options.isa:
        print(f"{'' if isa == options.isa[0] else chr(10)}instruction set {isa}", flush=True)
        path = options.json.with_name(f"{options.json.stem}-{isa}{options.json.suffix}")
        command = [sys.executable, "-m", "moa_train.cli.bench", *rest, "--json", str(path)]
        if code := subprocess.run(command, env={**os.environ, **ISAS[isa]}).returncode:
            return code
    return Exit.FINISHED


def main() -> None:
    """Entry point."""
    leave_with(measure)


def measure() -> None:
    """Read the command line and measure, in a process for each instruction set if there are several."""
    options, overrides = read(sys.argv[1:])
    for argument in options.config_dir:  # the processes that a part starts find own code there as well
        folders = [argument.partition("=")[2], os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    if options.isa:
        sys.exit(bench_isas(options, sys.argv[1:]))
    sys.argv[1:] = [*options.config_dir, *overrides]
    app.run(
        partial(bench, options), RunConfig, "train", EXAMPLES, images=not IMAGELESS.issuperset(options.parts or PARTS)
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


if __name__ == "__main__":
    main()
