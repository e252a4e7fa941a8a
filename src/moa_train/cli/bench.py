"""moa-bench: measure speed and memory, alone or against other libraries."""

import argparse
import re
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
from moa_train.plugins import DATASETS
from moa_train.runtime.errors import UserError, choose
from moa_train.runtime.signals import Exit
from moa_train.schema import PRECISIONS, RunConfig, to_dict

if TYPE_CHECKING:
    from moa_train.bench.report import Table

PARTS = {
    "step": "model steps, training and inference: speed, memory, share of the machine's peak",
    "input": "input on one core, training and evaluation: images/s as a whole and by stage",
    "loop": "the trainer, with logging and background checkpoints, over the bare step",
    "checkpoint": "saving (how long training waits for it), verifying, restoring",
    "ranks": "several processes over one process with all their threads; on CUDA several GPUs over one",
    "start": "from typing moa-train to the first step, over importing torch and building the model",
}

EXAMPLES = """moa-bench: ratios of what takes turns in one run; medians, spread, versions, JSON.

  moa-bench                                              all parts, small model and data, some minutes
  moa-bench step model=moa_t data=imagenet --batch 8 --against timm/swin_tiny_patch4_window7_224
  moa-bench step model=moa_t data=cifar100 --batch 64 --precision bf16 fp32 --compile off on --mode infer
  moa-bench input data=imagenet data.root=/data/imagenet --batch 64 --against timm torchvision
  moa-bench loop checkpoint model=moa_t data=imagenet data.root=/data/imagenet engine.micro_batch_size=64"""

MODES = ("train", "infer")
IMAGELESS = {"step", "checkpoint"}
"""Parts that look at no image of the data set."""

_OVERRIDE = re.compile(r"[+~]*[\w./@]+=")


def bench(options: argparse.Namespace, config: RunConfig, overrides: list[str]) -> None:
    """Check everything, then measure part after part, and print and write each table when it is there."""
    import torch

    from moa_train.assembly.process import set_up_process
    from moa_train.bench import report
    from moa_train.bench.job import Job
    from moa_train.data.dataset import open_split
    from moa_train.runtime.device import pick_device
    from moa_train.runtime.distributed import Distributed

    device = pick_device(config.runtime.device)
    set_up_process(config.runtime, Distributed(0, 0, 1, 1, device))
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
    measures = {part: import_module(f"moa_train.bench.{part}").prepare(job) for part in options.parts}
    header = {**report.header(device, sys.orig_argv), "config": to_dict(config)}
    print(report.describe(header))
    tables: list[Table] = []
    for part, measure in measures.items():
        if sys.stderr.isatty():
            print(f"measuring: {part}", end="\r", file=sys.stderr)
        try:
            for table in measure():
                print(f"\n{table.text()}", flush=True)
                tables.append(table)
                report.write(options.json, header, tables)
        except torch.OutOfMemoryError as error:
            raise UserError(f"The memory of {device} is too small. Choose a smaller --batch.") from error
    print(f"\nwrote {options.json}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options; ``key=value`` arguments are for Hydra."""
    parts = "\n".join(f"  {name:<12}{text}" for name, text in PARTS.items())
    result = argparse.ArgumentParser(
        "moa-bench",
        usage="moa-bench [PART ...] [options] [key=value ...]",
        description=f"{__doc__.partition(': ')[2]}\nparts (default: all)\n{parts}\n\nkey=value: what is measured, as "
        "moa-train takes it; moa-train --help lists them.",
        epilog=EXAMPLES.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("parts", nargs="*", metavar="PART", help=argparse.SUPPRESS)
    result.add_argument("--rounds", type=_count, default=7, help="turns of each contender (default: 7)")
    result.add_argument("--seconds", type=float, default=0.5, help="least length of a turn (default: 0.5)")
    result.add_argument("--steps", type=_count, default=100, help="length of a turn of loop and ranks (default: 100)")
    result.add_argument(
        "--against", nargs="+", default=[], metavar="PEER",
        help="step: timm/NAME, torchvision/NAME, moa-train/OPTION; arguments after a colon, as in "
        "timm/swin_tiny_patch4_window7_224:img_size=32,patch_size=1,window_size=4; input: timm, torchvision",
    )  # fmt: skip
    result.add_argument("--mode", nargs="+", default=MODES, choices=MODES, help="step, input (default: both)")
    result.add_argument(
        "--batch", nargs="+", type=_count, default=[], help="step, input: images (default: as configured)"
    )
    result.add_argument(
        "--precision", nargs="+", default=[], choices=PRECISIONS, help="step: bf16, fp16, fp32 (default: as configured)"
    )
    switch: dict[str, Any] = {"nargs": "+", "default": ["off"], "choices": ("off", "on")}
    result.add_argument("--compile", **switch, help="step: torch.compile (default: off)")
    result.add_argument("--checkpointing", **switch, help="step: recompute activations in training (default: off)")
    result.add_argument("--ranks", type=_count, default=2, help="ranks: processes (default: 2)")
    result.add_argument("--config-dir", metavar="DIR", help="recipes of your own, as in moa-train")
    result.add_argument("--json", type=Path, metavar="FILE", help="result (default: outputs/bench-TIME.json)")
    return result


def compose(overrides: Sequence[str]) -> RunConfig:
    """Return the configuration that such arguments lead to; options among them are Hydra's already."""
    app.check_overrides(list(overrides), RunConfig)
    config: RunConfig = typed(hydra.compose("train", [text for text in overrides if not text.startswith("-")]))
    return config


def read(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Tell options from ``key=value`` arguments, and check what can be checked without a configuration.

    Raises:
        UserError: a part is not known, or a peer is for none of the parts.
    """
    overrides = [text for text in arguments if _OVERRIDE.match(text)]
    options = parser().parse_args([text for text in arguments if not _OVERRIDE.match(text)])
    for part in options.parts:
        if part not in PARTS:
            raise UserError(choose("part", part, PARTS))
    options.parts = options.parts or list(PARTS)
    for peer in options.against:
        part = "step" if "/" in peer else "input"
        if part not in options.parts:
            raise UserError(
                f"--against {peer} is for {part}, which is not among the parts: {', '.join(options.parts)}."
            )
    options.config_dir = [f"--config-dir={options.config_dir}"] if options.config_dir else []
    options.json = options.json or Path("outputs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json"
    if "data=imagenet" in overrides and IMAGELESS.issuperset(options.parts):
        overrides.insert(0, "data.root=.")  # its classes are known
    return options, overrides


def main() -> None:
    """Entry point."""
    try:
        options, overrides = read(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(Exit.USER_ERROR)
    sys.argv[1:] = [*options.config_dir, *overrides]
    app.run(partial(bench, options), RunConfig, "train", EXAMPLES)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    main()
