"""Export to ONNX: one file with the model, its preprocessing, class names, and test vectors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moa_train.export.subject import Runner, Subject, traced
from moa_train.runtime.files import write_flushed
from moa_train.runtime.libraries import require
from moa_train.schema import ExportConfig

LARGE = 2**40
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def check(config: ExportConfig) -> None:
    """Raise `UserError` if a library is missing."""
    require(f"format={config.format}", LIBRARIES, "export")


def write(subject: Subject, path: Path) -> dict[str, Any]:
    """Write the ONNX file."""
    model = to_onnx(subject)
    describe(model, subject.record(subject.model.run, subject.scores(subject.reference)))
    write_flushed(path, model.SerializeToString())
    return {}


def load(path: Path, config: ExportConfig) -> Runner:
    """Open the file with ONNX Runtime."""
    return runner(session(path.read_bytes()))


def to_onnx(subject: Subject) -> Any:
    """Return the model as an ``onnx.ModelProto`` without metadata. The batch size is dynamic.

    Nodes are named after the modules that they belong to.
    """
    from onnxscript import optimizer

    height, width = subject.preprocessing.size
    example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    with traced():
        program = torch.onnx.export(
            subject.model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    # Kernels that are reshaped weights become constants of any size, which quantization requires.
    model = optimizer.optimize(program.model_proto, input_size_limit=LARGE, output_size_limit=LARGE)
    rename(model.graph)
    return model


def rename(graph: Any) -> None:
    """Name nodes after their modules, and remove all other records of the source code, such as paths of files."""
    taken: set[str] = set()
    for node in graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
        # The list ends with the module and the operation, as in ['', 'model', 'model.head', 'linear'].
        modules = [scope for scope in json.loads(scopes.replace("'", '"') or "[]")[:-1] if scope]
        name = modules[-1].removeprefix("model.") if modules else ""
        node.name = f"{name}/{node.op_type}" if name else node.op_type
        while node.name in taken:
            node.name += "'"
        taken.add(node.name)
        del node.metadata_props[:]
    for value in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del value.metadata_props[:]
    del graph.metadata_props[:]


def describe(model: Any, record: Mapping[str, str]) -> None:
    """Store the record in the metadata of the model, which ONNX Runtime returns as ``custom_metadata_map``."""
    del model.metadata_props[:]
    for name, value in record.items():
        model.metadata_props.add(key=name, value=value)
    model.producer_name = "moa-train"


def session(data: bytes, profile: Path | None = None) -> Any:
    """Return an inference session on the CPU, with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def runner(opened: Any) -> Runner:
    """Return the function that a session computes."""

    def run(images: np.ndarray) -> np.ndarray:
        logits: np.ndarray = opened.run(["logits"], {"images": images})[0]
        return logits

    return run
