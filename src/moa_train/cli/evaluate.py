"""moa-eval: evaluate weights, which know their own model and data."""

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

EXAMPLES = """moa-eval: accuracy and loss of trained weights, by exact counts.

  moa-eval ckpt=outputs/RUN                              the best checkpoint of a run, else the newest
  moa-eval ckpt=outputs/RUN/checkpoints/last split=val
  moa-eval ckpt=weights.safetensors root=/data/imagenet
  torchrun --nproc-per-node 2 -m moa_train.cli.evaluate ckpt=outputs/RUN

The result goes to standard output and into a file, as JSON."""


def evaluate(config: EvalConfig, overrides: list[str]) -> None:
    """Evaluate, print and write the result."""
    if not config.ckpt:
        raise UserError("moa-eval needs ckpt=PATH: a run folder, a checkpoint folder or a .safetensors file.")
    if config.output and not Path(config.output).parent.is_dir():
        raise UserError(f"output={config.output}: there is no folder {Path(config.output).parent}.")
    from moa_train.assembly.evaluation import build_evaluation
    from moa_train.assembly.outcome import describe
    from moa_train.assembly.process import set_up_process
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
        print(reproduce(json.loads(metadata.get("origin", "[]"))) or f"{found.path} does not say what made it.")
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
        # Published weights do not name their classes: then their number has to do.
        if source.classes != classes and (metadata.get("named") != "false" or len(classes) != len(source.classes)):
            raise UserError(
                f"The weights know {len(classes)} classes ({', '.join(classes[:3])}, ...), the data has "
                f"{len(source.classes)} ({', '.join(source.classes[:3])}, ...). Set root= to the data they belong to."
            )
        size = image_shape(run.data.image_size)
        model = create_model(run.model, image_size=size, num_classes=len(classes))
        load_weights(model, weights)
        evaluation = build_evaluation(run, source, distributed, stream=sys.stderr)  # standard output is JSON alone
        result = evaluation(model.to(distributed.device))
    if distributed.is_main and result is not None:
        outcome = {"split": config.split, **result.as_dict(), "weights": str(found.path), "data": source.describe()}
        output = Path(config.output) if config.output else default_output(found, config.split)
        write(outcome, output, required=bool(config.output))
        print(f"{describe(result, config.split)}; {found.description}", file=sys.stderr)


def open_split(data: DataConfig, split: str) -> "Source":
    """Open the split to evaluate, with the messages of this command."""
    from moa_train.data.dataset import available_splits, create_dataset
    from moa_train.data.dataset import open_split as open_source

    splits, root = available_splits(data), create_dataset(data).root.absolute()
    if data.root and not root.is_dir():
        raise UserError(f"{root}: there is no such folder. Set root= to the folder of the data set.")
    if split not in splits:
        hint = " (its folder val/, the benchmark's, is split=test)" if data.name == "imagenet" else ""
        where = f" in {root}" if data.root else ""
        raise UserError(f"split={split}: {data.name} has only {' and '.join(splits)}{where}{hint}.")
    try:
        return open_source(data, split)
    except UserError as error:  # they are written for moa-train, where the key is a longer one
        raise UserError(str(error).replace("data.root", "root")) from error


def check_held_out(data: DataConfig, split: str, metadata: dict[str, str], found: "FoundWeights") -> None:
    """Check that a validation split is held out of the images that the weights were trained on.

    Raises:
        UserError: the training images have changed since, and how.
    """
    from moa_train.assembly.validation import check_same_data, training_record
    from moa_train.data.dataset import open_split as open_source

    names = {"classes", "fingerprint", "counts"} & set(metadata)
    before: dict[str, Any] = {name: json.loads(metadata[name]) for name in names}
    if "fingerprint" not in before and found.checkpoint is not None:  # of an older version
        before = found.checkpoint.state
    if split == "val" and data.val_fraction and "fingerprint" in before:
        remedy = "The split val is held out of them: restore them (root=FOLDER), or evaluate another split."
        limit = json.loads(metadata["config"])["data"].get("limit")
        check_same_data(before, training_record(open_source(replace(data, limit=limit), "train")), remedy)


def described(metadata: dict[str, str], path: Path) -> RunConfig:
    """Return the configuration that a weights file carries in its header."""
    if not {"config", "classes"} <= set(metadata):
        raise UserError(
            f"{path} does not say what model it belongs to (no configuration in its header): it was not written by "
            "moa-train. Convert published MOA weights with moa-model convert."
        )
    try:
        values, classes = json.loads(metadata["config"]), json.loads(metadata["classes"])
    except ValueError as error:
        raise UserError(f"{path}: its header is not what moa-train writes ({error}).") from error
    if not isinstance(classes, list):
        raise UserError(f"{path}: the classes in its header are no list.")
    config: RunConfig = from_dict(values)
    return config


def overlay(run: RunConfig, config: EvalConfig) -> RunConfig:
    """Lay the command's few options over the run's configuration."""
    data = replace(run.data, limit=None, download=False)  # weights may be anybody's: nothing is fetched for them
    if config.root:
        data.root = config.root
    if config.workers is not None:
        data.workers = config.workers
    engine = replace(run.engine, eval_batch_size=config.batch_size or run.engine.eval_batch_size)
    precision = config.precision or run.runtime.eval_precision
    return replace(run, data=data, engine=engine, runtime=replace(run.runtime, eval_precision=precision))


def default_output(found: "FoundWeights", split: str) -> Path:
    """Return where the result goes: into the run's folder, or beside what was moved out of one."""
    folder = (found.path if found.checkpoint is None else found.checkpoint.path).parent
    return (folder.parent if folder.name == "checkpoints" else folder) / f"eval-{split}.json"


def write(outcome: dict[str, Any], path: Path, required: bool) -> None:
    """Write the result as JSON and print it.

    Raises:
        UserError: the file cannot be written, and the user asked for it.
    """
    text = json.dumps(outcome, indent=2)
    try:
        path.write_text(text + "\n")
    except OSError as error:
        message = f"The result cannot be written to {path}: {error.strerror}. Choose another file with output=."
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
