"""Export to int8 for CPUs: static quantization of an ONNX file, released with its measured accuracy and speed.

The weights of convolutions and linear layers are quantized per channel, and their inputs per tensor, with ranges from
calibration images. Their outputs and everything else (attention, normalization, activation functions, sums) stay in
float, which costs little time and keeps the accuracy. The file is in QDQ form: pairs of QuantizeLinear and
DequantizeLinear nodes, which ONNX Runtime fuses with the layers.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moa_train.data.source import Source
from moa_train.export import onnx_file, speed
from moa_train.export.subject import Subject, as_input, draw, name_of
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_flushed

LAYERS = ("Conv", "Gemm", "MatMul")
RANKING_IMAGES = 32
"""Calibration images on which the effect of every single layer is measured."""

check = onnx_file.check
load = onnx_file.load


def write(subject: Subject, path: Path) -> dict[str, Any]:
    """Write the quantized ONNX file.

    Raises:
        UserError: there are too few calibration images, or the accuracy cannot be kept.
    """
    config = subject.config
    source = calibration_source(subject)
    model = onnx_file.to_onnx(subject)
    fp32_session = onnx_file.session(model.SerializeToString())
    logits = subject.logits(onnx_file.runner(fp32_session), "evaluating fp32")
    subject.agreement(logits)
    with TemporaryDirectory() as folder:
        quantizer = Quantizer(model, Path(folder), subject, source)
        quantized, floats, accuracy = search(quantizer, logits)
    int8_session = onnx_file.session(quantized.SerializeToString())
    cases = [
        speed.compare(fp32_session, int8_session, subject.examples, size, config.rounds) for size in config.batch_sizes
    ]
    reasons = {
        case["batch_size"]: speed.reason(quantized, speed.repeated(subject.examples, case["batch_size"]))
        for case in cases
        if case["ratio_quartiles"][0] <= 1
    }
    measured = {"cpu": speed.cpu(), "threads": torch.get_num_threads(), "cases": cases}
    report = {
        "accuracy": accuracy,
        "speed": measured,
        "int8_layers": len(quantizer.nodes) - len(floats),
        "float_layers": floats,
        "calibration": {
            "source": source.title,
            "seed": config.seed,
            "images": [name_of(source, index) for index in range(len(source))],
        },
        "notes": notes(accuracy, measured, reasons),
    }
    int8 = onnx_file.runner(int8_session)
    onnx_file.describe(quantized, {**subject.record(int8, accuracy["int8"]), "quantization": json.dumps(report)})
    write_flushed(path, quantized.SerializeToString())
    if not np.array_equal(load(path, config)(subject.examples), int8(subject.examples)):
        raise UserError("The quantized file does not compute the same logits after writing it. Nothing was written.")
    return report


def calibration_source(subject: Subject) -> Source:
    """Return the training images that determine the ranges of activations.

    Raises:
        UserError: there are too few.
    """
    config = subject.config
    train = subject.trained.open_split("train", config.root, config.workers)
    if len(train) < config.calibration:
        raise UserError(
            f"calibration={config.calibration}: the training split has only {len(train)} images. Set calibration="
            f"{len(train)} or less, or set root= to the complete data set."
        )
    return draw(train, config.calibration, config.seed)


class Quantizer:
    """Quantize a model with any set of layers left in float. The calibration images are processed once.

    Attributes:
        nodes: names of the nodes that can be quantized: convolutions and products with constant weights.
    """

    def __init__(self, model: Any, folder: Path, subject: Subject, source: Source) -> None:
        self.subject, self.folder = subject, folder
        constants = {value.name for value in model.graph.initializer}
        self.nodes = [
            node.name for node in model.graph.node if node.op_type in LAYERS and set(node.input[1:2]) <= constants
        ]
        if not self.nodes:
            raise UserError(f"The model has no layers that can be quantized ({', '.join(LAYERS)}). Use format=onnx.")
        self.images = [as_input(batch.images) for batch in subject.batches("calibrating", source)]
        self._source, self._cache = folder / "fp32.onnx", folder / "ranges.json"
        # The exporter has already folded constants and inferred shapes; without this entry, the library asks for it.
        model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
        self._source.write_bytes(model.SerializeToString())
        del model.metadata_props[:]

    def __call__(self, floats: Sequence[str]) -> Any:
        """Return the model (``onnx.ModelProto``) with the named nodes left in float."""
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        target = self.folder / "int8.onnx"
        quantize_static(
            self._source,
            target,
            Reader(self.images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            per_channel=True,
            reduce_range=self.subject.config.reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(floats),
            calibration_cache_path=self._cache,
            extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": list(LAYERS)},
        )
        return onnx.load(target)

    def rank(self) -> list[str]:
        """Return the nodes, sorted by the effect that quantizing only this node has on the logits, largest first."""
        images = np.concatenate(self.images)[:RANKING_IMAGES]
        exact = onnx_file.load(self._source, self.subject.config)(images)
        effects = {}
        for place, name in enumerate(self.nodes, start=1):
            model = self([other for other in self.nodes if other != name])
            logits = onnx_file.runner(onnx_file.session(model.SerializeToString()))(images)
            effects[name] = float(np.square(logits - exact).mean())
            self.subject.stream.write(f"effect of layer {place} of {len(self.nodes)}: {effects[name]:.3g}  {name}\n")
        return sorted(effects, key=lambda name: -effects[name])


class Reader:
    """Batches of calibration images, in the form that ONNX Runtime asks for."""

    def __init__(self, images: Sequence[NDArray[np.uint8]]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """Return the next batch."""
        images = next(self._images, None)
        return None if images is None else {"images": images}


def search(quantizer: Quantizer, fp32: NDArray[np.float32]) -> tuple[Any, list[str], dict[str, Any]]:
    """Leave 0, 1, 2, 4, 8, ... of the most sensitive layers in float until the accuracy is kept.

    Returns:
        The model, the names of the layers that stay in float, and the accuracy.

    Raises:
        UserError: the accuracy is not kept even with all but a few layers in float.
    """
    subject, nodes = quantizer.subject, quantizer.nodes
    limit, ranking, count, tries = subject.config.max_drop, list[str](), 0, []
    while count < len(nodes):
        floats = ranking[:count]
        model = quantizer(floats)
        run = onnx_file.runner(onnx_file.session(model.SerializeToString()))
        logits = subject.logits(run, f"evaluating int8, {count} layers in float")
        found = compare_accuracy(subject, fp32, logits)
        tries.append({"float_layers": count, "drop": found["drop"]})
        subject.stream.write(f"{count} of {len(nodes)} layers in float: drop {found['drop']:.2f} points\n")
        if found["drop"] <= limit:
            return model, floats, {**found, "max_drop": limit, "tries": tries}
        ranking = ranking or quantizer.rank()
        count = 2 * count or 1
    drops = ", ".join(f"{entry['drop']:.2f} ({entry['float_layers']})" for entry in tries)
    raise UserError(
        f"max_drop={limit}: quantization loses more top-1 accuracy. Drop in points, with the number of layers in "
        f"float: {drops}; the model has {len(nodes)}. Increase max_drop or calibration, or use format=onnx."
    )


def compare_accuracy(subject: Subject, fp32: NDArray[np.float32], int8: NDArray[np.float32]) -> dict[str, Any]:
    """Return the accuracy of both models, and the drop of top-1 accuracy in points with its 95% interval."""
    before, after = subject.ranks(fp32) < 1, subject.ranks(int8) < 1
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    low, high = paired_interval(lost, gained, len(before))
    return {
        "fp32": subject.scores(fp32),
        "int8": subject.scores(int8),
        "lost": lost,
        "gained": gained,
        "drop": 100 * (lost - gained) / len(before),
        "drop_interval_95": [100 * low, 100 * high],
    }


def paired_interval(lost: int, gained: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of the difference between two proportions that were measured on the same images.

    This is the Wald interval after adding 1/2 to each of the four cells (Agresti and Min, Statistics in Medicine 24,
    2005), which also holds for few differences.
    """
    b, c, n = lost + 0.5, gained + 0.5, total + 2
    middle, error = (b - c) / n, math.sqrt(b + c - (b - c) ** 2 / n) / n
    return middle - 1.96 * error, middle + 1.96 * error


def notes(accuracy: dict[str, Any], speed: dict[str, Any], reasons: dict[int, str]) -> list[str]:
    """Return what a user should know about accuracy and speed, in sentences.

    Args:
        accuracy: the result of `search`.
        speed: the measured speed.
        reasons: batch sizes at which int8 is not clearly faster, and why.
    """
    low, high = (round(bound, 2) + 0.0 for bound in accuracy["drop_interval_95"])  # + 0.0: not "-0.00"
    int8, fp32 = accuracy["int8"], accuracy["fp32"]
    return [
        f"top-1 {int8['top1']:.2f}% instead of {fp32['top1']:.2f}% on the same {int8['total']} {int8['split']} images: "
        f"drop {accuracy['drop']:.2f} points, 95% interval [{low:.2f}, {high:.2f}]",
        *(
            f"batch size {case['batch_size']}: {case['ratio']:.2f} times as fast as fp32 (quartiles "
            f"{case['ratio_quartiles'][0]:.2f} to {case['ratio_quartiles'][1]:.2f}, n = {case['rounds']}), "
            f"{case['int8_ms']:.2f} instead of {case['fp32_ms']:.2f} ms"
            for case in speed["cases"]
        ),
        *(f"int8 is not clearly faster at batch size {size}: {reason}" for size, reason in reasons.items()),
    ]
