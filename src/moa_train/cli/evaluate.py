"""moa-eval: evaluate weights. Their files record the model and the data set."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli import app
from moa_train.plugins import check_trusted
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig, EvalConfig, RunConfig, from_dict, image_shape, own_code

if TYPE_CHECKING:
    from moa_train.data.source import Source
    from moa_train.engine.find_weights import FoundWeights

EXAMPLES = """moa-eval: compute accuracy and loss of trained weights, from exact counts.

The result is printed as JSON and written to a file.

Examples:
  moa-eval ckpt=outputs/RUN                              the best checkpoint of a run, or else the newest
  moa-eval ckpt=outputs/RUN/checkpoints/last split=val
  moa-eval ckpt=weights.safetensors root=/data/imagenet
  torchrun --nproc-per-node 2 -m moa_train.cli.evaluate ckpt=outputs/RUN"""


def evaluate(config: EvalConfig, overrides: list[str]) -> None:
    """Evaluate weights, and print and write the result."""
    if not config.ckpt:
        raise UserError("ckpt is missing. Give ckpt=PATH: a run folder, a checkpoint folder or a .safetensors file.")
    if config.output and not Path(config.output).parent.is_dir():
        raise UserError(f"output={config.output}: there is no folder {Path(config.output).parent}.")
    from moa_train.assembly.evaluation import build_evaluation
    from moa_train.assembly.outcome import describe
    from moa_train.assembly.process import adaptive_threads, set_up_process
    from moa_train.data.source import align
    from moa_train.engine.find_weights import find_weights
    from moa_train.model.load import load_weights
    from moa_train.model.registry import create_model
    from moa_train.runtime.distributed import Distributed
    from moa_train.tracking.provenance import reproduce

    parts = ("ema", "model") if config.weights == "auto" else (config.weights,)
    found = find_weights(Path(config.ckpt), parts)
    weights, metadata = found.load()
    if config.command:
        print(
            reproduce(json.loads(metadata.get("origin", "[]")))
            or f"{found.path} does not record the commands that produced it."
        )
        return
    run = overlay(described(metadata, found.path), config)
    check_trusted(own_code(run), config.code, str(found.path))
    with Distributed.start(config.device, run.runtime.timeout) as distributed:
        set_up_process(run.runtime, distributed)
        source = open_split(run.data, config.split)
        check_held_out(run.data, config.split, metadata, found)
        classes = json.loads(metadata["classes"])
        if metadata.get("named") != "false" and set(source.classes) <= set(classes):
            source = align(source, classes)
        # Published weights do not name their classes, so only the number of classes can be compared.
        if source.classes != classes and (metadata.get("named") != "false" or len(classes) != len(source.classes)):
            raise UserError(
                f"The weights were trained on {len(classes)} classes ({', '.join(classes[:3])}, ...), but the data has "
                f"{len(source.classes)} ({', '.join(source.classes[:3])}, ...). Set root= to the matching data set."
            )
        size = image_shape(run.data.image_size)
        model = create_model(run.model, image_size=size, num_classes=len(classes))
        load_weights(model, weights)
        evaluation = build_evaluation(
            run, source, distributed, stream=sys.stderr, threads=adaptive_threads(run.runtime, distributed)
        )  # standard output is for the JSON only
        result = evaluation(model.to(distributed.device))
    if distributed.is_main and result is not None:
        outcome = {"split": config.split, **result.as_dict(), "weights": str(found.path), "data": source.describe()}
        output = Path(config.output) if config.output else default_output(found, config.split)
        write(outcome, output, required=bool(config.output))
        print(f"{describe(result, config.split)}; {found.description}", file=sys.stderr)


def open_split(data: DataConfig, split: str) -> "Source":
    """Open the split to evaluate; error messages name the settings of this command."""
    from moa_train.data.dataset import available_splits, create_dataset
    from moa_train.data.dataset import open_split as open_source

    splits, root = available_splits(data), create_dataset(data).root.absolute()
    if data.root and not root.is_dir():
        raise UserError(f"{root} does not exist. Set root= to the folder of the data set.")
    if split not in splits:
        hint = " For ImageNet, split=test evaluates the folder val/." if data.name == "imagenet" else ""
        where = f" in {root}" if data.root else ""
        raise UserError(f"split={split} does not exist: {data.name} has only {' and '.join(splits)}{where}.{hint}")
    try:
        return open_source(data, split)
    except UserError as error:  # the message names the key of moa-train
        raise UserError(str(error).replace("data.root", "root")) from error


def check_held_out(data: DataConfig, split: str, metadata: dict[str, str], found: "FoundWeights") -> None:
    """Check that a validation split was held out of the images that the weights were trained on.

    Raises:
        UserError: the training images have changed since then; the message says how.
    """
    from moa_train.assembly.validation import check_same_data, training_record
    from moa_train.data.dataset import open_split as open_source

    names = {"classes", "fingerprint", "counts"} & set(metadata)
    before: dict[str, Any] = {name: json.loads(metadata[name]) for name in names}
    if "fingerprint" not in before and found.checkpoint is not None:  # written by an older version
        before = found.checkpoint.state
    if split == "val" and data.val_fraction and "fingerprint" in before:
        remedy = "The split val is held out of these images. Restore them (root=FOLDER) or evaluate another split."
        limit = json.loads(metadata["config"])["data"].get("limit")
        check_same_data(before, training_record(open_source(replace(data, limit=limit), "train")), remedy)


def described(metadata: dict[str, str], path: Path) -> RunConfig:
    """Return the configuration stored in the header of a weights file."""
    if not {"config", "classes"} <= set(metadata):
        raise UserError(
            f"{path} has no configuration in its header, so it was not written by moa-train. Convert published MOA "
            "weights with moa-model convert."
        )
    try:
        values, classes = json.loads(metadata["config"]), json.loads(metadata["classes"])
    except ValueError as error:
        raise UserError(f"The header of {path} is damaged ({error}). Use another copy of the file.") from error
    if not isinstance(classes, list):
        raise UserError(f"The header of {path} is damaged: its classes are not a list. Use another copy of the file.")
    config: RunConfig = from_dict(values)
    return config


def overlay(run: RunConfig, config: EvalConfig) -> RunConfig:
    """Return the run's configuration with the settings of this command applied to it."""
    data = replace(run.data, limit=None, download=False)  # never download on behalf of a weights file
    if config.root:
        data.root = config.root
    if config.workers is not None:
        data.workers = config.workers
    engine = replace(run.engine, eval_batch_size=config.batch_size or run.engine.eval_batch_size)
    precision = config.precision or run.runtime.eval_precision
    return replace(run, data=data, engine=engine, runtime=replace(run.runtime, eval_precision=precision))


def default_output(found: "FoundWeights", split: str) -> Path:
    """Return the path of the result: in the run folder, or next to weights that are not in a run folder."""
    folder = (found.path if found.checkpoint is None else found.checkpoint.path).parent
    return (folder.parent if folder.name == "checkpoints" else folder) / f"eval-{split}.json"


def write(outcome: dict[str, Any], path: Path, required: bool) -> None:
    """Write the result as JSON and print it.

    Raises:
        UserError: the file cannot be written and is ``required``.
    """
    text = json.dumps(outcome, indent=2)
    try:
        path.write_text(text + "\n")
    except OSError as error:
        message = f"Cannot write the result to {path}: {error.strerror}. Choose another file with output=."
        print(text)
        if required:
            raise UserError(message) from error
        print(message, file=sys.stderr)
        return
    print(text)


def main() -> None:
    """Entry point."""
    app.run(evaluate, EvalConfig, "eval", EXAMPLES)


if __name__ == "__main__":
    main()
