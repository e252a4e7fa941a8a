"""One export: check the settings, write to a temporary path, compare with the checkpoint, and move into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import torch

from moa_train.assembly.process import set_up_process
from moa_train.assembly.trained import Trained
from moa_train.export.subject import VECTORS, Subject, draw
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.schema import ExportConfig, RunConfig

FORMATS = {
    "onnx": ("onnx_file", "model.onnx"),
    "int8": ("int8_file", "model-int8.onnx"),
    "torch_export": ("torch_file", "model.pt2"),
    "safetensors": ("weights_file", "model.safetensors"),
    "hub": ("hub_folder", "hub"),
}
"""The module of each format, and the default name of its file or folder."""


def export(config: ExportConfig, stream: TextIO) -> dict[str, Any]:
    """Export weights and return a report in JSON types. Progress and a summary are written to ``stream``.

    Raises:
        UserError: a setting, a library or the data is missing, the output exists or cannot be written, or the exported
            file does not agree with the checkpoint. Nothing remains at the output's path.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("moa-export runs as one process. Start it without torchrun.")
    module, name = FORMATS[config.format]
    form = import_module(f"moa_train.export.{module}")
    form.check(config)
    trained = Trained.open(config.place(), weights=config.weights, code=config.code)
    output = Path(config.output) if config.output else trained.folder / "export" / name
    check_output(output, make_parent=not config.output)
    run = overlay(trained.config, config)
    set_up_process(run.runtime, Distributed(torch.device("cpu")))
    source = draw(trained.open_split(config.split, config.root, config.workers), config.images, config.seed)
    if len(source) < VECTORS:
        raise UserError(
            f"split={config.split} has only {len(source)} images; an export is checked on at least {VECTORS}."
        )
    subject = Subject(config, trained, run, source, stream)
    with staged(output) as temporary:
        report = form.write(subject, temporary)
        if "accuracy" not in report:  # int8 measures its difference from fp32 itself
            logits = subject.logits(form.load(temporary, config), "checking the exported file")
            report["agreement"] = subject.agreement(logits)
    size = sum(path.stat().st_size for path in (output.rglob("*") if output.is_dir() else [output]))
    report = {"output": str(output), "format": config.format, "bytes": size, **report}
    stream.write(f"wrote {output}, {size / 2**20:.1f} MiB; {summary(report)}\n")
    return report


def overlay(run: RunConfig, config: ExportConfig) -> RunConfig:
    """Return the run's configuration with the settings of this command applied to it."""
    data = replace(run.data, workers=run.data.workers if config.workers is None else config.workers)
    engine = replace(run.engine, eval_batch_size=config.batch_size or run.engine.eval_batch_size)
    return replace(run, data=data, engine=engine, runtime=replace(run.runtime, threads=config.threads))


def check_output(output: Path, make_parent: bool) -> None:
    """Raise `UserError` if the output exists or its folder does not."""
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists already. Remove it, or choose another path with output=.")
    try:
        if make_parent:
            output.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{output.parent} cannot be created: {error.strerror}. Choose another path with output=."
        ) from error
    if not output.parent.is_dir():
        raise UserError(f"output={output}: there is no folder {output.parent}. Create it first.")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Provide a temporary path next to ``output`` that becomes ``output`` if the block succeeds.

    Raises:
        UserError: the disk is full, or another problem of the file system.
    """
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.rename(output)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written: {error.strerror or error}. Free some space or fix the permissions, or choose "
            "another path."
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def summary(report: dict[str, Any]) -> str:
    """Return the result of the checks in one line."""
    if "accuracy" in report:
        return "; ".join(report["notes"])
    found = report["agreement"]
    return (
        f"{found['top1_count']} of {found['total']} {found['split']} images are classified correctly, as by the "
        f"checkpoint ({found['top1']:.2f}%); largest difference between logits: {found['largest_difference']:.2g}"
    )
