"""int8 files come with their accuracy and speed, and keep sensitive layers in float."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moa_train.assembly.trained import Trained
from moa_train.engine.tensorfile import write_tensors
from moa_train.export import speed
from moa_train.export.int8_file import paired_interval
from moa_train.runtime.errors import UserError

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def answers(path: Path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path)).run(None, {"images": images})[0].argmax(1)


def test_the_report_counts_what_the_file_answers(exported, learned, logged):
    """The counts are repeated from the two files alone."""
    path, report = exported("int8")
    source = Trained.open(learned).open_split("test")
    images = source.gather(np.arange(len(source))).permute(0, 2, 3, 1).contiguous().numpy()
    fp32, int8 = (answers(file, images) == source.labels for file in (exported("onnx")[0], path))
    accuracy = report["accuracy"]
    assert accuracy["fp32"]["top1_count"] == fp32.sum() == logged["top1_count"]
    assert accuracy["int8"]["top1_count"] == int8.sum()
    assert (accuracy["lost"], accuracy["gained"]) == ((fp32 & ~int8).sum(), (int8 & ~fp32).sum())
    assert accuracy["drop"] == pytest.approx(100 * (fp32.mean() - int8.mean()))
    low, high = accuracy["drop_interval_95"]
    assert low < accuracy["drop"] < high
    assert report["bytes"] < 0.6 * exported("onnx")[1]["bytes"]


def test_the_file_contains_its_measurements_and_calibration_images(exported, learned):
    path, report = exported("int8")
    record = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    assert json.loads(record["quantization"]) == {name: report[name] for name in json.loads(record["quantization"])}
    assert json.loads(record["evaluation"]) == report["accuracy"]["int8"]
    images = report["calibration"]["images"]
    train = Trained.open(learned).open_split("train")
    assert len(set(images)) == 32
    assert set(images) <= {train.name(index) for index in range(len(train))}
    assert {"classes", "preprocessing", "test_vectors", "provenance"} <= set(record)


def test_weights_of_all_convolutions_are_int8(exported):
    """Also those that the model keeps as matrices and reshapes."""
    graph = onnx.load(exported("int8")[0]).graph
    initializers = {each.name: each for each in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) >= 6
    for node in convolutions:
        weight = producers[node.input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert initializers[weight.input[0]].data_type == onnx.TensorProto.INT8


def test_speed_is_a_median_of_alternating_rounds(exported):
    measured = exported("int8")[1]["speed"]
    assert [case["batch_size"] for case in measured["cases"]] == [1, 16]
    for case in measured["cases"]:
        low, high = case["ratio_quartiles"]
        assert 0 < low <= case["ratio"] <= high
        assert case["rounds"] == 5


def test_a_slow_case_is_explained(exported):
    path, report = exported("int8")
    slow = [case["batch_size"] for case in report["speed"]["cases"] if case["ratio_quartiles"][0] <= 1]
    noted = [note for note in report["notes"] if note.startswith("int8 is not clearly faster at batch size")]
    assert len(noted) == len(slow)
    images = np.zeros((4, 32, 32, 3), np.uint8)
    times = speed.profile(onnx.load(path), images)
    assert times["MatMulIntegerToFloat"] > 0, "ONNX Runtime does not run the products in int8"
    reason = speed.reason(onnx.load(path), images)
    assert "of its time in int8 kernels; the rest is " in reason


def test_the_interval_covers_the_true_difference():
    """Simulated: two models that disagree on 5% of the images, and differ by 2 points."""
    random, n, probabilities = np.random.default_rng(0), 400, [0.035, 0.015, 0.95]
    counts = random.multinomial(n, probabilities, 4000)
    intervals = np.array([paired_interval(lost, gained, n) for lost, gained, _ in counts])
    covered = ((intervals[:, 0] <= 0.02) & (intervals[:, 1] >= 0.02)).mean()
    assert 0.94 < covered < 0.97
    assert paired_interval(5, 3, 100)[1] == pytest.approx(-paired_interval(3, 5, 100)[0])


def sensitive(best, path: Path) -> str:
    """Write weights of the same function with a layer that does not survive int8, and return the layer's name.

    One input channel of the layer becomes a thousand times larger, and its weights a thousand times smaller. The range
    of the layer's inputs then leaves no steps for the other channels.
    """
    weights, header = best
    weights = dict(weights)
    norm, layer = "layers.0.downsample.norm", "layers.0.downsample.reduction"
    channel = int(weights[f"{layer}.weight"].abs().sum(0).argmin())
    scale = torch.ones(weights[f"{norm}.weight"].shape)
    scale[channel] = 1000
    for name in ("weight", "bias"):
        weights[f"{norm}.{name}"] = weights[f"{norm}.{name}"] * scale
    weights[f"{layer}.weight"] = weights[f"{layer}.weight"] / scale
    write_tensors(path, weights, header)
    return layer


def test_a_sensitive_layer_stays_in_float(best, export, tmp_path):
    layer = sensitive(best, tmp_path / "x.safetensors")
    settings = {"calibration": 32, "rounds": 3, "batch_sizes": [1], "format": "int8"}
    report = export(ckpt=tmp_path / "x.safetensors", output=tmp_path / "loose.onnx", max_drop=100, **settings)
    assert report["float_layers"] == []
    drop = report["accuracy"]["drop"]
    assert drop > 3
    report = export(ckpt=tmp_path / "x.safetensors", output=tmp_path / "tight.onnx", max_drop=drop / 2, **settings)
    assert report["float_layers"] == [f"{layer}/MatMul"]
    assert report["accuracy"]["tries"][0]["drop"] == drop
    assert report["accuracy"]["drop"] <= drop / 2
    kinds = {node.name: node.op_type for node in onnx.load(tmp_path / "tight.onnx").graph.node}
    assert kinds[f"{layer}/MatMul"] == "MatMul"


def test_too_few_calibration_images(learned, export, tmp_path):
    with pytest.raises(
        UserError, match=r"calibration=5000: the training split has only \d+ images\. Set calibration=\d+"
    ):
        export(ckpt=learned, format="int8", output=tmp_path / "x", calibration=5000)
    assert not list(tmp_path.iterdir())
