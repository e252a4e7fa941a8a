"""moa-predict and moa_train.load compute exactly what an evaluation computes, and survive all kinds of input."""

import contextlib
import csv
import fcntl
import io
import json
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import moa_train
from moa_train.assembly.evaluation import build_evaluation
from moa_train.assembly.trained import Trained
from moa_train.cli.predict import _Explainer, predict
from moa_train.data.image import Decoding
from moa_train.data.paths import find_images
from moa_train.engine.predictions import Recorder
from moa_train.engine.tensorfile import read_tensors, write_tensors
from moa_train.report.rows import open_rows
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.schema import PredictConfig

HOSTILE = ['<b onload="x">', 'say "hi", it\'s', "a\x1b[31mred\nline\u202etext", "=1+2", "$x^2$"]


def evaluated(run_dir: Path) -> np.ndarray:
    """The logits of all test images, from the evaluation itself."""
    trained, recorder = Trained.open(run_dir), Recorder()
    with Distributed.start("cpu", 60.0) as distributed:
        source = trained.open_split("test")
        build_evaluation(trained.config, source, distributed, stream=io.StringIO(), record=recorder)(trained.build())
        return recorder.gather(distributed).logits


@pytest.fixture(scope="module")
def tree(make_classes) -> Path:
    root = make_classes(3)
    for number, path in enumerate(sorted((root / "test").rglob("*.png"))):  # photographs of various sizes
        image = Image.open(path)
        size = (image.width * (3 + number % 4), image.height * (3 + number % 3))
        image.resize(size, Image.Resampling.BICUBIC).convert("RGB").save(path.with_suffix(".jpg"))
        path.unlink()
    return root


@pytest.fixture(scope="module")
def folders(train, tree, tmp_path_factory) -> Path:
    """A run that was trained on image files of various sizes."""
    run_dir = tmp_path_factory.mktemp("folders") / "run"
    changes = {"data.name": "folder", "data.root": tree, "data.val_fraction": 0, "data.workers": 0}
    assert train(run_dir, **changes, **{"engine.batch_size": 8, "schedule.duration": "2 steps"}) == 0
    return run_dir


def run(capsys, **options) -> tuple[int, str, str]:
    threads = torch.get_num_threads()
    try:
        code = predict(PredictConfig(**{"device": "cpu", "workers": 0, **options}), [])
    finally:
        torch.set_deterministic_debug_mode("default")
        torch.set_num_threads(threads)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("processes", [0, 2])
def test_logits_of_files_are_those_of_an_evaluation_bit_for_bit(folders, tree, processes):
    paths = [str(path) for path in sorted((tree / "test").rglob("*.jpg"))]
    expected = evaluated(folders)
    batches = list(moa_train.load(folders, device="cpu").batches(paths, processes=processes))
    assert [path for batch in batches for path in batch.paths] == paths
    assert np.array_equal(torch.cat([batch.logits for batch in batches]).numpy(), expected)
    assert np.array_equal(moa_train.load(folders, device="cpu").logits(paths).numpy(), expected)


def test_logits_of_images_in_memory_are_those_of_their_files(straight, tmp_path):
    """An evaluation does not crop images in memory, such as CIFAR's, so predictions for their files do not either."""
    source, expected = Trained.open(straight).open_split("test"), evaluated(straight)
    native = source.images[source.rows]  # 8 x 8, gray
    paths = []
    for number, image in enumerate(native):
        paths.append(tmp_path / f"{number:04}.png")
        Image.fromarray(image[0]).save(paths[-1])
    predictor = moa_train.load(straight, device="cpu")
    assert np.array_equal(predictor.logits(paths).numpy(), expected)
    pillow = predictor.logits([Image.open(path) for path in paths])
    arrays = predictor.logits([np.asarray(Image.open(path)) for path in paths])  # read-only
    tensors = predictor.logits([torch.from_numpy(image) for image in native])
    for found in (pillow, arrays, tensors):
        assert np.array_equal(found.numpy(), expected)
    alone = torch.cat([predictor.logits(path) for path in paths[:20]])
    torch.testing.assert_close(alone, torch.from_numpy(expected[:20]), rtol=1e-5, atol=1e-6)


def test_unreadable_files_do_not_change_other_predictions(folders, tree, tmp_path, capsys):
    paths = [str(path) for path in sorted((tree / "test").rglob("*.jpg"))]
    bad, bomb = tmp_path / "no image.jpg", tmp_path / "bomb.png"
    bad.write_text("text")
    Image.new("1", (20000, 20000)).save(bomb)  # 400 million pixels in 50 kilobytes
    foreign = tmp_path / "caf\udce9.jpg"  # not valid UTF-8
    foreign.write_bytes(Path(paths[-1]).read_bytes())
    names = [paths[0], str(bad), *paths[1:], str(bomb), str(tmp_path / "missing\x1b.png")]
    (batch,) = moa_train.load(folders, device="cpu").batches(names, processes=0)
    assert batch.paths == paths
    torch.testing.assert_close(batch.logits, torch.from_numpy(evaluated(folders)), rtol=1e-5, atol=1e-6)
    listing = "\n".join([*names, str(foreign)])
    sys_stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(os.fsencode(listing)))
    try:
        code, out, err = run(capsys, ckpt=str(folders), input="-", top=1)
    finally:
        sys.stdin = sys_stdin
    assert code == 2
    assert [line.rpartition("/")[2].split()[0] for line in out.splitlines()] == [
        *(Path(path).name for path in paths),
        "caf\\udce9.jpg",
    ]
    assert "no image.jpg: unreadable image (not a valid file of a supported format" in err
    assert "20000 x 20000 pixels are more than data.max_pixels" in err
    assert "missing\\x1b.png: unreadable image" in err
    assert "\x1b" not in err
    assert f"error: 3 of {len(names) + 1} files are unreadable and were skipped." in err


def test_formats_agree(folders, tree, capsys, tmp_path):
    options = {"ckpt": str(folders), "input": str(tree / "test"), "top": 2}
    _, table, _ = run(capsys, **options)
    _, lines, _ = run(capsys, **options, format="jsonl")
    assert run(capsys, **options, format="csv", output=str(tmp_path / "out.csv"))[1] == ""
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in sorted((tree / "test").rglob("*.jpg"))]
    predicted = moa_train.load(folders, device="cpu").predict([row["image"] for row in rows], top=2)
    for row, line, own in zip(rows, table.splitlines(), predicted, strict=True):
        assert [entry["class"] for entry in row["top"]] == own.classes
        assert [entry["probability"] for entry in row["top"]] == own.probabilities
        assert own.probabilities == sorted(own.probabilities, reverse=True)
        assert line.split() == [
            row["image"],
            *(word for entry in row["top"] for word in (f"{100 * entry['probability']:.1f}%", entry["class"])),
        ]
    cells = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [(cell["image"], cell["rank"], cell["class"]) for cell in cells] == [
        (row["image"], str(rank), entry["class"]) for row in rows for rank, entry in enumerate(row["top"], 1)
    ]


def test_hostile_names_are_text():
    def written(form: str) -> str:
        stream = io.StringIO()
        open_rows(form, stream, HOSTILE, HOSTILE)(HOSTILE[2], HOSTILE, [0.2] * 5)
        return stream.getvalue()

    assert [entry["class"] for entry in json.loads(written("jsonl"))["top"]] == HOSTILE
    (line,) = written("table").splitlines()
    assert "a\\x1b[31mred\\nline\\u202etext" in line
    assert line.isprintable()
    rows = list(csv.reader(io.StringIO(written("csv"))))
    assert [row[2] for row in rows[1:]] == [*HOSTILE[:2], "a\\x1b[31mred\\nline\\u202etext", "'=1+2", "$x^2$"]


def test_explanations_are_pictures(straight, tmp_path, capsys):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a $x_$ \u4e2d.png")
    options = {"ckpt": str(straight), "input": str(tmp_path / "a $x_$ \u4e2d.png"), "explain": str(tmp_path / "out")}
    code, _, err = run(capsys, **options, explain_class="3", explain_window=[1, 0])
    assert code == 0
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "00000-a__x___\u4e2d.png"
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
    assert "class maps: deletion area 0." in err
    assert "; 1 image" in err
    with pytest.raises(UserError, match=r"explain_window=\[9,0\]: the first stage has 2 x 2 windows"):
        run(capsys, **options, explain_window=[9, 0])
    with pytest.raises(UserError, match=r"explain_class=33 is not known\. Did you mean '3'"):
        run(capsys, **options, explain_class="33")


def test_class_maps_are_computed_in_parts(straight, tmp_path, monkeypatch):
    """A backward pass over a whole evaluation batch needs too much memory."""
    for number in range(3):
        Image.effect_noise((8, 8), 50).save(tmp_path / f"{number}.png")
    predictor, sizes = moa_train.load(straight, device="cpu"), []
    (batch,) = predictor.batches(find_images(str(tmp_path)), processes=0)
    predictor.model.register_forward_pre_hook(lambda _, images: sizes.append(len(images[0])))
    monkeypatch.setattr("moa_train.cli.predict.MAPS", 2)
    _Explainer(PredictConfig(explain=str(tmp_path / "out"), explain_checks=0), predictor)(batch)
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert max(sizes) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": "x.png"}, "ckpt is missing. Give ckpt=PATH"),
        ({"ckpt": "RUN"}, "input is missing. Give input=PATH"),
        ({"ckpt": "nowhere", "input": "IMAGE"}, "nowhere does not exist"),
        ({"ckpt": "RUN", "input": "nowhere.png"}, "input=nowhere.png does not exist"),
        ({"ckpt": "RUN", "input": "EMPTY"}, "contains no image file. Images are recognized by suffix"),
        ({"ckpt": "RUN", "input": "EMPTY/*.png"}, "No file matches input="),
        ({"ckpt": "RUN", "input": "IMAGE", "output": "EMPTY/none/out.csv"}, "there is no folder"),
        ({"ckpt": "RUN", "input": "IMAGE", "output": "EMPTY"}, "Cannot write"),
        ({"ckpt": "RUN", "input": "IMAGE", "range": [1]}, r"range=\[1\]: must be two numbers, LOW < HIGH"),
    ],
)
def test_errors(straight, tmp_path, capsys, options, message):
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    (tmp_path / "empty").mkdir()
    places = {"RUN": straight, "IMAGE": tmp_path / "image.png", "EMPTY": tmp_path / "empty"}
    for name, place in places.items():
        options = {k: v.replace(name, str(place)) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        run(capsys, **options)


def test_decoding_limits_can_be_set(straight, tmp_path, capsys):
    Image.fromarray(np.full((9, 9), 2048, np.uint16)).save(tmp_path / "image.png")
    options = {"ckpt": str(straight), "input": str(tmp_path / "image.png"), "format": "jsonl"}
    _, found, _ = run(capsys, **options, range=[0, 2048])
    white = moa_train.load(straight, device="cpu").predict(np.full((9, 9), 255, np.uint8))[0]
    assert [entry["probability"] for entry in json.loads(found)["top"]] == white.probabilities
    code, _, err = run(capsys, **options, max_pixels=80)
    assert code == 2
    assert "9 x 9 pixels are more than data.max_pixels=80 (moa-data: --max-pixels, moa-predict: max_pixels)" in err
    with pytest.raises(UserError, match="max_seconds=0: must be above 0"):
        moa_train.load(straight, device="cpu", max_seconds=0)
    limited = moa_train.load(straight, device="cpu", max_pixels=80, max_seconds=5, range=[0, 2048])
    with pytest.raises(UserError, match=r"data\.max_pixels=80"):
        limited.predict(tmp_path / "image.png")
    assert limited._decoding == Decoding(80, 5, (0, 2048))


def test_the_output_is_opened_last_and_errors_of_other_files_are_not_its_own(straight, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError("no process could be started")

    Image.new("L", (9, 9)).save(tmp_path / "image.png")
    (tmp_path / "out.txt").write_text("old")
    options = {"ckpt": str(straight), "input": str(tmp_path / "image.png"), "output": str(tmp_path / "out.txt")}
    with pytest.raises(UserError, match="precision=fp16 requires a GPU"):
        run(capsys, **options, precision="fp16")
    assert (tmp_path / "out.txt").read_text() == "old"
    monkeypatch.setattr(moa_train.assembly.predictor.Predictor, "forward", fail)
    with pytest.raises(OSError, match="no process could be started"):
        run(capsys, **options)


def test_pictures_without_matplotlib_are_an_error_before_anything_is_opened(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"explain= requires matplotlib, .* pip install 'moa-train\[plot\]'"):
        run(capsys, ckpt="nowhere", input="nowhere.png", explain=str(tmp_path / "out"))


def command(straight: Path, folder: Path, *arguments: str) -> list[str]:
    return [
        *("env", "OMP_NUM_THREADS=1", "TERM=xterm", sys.executable, "-m", "moa_train.cli.predict"),
        *(f"ckpt={straight}", f"input={folder}", "device=cpu", "batch_size=1", "workers=0", *arguments),
    ]


@pytest.mark.parametrize(("redirection", "code"), [("> /dev/full", 2), ("| head -n 1", 0)])
def test_predictions_that_cannot_be_written_end_the_command(straight, tmp_path, redirection, code):
    for number in range(300):  # head has exited long before the last one
        Image.new("L", (9, 9)).save(tmp_path / f"{number:03}.png")
    line = f"set -o pipefail; {shlex.join(command(straight, tmp_path, 'format=csv'))} {redirection}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert lines == (
        ["error: Cannot write to standard output: No space left on device. Choose another file with output=."]
        if code
        else []
    )


def test_no_bar_shares_a_line_with_other_text(straight, tmp_path):
    """Predictions or messages on a terminal would otherwise continue the line of the bar."""
    tensors, header = read_tensors(straight / "checkpoints" / "best" / "ema.safetensors")
    config = json.loads(header["config"])
    config["tracking"]["progress"] = "auto"
    write_tensors(tmp_path / "weights.safetensors", tensors, header | {"config": json.dumps(config)})
    for number in range(3):
        Image.new("L", (9, 9)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_text("text")
    for arguments in ([], [f"output={tmp_path}/out.txt"]):
        words = command(tmp_path / "weights.safetensors", tmp_path, "top=1", *arguments)
        primary, secondary = pty.openpty()
        fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        done = subprocess.Popen(words, stdout=secondary, stderr=secondary, stdin=secondary)
        os.close(secondary)
        text = b""
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while part := os.read(primary, 65536):
                text += part
        os.close(primary)
        assert done.wait() == 2
        assert (b"predicting |" in text) == bool(arguments)
        shown = [line.rpartition("\r")[2] for line in text.decode().replace("\r\n", "\n").split("\n")]
        files = [str(tmp_path / name) for name in (["3"] if arguments else "0123")]
        assert [line.split(".png")[0].split(" ")[0] for line in shown] == [*files, "3", "error:", ""]


def test_images_of_the_library_that_are_none(straight):
    good, file = Image.effect_noise((40, 40), 50), io.BytesIO()
    good.save(file, "PNG")
    truncated = Image.open(io.BytesIO(file.getvalue()[:600]))
    predictor = moa_train.load(straight, device="cpu")
    for image, message in (
        (3, "int is not an image"),
        (np.zeros((8, 8, 3)), r"type float64 and the shape \(8, 8, 3\). Give uint8 .* \(H, W, 3\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"\(8, 8, 3\). Give uint8 values from 0 to 255 of shape \(3, H, W\)"),
        ("missing.png", "missing.png: unreadable image"),
        (truncated, "The image cannot be decoded: .*truncated"),
    ):
        with pytest.raises(UserError, match=message):
            predictor.predict(image)
        with pytest.raises(UserError, match=rf"images\[1\]: .*{message}"):
            predictor.predict([good, image])
    assert predictor.predict([]) == []


def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.tiff", ".hidden.png", ".git/d.png", "notes.txt", "@eaDir/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_images(str(tmp_path)) == [str(tmp_path / name) for name in ("a.png", "b.JPG", "sub/c.tiff")]
    assert find_images(f"{tmp_path}/**/*.t*") == [str(tmp_path / name) for name in ("notes.txt", "sub/c.tiff")]
    (tmp_path / "linked").mkdir()
    for name, target in {"sub": "../sub", "up": "..", "photo.png": "../a.png"}.items():
        (tmp_path / "linked" / name).symlink_to(target)
    linked = [str(tmp_path / "linked" / name) for name in ("photo.png", "sub/c.tiff")]
    assert find_images(f"{tmp_path / 'linked'}/") == linked
    (tmp_path / "x[1].png").write_bytes(b"")
    assert find_images(str(tmp_path / "x[1].png")) == [str(tmp_path / "x[1].png")]
    assert find_images("-", ["a b.png\n", "\n", "c.png\r\n"]) == ["a b.png", "c.png"]
    with pytest.raises(UserError, match="Standard input contains no path"):
        find_images("-", [])


def test_a_subfolder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(17):  # at last, the path is longer than the system accepts, which stops root as well
        Path("d" * 250).mkdir()
        monkeypatch.chdir("d" * 250)
    with pytest.raises(UserError, match=r"input=.*: .*d cannot be read: File name too long"):
        find_images(str(tmp_path))


def test_importing_moa_train_is_cheap():
    code = "import sys, moa_train; assert callable(moa_train.load); print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_command_line(straight, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    command = [sys.executable, "-m", "moa_train.cli.predict", f"ckpt={straight}", f"input={tmp_path}", "format=jsonl"]
    done = subprocess.run([*command, "device=cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["top"]) == 5
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    for setting in ("ckpt=null", "explain_window=null", "format=table"):
        assert setting in help_text
