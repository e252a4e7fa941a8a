"""Export to one safetensors file that moa-eval and init= read: weights, configuration, classes and preprocessing."""

from pathlib import Path
from typing import Any

from moa_train.assembly.trained import Trained
from moa_train.engine.tensorfile import write_tensors
from moa_train.export.subject import Deployed, Runner, Subject
from moa_train.schema import ExportConfig


def check(config: ExportConfig) -> None:
    """Do nothing: safetensors is always installed."""


def write(subject: Subject, path: Path) -> dict[str, Any]:
    """Write the file. Its header keeps the entries of the checkpoint's header."""
    write_tensors(path, subject.trained.weights, header(subject))
    return {}


def header(subject: Subject) -> dict[str, str]:
    """Return the header of the weights file."""
    record = subject.record(subject.model.run, subject.scores(subject.reference))
    return {**subject.trained.metadata, **record}  # in this order, because the weights may be an earlier export


def load(path: Path, config: ExportConfig) -> Runner:
    """Open the file as moa-eval does."""
    trained = Trained.open(path, code=config.code)
    return Deployed(trained.build(), trained.config.data).run
