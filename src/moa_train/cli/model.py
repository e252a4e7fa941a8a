"""moa-model: describe models and convert published weights."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moa_train.cli import app
from moa_train.plugins import DATASETS
from moa_train.runtime.errors import UserError
from moa_train.runtime.output import protect_output
from moa_train.runtime.signals import Exit
from moa_train.schema import RunConfig, image_shape, to_dict

if TYPE_CHECKING:
    from moa_train.model.published_weights import PublishedModel

EXAMPLES = """moa-model summary: print a model's shapes, parameters, multiply-accumulates and memory.

Examples:
  moa-model summary model=moa_t data=imagenet
  moa-model summary model=swin_t data=cifar100 engine.micro_batch_size=128"""

HELP = f"""usage: moa-model COMMAND ...

Describe models and convert published weights.

commands:
  summary  print a model's shapes, parameters, multiply-accumulates and memory
  convert  convert published weights to .safetensors, or back

moa-model COMMAND --help describes a command.

{EXAMPLES.partition(chr(10) * 2)[2]}
  moa-model convert published.pth moa_t.safetensors"""


def summary(config: RunConfig, overrides: list[str]) -> None:
    """Print the cost of the configured model for the micro-batch of one process."""
    import torch

    from moa_train.data.dataset import open_split
    from moa_train.model.summary import summarize, training_memory
    from moa_train.runtime.device import pick_device
    from moa_train.runtime.precision import Precision

    classes = DATASETS.load(config.data.name).num_classes or len(open_split(config.data, "train").classes)
    size = image_shape(config.data.image_size)
    precision = Precision.resolve(config.runtime.precision, pick_device(config.runtime.device))
    images = config.engine.micro_batch_size or config.engine.batch_size
    print(f"{config.model.title} at {size[0]} x {size[1]}, {classes} classes\n")
    print(summarize(config.model, image_size=size, num_classes=classes).table())
    memory = training_memory(
        config.model,
        image_size=size,
        num_classes=classes,
        batch_size=images,
        dtype=precision.dtype,
        states=(1 if config.optim.name in ("sgd", "muon") else 2) + (config.engine.ema_decay > 0),
        device=precision.device.type if torch.cuda.is_available() else "cpu",
    )
    print(f"\nmemory of a training step of {images} images in {precision.name}: about {memory / 2**30:.2f} GiB")


def convert(source: Path, target: Path, image_size: int | None = None) -> int:
    """Convert weights from the published format (.pth) to .safetensors, or back if ``source`` is .safetensors."""
    wanted = ".pth" if source.suffix == ".safetensors" else ".safetensors"
    if target.suffix != wanted:
        raise UserError(
            f"{source.name} can be converted to {target.with_suffix(wanted).name}, but not to {target.name}."
        )
    if not target.parent.is_dir():
        raise UserError(f"Cannot write {target.name}: the folder {target.parent} does not exist. Create it first.")
    if source.suffix == ".safetensors":
        from moa_train.engine.find_weights import find_weights
        from moa_train.model.published_weights import write_published

        weights, metadata = find_weights(source).load()
        write_published(target, weights, json.loads(metadata.get("config", "{}")))
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
        write_tensors(target, model.state_dict(), header(found))
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
    result.add_argument("source", metavar="IN", type=Path, help="file to convert, .pth or .safetensors")
    result.add_argument("target", metavar="OUT", type=Path, help="file to write, with the other suffix")
    result.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="image size, needed only if the weights do not determine it"
    )
    return result


def main() -> None:
    """Entry point."""
    protect_output()
    command, *rest = sys.argv[1:] or ["--help"]
    sys.argv[1:] = rest
    if command == "summary":
        if "data=imagenet" in rest and not any(text.startswith("data.root=") for text in rest):
            sys.argv.append("data.root=.")  # the number of its classes is known, so no image is read
        app.run(summary, RunConfig, "train", EXAMPLES)
    elif command == "convert":
        options = parser().parse_args(rest)
        try:
            sys.exit(convert(options.source, options.target, options.image_size))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(Exit.USER_ERROR)
    elif command in ("--help", "-h"):
        print(HELP)
    else:
        print(f"error: unknown command {command!r}. Commands: summary, convert.", file=sys.stderr)
        sys.exit(Exit.USER_ERROR)


if __name__ == "__main__":
    main()
