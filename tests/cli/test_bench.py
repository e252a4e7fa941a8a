"""The moa-bench command."""

import json
import sys
from pathlib import Path

import pytest

from moa_train.cli import bench as command

SMALL = ("model.embed_dim=32", "model.depths=[1,1]", "model.heads=[1,2]", "runtime=cpu", "runtime.threads=1")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moa-bench", *arguments])
    with pytest.raises(SystemExit) as left:
        command.main()
    return int(left.value.code or 0)


def test_parts_are_reported_as_tables_and_json(monkeypatch, capsys, tmp_path: Path):
    file = tmp_path / "result.json"
    options = ("--rounds", "1", "--seconds", "0", "--batch", "2", "--against", "moa-train/vit_b_16", "--mode", "infer")
    assert run(monkeypatch, "checkpoint", "step", *options, "--json", str(file), "model=moa_micro", *SMALL[3:]) == 0
    shown, result = capsys.readouterr().out, json.loads(file.read_text())
    assert [table["part"] for table in result["tables"]] == ["checkpoint", "step"]
    assert result["threads"] == 1
    assert f"torch {result['versions']['torch']}" in shown
    ratios = ["moa_micro / moa-train/vit_b_16", "moa_micro / moa-train/vit_b_16, per MAC"]
    names = [row["what"] for row in result["tables"][1]["rows"]]
    assert names == ["moa_micro", "moa-train/vit_b_16", "matrix product of 2048", *ratios]
    assert all(name in shown for name in names)
    assert f"wrote {file}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stap",), "part=stap is not known. Did you mean 'step'?"),
        (("loop", "--against", "timm/resnet18"), "--against timm/resnet18 applies to the part step"),
        (("step", "--against", "timm"), "--against timm applies to the part input"),
        (("step", "model=moa_q"), "model=moa_q is not known"),
        (("step", "--against", "moa-train/moa_q"), "model=moa_q is not known"),
        (("checkpoint", "step", "--against", "torchvision/nothing"), "torchvision has no model 'nothing'"),
        (("loop", "data=folder"), "needs data.root=FOLDER"),
        (("step", "--rounds", "0"), "is not a positive integer"),
    ],
)
def test_errors_are_reported_before_any_measurement(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out


def test_own_recipes_can_be_measured(monkeypatch, capsys, tmp_path: Path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    recipe = "# @package _global_\nmodel: {variant: mine, embed_dim: 32, depths: [1, 1], heads: [1, 2]}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(recipe)
    monkeypatch.setenv("HOME", str(tmp_path))
    own = ("--config-dir=~/conf", "experiment=mine", "--json=~/result.json")
    assert run(monkeypatch, "checkpoint", "--rounds", "1", *own, *SMALL[3:]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["config"]["model"]["embed_dim"] == 32
    assert "mine, muon" in result["tables"][0]["title"]
    assert "mine, muon" in capsys.readouterr().out


def test_own_code_next_to_recipes_is_found_by_the_processes_of_a_part(monkeypatch, capsys, tmp_path: Path):
    (tmp_path / "blocks.py").write_text("from moa_train.model.network import MOATransformer as Tiny\n")
    monkeypatch.setenv("PYTHONPATH", "")  # restored afterward
    monkeypatch.setattr(sys, "path", [*sys.path])
    options = ("start", "--rounds", "1", "--config-dir", str(tmp_path), f"--json={tmp_path / 'result.json'}")
    assert run(monkeypatch, *options, "model.name=blocks:Tiny", *SMALL[3:]) == 0
    assert "first step" in capsys.readouterr().out


def test_a_missing_library_is_an_error_that_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)  # Python treats it as not installed
    assert run(monkeypatch, "step", "--against", "timm/resnet18") == 2
    assert "pip install 'moa-train[bench]'" in capsys.readouterr().err


def test_options_are_separated_from_settings():
    options, overrides = command.read(
        ["step", "--batch", "8", "16", "model=moa_t", "data=imagenet", "--against", "timm/x:img_size=32,window=4"]
    )
    assert options.batch == [8, 16]
    assert options.against == ["timm/x:img_size=32,window=4"]
    assert overrides == ["model=moa_t", "data=imagenet"]
    assert command.read(["loop", "data=imagenet"])[1] == ["data=imagenet"]
    assert command.read(["--config-dir", "mine"])[0].config_dir == ["--config-dir=mine"]
    assert command.read([])[0].parts == []


def test_without_named_parts_those_that_the_machine_does_not_support_are_skipped(monkeypatch, capsys, tmp_path: Path):
    options = ("--rounds", "1", "--seconds", "0", "--json", str(tmp_path / "result.json"), "runtime.threads=1")
    monkeypatch.setattr(command, "PARTS", {part: command.PARTS[part] for part in ("ranks", "checkpoint")})
    assert run(monkeypatch, *options, *SMALL[3:]) == 0
    shown = capsys.readouterr()
    assert "ranks is skipped: --ranks 2 requires as many CPU threads" in shown.err
    assert "wrote" in shown.out
    assert run(monkeypatch, "ranks", *options, *SMALL[3:]) == 2
    monkeypatch.setattr(command, "PARTS", {"ranks": command.PARTS["ranks"]})
    assert run(monkeypatch, *options, *SMALL[3:]) == 2, "nothing was measured"


@pytest.mark.parametrize("given", [["--isa", "avx2"], ["--isa=avx2"]])
def test_an_instruction_set_is_measured_in_a_process_of_its_own(monkeypatch, tmp_path: Path, given: list[str]):
    own = ("checkpoint", "--rounds", "1", *given, f"--json={tmp_path / 'result.json'}")
    assert run(monkeypatch, *own, "runtime.threads=1", *SMALL[3:]) == 0
    assert (tmp_path / "result-avx2.json").is_file()
