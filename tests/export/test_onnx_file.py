"""ONNX files agree with the checkpoint, and the script of the documentation runs them without moa-train and torch."""

import json
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moa_train.assembly.trained import Trained
from moa_train.data.augment import Normalize
from moa_train.data.image import Decoding, EncodedImage
from moa_train.data.view import CenterCrop
from moa_train.engine.tensorfile import write_tensors
from moa_train.runtime.errors import UserError

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """The script of docs/EXPORT.md, as a file."""
    section = (ROOT / "docs" / "EXPORT.md").read_text().partition("## Run an ONNX file")[2]
    code = re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1]
    path = tmp_path_factory.mktemp("script") / "classify.py"
    path.write_text(code)
    return path


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A folder with the installed onnxruntime, numpy and Pillow, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    for package in ("onnxruntime", "numpy", "PIL"):
        place = Path(find_spec(package).origin).parent
        (folder / package).symlink_to(place)
        for libraries in place.parent.glob(f"{ {'PIL': 'pillow'}.get(package, package) }.libs"):
            (folder / libraries.name).symlink_to(libraries)
    return folder


def alone(folder: Path, code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in isolation (-I) and without site-packages (-S), except for those in a folder."""
    start = f"import sys; sys.path.insert(0, {str(folder)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", start, *map(str, arguments)], capture_output=True, text=True
    )


def test_right_answers_are_those_logged_in_training(exported, logged):
    report = exported("onnx")[1]
    assert report["agreement"]["top1_count"] == logged["top1_count"]
    assert report["agreement"]["total"] == logged["total"]
    assert report["agreement"]["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert 0 <= report["agreement"]["largest_difference"] < 1e-4


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_any_batch_size(exported, learned, batch_size):
    session = onnxruntime.InferenceSession(str(exported("onnx")[0]))
    images = np.random.default_rng(0).integers(0, 256, (batch_size, 32, 32, 3), dtype=np.uint8)
    trained = Trained.open(learned)
    with torch.no_grad():
        normal = Normalize.of(trained.config.data)(torch.from_numpy(images).permute(0, 3, 1, 2))
        expected = trained.build().eval()(normal)
    (logits,) = session.run(None, {"images": images})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


def test_the_file_is_valid_and_has_names_but_no_paths(exported, learned):
    path = exported("onnx")[0]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    modules = {name for name, _ in Trained.open(learned).build().named_modules()}
    products = [name.rpartition("/")[0] for name in names if name.split("/")[-1].startswith("MatMul")]
    assert products
    assert set(products) <= modules
    assert b"site-packages" not in path.read_bytes()
    assert str(ROOT / "src").encode() not in path.read_bytes()


def test_the_script_of_the_documentation_runs_without_moa_train_and_torch(exported, script, bare, learned, tmp_path):
    for module in ("torch", "moa_train", "onnx"):
        assert "ModuleNotFoundError" in alone(bare, f"import {module}").stderr
    if (probe := alone(bare, "import onnxruntime, numpy, PIL")).returncode:
        pytest.skip(f"onnxruntime does not run from copied folders here: {probe.stderr.splitlines()[-1]}")
    source = Trained.open(learned).open_split("test")
    files = []
    for number in range(5):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(source.gather(np.array([number]))[0].permute(1, 2, 0).numpy()).save(files[-1])
    path = exported("onnx")[0]
    run = "import runpy; sys.argv[0] = sys.argv.pop(1); runpy.run_path(sys.argv[0])"
    done = alone(bare, run, script, path, *files)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert float(first.removeprefix("test vectors: largest difference ")) < 1e-4
    logits = onnxruntime.InferenceSession(str(path)).run(
        None, {"images": source.gather(np.arange(5)).permute(0, 2, 3, 1).contiguous().numpy()}
    )[0]
    assert rest == [f"{file} {source.classes[label]}" for file, label in zip(files, logits.argmax(1), strict=True)]


def test_the_script_fits_on_a_screen(script):
    assert len([line for line in script.read_text().splitlines() if line.strip()]) <= 24


@pytest.fixture(scope="module", params=[None, [0, 4095]], ids=["", "range"])
def of_files(best, export, make_classes, tmp_path_factory, request) -> tuple[Path, Decoding]:
    """The ONNX file of a model that was trained on image files, whose evaluation crops images, and their decoding."""
    folder, (weights, header) = tmp_path_factory.mktemp("files"), best
    config = json.loads(header["config"])
    config["data"] |= {"name": "folder", "root": str(make_classes(10)), "val_fraction": 0.0, "eval_crop": 0.8}
    config["data"]["range"] = request.param
    classes = json.dumps([f"class{number}" for number in range(10)])
    write_tensors(
        folder / "x.safetensors",
        weights,
        header | {"config": json.dumps(config), "classes": classes, "in_memory": "false"},
    )
    export(ckpt=folder / "x.safetensors", output=folder / "x.onnx", images=20)
    return folder / "x.onnx", Decoding(value_range=request.param)


@pytest.mark.parametrize(
    ("shape", "levels"),
    [((50, 90, 3), np.uint8), ((90, 50, 3), np.uint8), ((33, 400, 3), np.uint8), ((50, 90), np.uint16)],
)
def test_the_script_resizes_and_crops_as_an_evaluation(of_files, script, tmp_path, shape, levels, monkeypatch):
    """The filters of Pillow and of moa-train differ only by rounding."""
    path, decoding = of_files
    white = decoding.value_range[1] if decoding.value_range and levels == np.uint16 else np.iinfo(levels).max
    pixels = np.random.default_rng(1).integers(0, white, shape, dtype=levels, endpoint=True)
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(tmp_path / "x.png")
    monkeypatch.setattr(sys, "argv", ["classify.py", str(path), str(tmp_path / "x.png")])
    ours = np.asarray(runpy.run_path(str(script))["image"]).astype(int)
    view = CenterCrop((32, 32), 0.8)
    theirs = view(EncodedImage.of(tmp_path / "x.png", decoding), np.empty(0)).permute(1, 2, 0).numpy().astype(int)
    assert ours.shape == (32, 32, 3)
    assert abs(ours - theirs).max() <= 1


def test_a_missing_library_is_named(learned, export, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"format=onnx requires onnxscript, which is not installed\. Run: pip install"):
        export(ckpt=learned, output=tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"format=int8 requires onnxscript and onnxruntime, which are not installed"):
        export(ckpt=learned, format="int8", output=tmp_path / "x.onnx")
