"""moa-model: describe models and convert published weights."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.cli import app
from moa_train.plugins import DATASETS
from moa_train.runtime.command_line import leave_with, path
from moa_train.runtime.errors import UserError
from moa_train.runtime.output import protect_output
from moa_train.runtime.signals import Exit
from moa_train.schema import RunConfig, image_shape
from moa_train.serialization import to_dict

if TYPE_CHECKING:
    from moa_train.model.published_weights import PublishedModel
    from moa_train.model.summary import TrainingCost

EXAMPLES = """moa-model summary: print a model's shapes, parameters, multiply-accumulates and memory.

Examples:
  moa-model summary model=moa_t data=imagenet
  moa-model summary model=swin_t data=cifar100 engine.micro_batch_size=128
  moa-model summary --gpus 8 model=moa_t data=imagenet   what limits a step on each of 8 GPUs"""

HELP = f"""usage: moa-model COMMAND ...

Describe models and convert published weights.

commands:
  summary  print a model's shapes, parameters, multiply-accumulates and memory
  convert  convert published weights to .safetensors, or back

moa-model COMMAND --help describes a command.

{EXAMPLES.partition(chr(10) * 2)[2]}
  moa-model convert published.pth moa_t.safetensors"""


def summary(gpus: int | None, config: RunConfig, overrides: list[str]) -> None:
    """Print the cost of the configured model for the micro-batch of one process, or of one of several GPUs."""
    import torch

    from moa_train.data.dataset import open_split
    from moa_train.model.summary import summarize, training_cost
    from moa_train.runtime.device import pick_device
    from moa_train.runtime.precision import Precision

    classes = DATASETS.load(config.data.name).num_classes or len(open_split(config.data, "train").classes)
    size = image_shape(config.data.image_size)
    precision = Precision.resolve(config.runtime.precision, pick_device(config.runtime.device))
    engine = config.engine
    images = min(engine.micro_batch_size or engine.batch_size, max(1, engine.batch_size // (gpus or 1)))
    print(f"{config.model.title} at {size[0]} x {size[1]}, {classes} classes\n")
    print(summarize(config.model, image_size=size, num_classes=classes).table())
    cost = training_cost(
        config.model,
        image_size=size,
        num_classes=classes,
        batch_size=images,
        dtype=precision.dtype,
        states=(1 if config.optim.name in ("sgd", "muon") else 2) + (config.engine.ema_decay > 0),
        device=precision.device.type if torch.cuda.is_available() else "cpu",
    )
    print(f"\nmemory of a training step of {images} images in {precision.name}: about {cost.memory / 2**30:.2f} GiB")
    if gpus:
        print(advise(gpus, engine.batch_size, images, cost))


HOST_US, TERABYTES_PER_SECOND = 30, 2.5
"""Host time of an operation, and memory bandwidth, on one H100 machine (docs/GPU.md)."""


def advise(gpus: int, batch_size: int, images: int, cost: "TrainingCost") -> str:
    """Describe what limits a step of ``images`` images per GPU, and what to do about it."""
    host, device = cost.operations * HOST_US / 1e3, cost.moved / (TERABYTES_PER_SECOND * 1e9)
    lines = [
        f"{gpus} GPUs: {batch_size} images per update are {batch_size // gpus} per GPU, in passes of {images}",
        f"  host     about {cost.operations:,} operations: {host:.0f} ms at {HOST_US} us each",
        f"  device   about {cost.moved / 1e9:.1f} GB moved: {device:.0f} ms at {TERABYTES_PER_SECOND} TB/s",
    ]
    if host > device:
        lines.append(
            "  The host limits this step. Use larger passes (a larger engine.batch_size, or fewer GPUs), or "
            "runtime.compile=blocks, which needs fewer operations."
        )
    else:
        lines.append("  The device limits this step, so the GPUs are used well.")
    return "\n".join(lines)


def convert(source: Path, target: Path, image_size: int | None = None) -> int:
    """Convert weights from the published format (.pth) to .safetensors, or back if ``source`` is .safetensors."""
    wanted = ".pth" if source.suffix == ".safetensors" else ".safetensors"
    if target.suffix != wanted:
        raise UserError(
            f"{source.name} can be converted to {target.with_suffix(wanted).name}, but not to {target.name}."
        )
    if not target.parent.is_dir():
        raise UserError(f"Cannot write {target.name}: the folder {target.parent} does not exist. Create it first.")
    from moa_train.export.job import staged

    if source.suffix == ".safetensors":
        from moa_train.engine.find_weights import find_weights
        from moa_train.model.published_weights import write_published

        weights, metadata = find_weights(source).load()
        with staged(target) as temporary:
            write_published(temporary, weights, json.loads(metadata.get("config", "{}")))
    else:
        from moa_train.engine.tensorfile import write_tensors
        from moa_train.model.load import load_weights
        from moa_train.model.pth_file import read_state_dict
        from moa_train.model.published_weights import published_model
        from moa_train.model.registry import create_model

        weights = read_state_dict(source)
        found = published_model(weights, (image_size, image_size) if image_size else None)
        model = create_model(found.config, image_size=found.image_size, num_classes=found.num_classes)
        load_weights(model, weights)  # writes nothing unless all weights fit
        with staged(target) as temporary:
            write_tensors(temporary, model.state_dict(), header(found))
    print(f"wrote {target}: {len(weights)} tensors")
    return Exit.FINISHED


def header(found: "PublishedModel") -> dict[str, str]:
    """Return the header of a weights file. ``moa-eval`` and ``init=`` rebuild the model from it.

    Published files do not name their classes, which are ImageNet's folders in sorted order.
    """
    config = RunConfig(model=found.config)
    config.data.name, config.data.image_size = "imagenet", list(found.image_size)
    classes = [f"class {number}" for number in range(found.num_classes)]
    return {"format": "1", "config": json.dumps(to_dict(config)), "classes": json.dumps(classes), "named": "false"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``moa-model convert``."""
    result = argparse.ArgumentParser(
        "moa-model convert",
        description="Convert published weights (a .pth pickle, read without executing code from it) to .safetensors, "
        "for moa-eval ckpt= and moa-train init=, or convert .safetensors back to .pth. If weights do not fit, they "
        "are listed and nothing is written.",
    )
    result.add_argument("source", metavar="IN", type=path, help="file to convert, .pth or .safetensors")
    result.add_argument("target", metavar="OUT", type=path, help="file to write, with the other suffix")
    result.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="image size, needed only if the weights do not determine it"
    )
    return result


def take_gpus(arguments: list[str]) -> int | None:
    """Remove ``--gpus N`` from the arguments, and return N."""
    if "--gpus" not in arguments:
        return None
    place = arguments.index("--gpus")
    number = arguments[place + 1] if place + 1 < len(arguments) else ""
    if not number.isdecimal() or not int(number):
        print(f"error: --gpus {number} must be followed by the number of GPUs, 1 or more.", file=sys.stderr)
        sys.exit(Exit.USER_ERROR)
    del arguments[place : place + 2]
    return int(number)


def main() -> None:
    """Entry point."""
    protect_output()
    command, *rest = sys.argv[1:] or ["--help"]
    sys.argv[1:] = rest
    if command == "summary":
        app.run(partial(summary, take_gpus(sys.argv)), RunConfig, "train", EXAMPLES, images=False)
    elif command == "convert":
        options = parser().parse_args(rest)
        leave_with(lambda: convert(options.source, options.target, options.image_size))
    elif command in ("--help", "-h"):
        print(HELP)
    else:
        print(f"error: unknown command {command!r}. Commands: summary, convert.", file=sys.stderr)
        sys.exit(Exit.USER_ERROR)


if __name__ == "__main__":
    main()
