"""The moa-data command."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moa_train.cli.data import main


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in ("ant", "bee"):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "tree"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def test_pack_then_check_and_stats(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pack", tree, tmp_path / "out") == 0
    assert "pack-train.npy: 8 images of 2 classes" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "pack-test.json",
        "pack-test.npy",
        "pack-train.json",
        "pack-train.npy",
    ]
    assert run("check", tmp_path / "out") == 0
    assert "8 images" in capsys.readouterr().out
    assert run("stats", tmp_path / "out", "--image-size", 8, "--samples", 0) == 0
    from_pack = shlex.split(capsys.readouterr().out, comments=True)
    assert run("stats", tree, "--image-size", 8) == 0
    from_files = shlex.split(capsys.readouterr().out, comments=True)
    assert from_pack[0].startswith("data.mean=[0.")
    assert [line.partition("=")[0] for line in from_files] == ["data.mean", "data.std"]
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted((tree / "train").rglob("*.png"))]) / 255
    assert json.loads(from_pack[0].partition("=")[2]) == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-4)


def test_a_file_system_that_accepts_no_data_is_an_error(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moa_train.runtime.files.os.write", lambda descriptor, data: 0)
    assert run("pack", tree, tmp_path / "out") == 2
    assert "accepts no data" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    assert run("check", tree, "--json", tmp_path / "report.json") == 2
    assert f"{tmp_path}/report.json: the file system accepts no data" in capsys.readouterr().err


def test_home_is_expanded_in_paths(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("check", "~/tree", "--json=~/report.json") == 0
    assert (tmp_path / "report.json").exists()
    assert run("pack", "~/tree", "~/packed") == 0
    assert (tmp_path / "packed" / "pack-train.npy").exists()
    assert run("stats", "~/packed", "--image-size", 8) == 0


def test_check_reports_problems_and_exits_with_1(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "test" / "ant" / "0.png").write_bytes((tree / "train" / "bee" / "1.png").read_bytes())
    (tree / "train" / "ant" / "2.png").write_bytes(b"")
    assert run("check", tree, "--json", tmp_path / "report.json") == 1
    output = capsys.readouterr().out
    assert "1 unreadable images" in output
    assert "1 groups of identical images in different splits" in output
    assert f"{tree}/train/bee/1.png = {tree}/test/ant/0.png" in output
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["leaks"]) == len(report["conflicts"]) == len(report["unreadable"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere"], "nowhere: there is no such folder"),
        (["pack", "nowhere", "out"], "nowhere contains no folder train, val or test"),
        (["stats", "nowhere"], "no such folder"),
        (["stats", "nowhere", "--image-size", "0"], "--image-size is 0"),
        (["check", "tree", "--json", "nowhere/report.json"], "error: nowhere/report.json: No such file"),
        (["check", "nowhere", "--workers", "-1"], "not a non-negative integer"),
        (["clean", "nowhere"], "invalid choice: 'clean'"),
    ],
)
def test_mistakes_are_explained_and_exit_with_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ant", "bee"):
        (tmp_path / "tree" / "train" / name).mkdir(parents=True)
        Image.effect_noise((8, 8), 90).save(tmp_path / "tree" / "train" / name / "1.png")
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    output = capsys.readouterr().out
    for command in ("pack", "check", "stats"):
        assert f"moa-data {command} " in output
        assert run(command, "--help") == 0


def test_help_needs_no_torch() -> None:
    code = "import sys; from moa_train.cli.data import parser; parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_packs_of_splits_that_are_gone_are_refused(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their images may be in another split now."""
    assert run("pack", tree, tmp_path / "packed") == 0
    (tree / "test").rename(tmp_path / "test")
    assert run("pack", tree, tmp_path / "packed") == 2
    assert "packs of test, which" in capsys.readouterr().err
    (tmp_path / "packed" / "pack-test.json").unlink()
    assert run("pack", tree, tmp_path / "packed") == 0
