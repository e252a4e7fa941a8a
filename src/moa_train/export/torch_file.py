"""Export with torch.export: a .pt2 file that torch loads without moa-train."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moa_train.export.subject import Runner, Subject, traced
from moa_train.runtime.files import write_flushed
from moa_train.schema import ExportConfig

RECORD = "moa-train.json"
"""Name of the extra file in the archive, with classes, preprocessing, test vectors, and so on."""


def check(config: ExportConfig) -> None:
    """Do nothing: torch is always installed."""


def write(subject: Subject, path: Path) -> dict[str, Any]:
    """Write the .pt2 file."""
    height, width = subject.preprocessing.size
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    with traced():
        program = torch.export.export(subject.model, (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
    record = subject.record(subject.model.run, subject.scores(subject.reference))
    values = {name: json.loads(value) for name, value in record.items()}
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={RECORD: json.dumps(values)})
    write_flushed(path, file.getvalue())
    return {}


def load(path: Path, config: ExportConfig) -> Runner:
    """Open the file with torch."""
    model = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = model(torch.from_numpy(images)).float().numpy()
            return logits

    return run
