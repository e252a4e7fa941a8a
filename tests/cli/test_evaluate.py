"""moa-eval computes exactly the counts that training logged."""

import contextlib
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moa_train.assembly.trained import Trained
from moa_train.cli.evaluate import evaluate
from moa_train.data.pack import pack_tree
from moa_train.data.tree import scan_split
from moa_train.engine.find_weights import FoundWeights
from moa_train.engine.predictions import Outcomes
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig, EvalConfig, RunConfig

COUNTS = ("top1_count", "top5_count", "total", "loss")


def run(**options) -> dict:
    out = io.StringIO()
    threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(out):
            evaluate(
                EvalConfig(
                    **{
                        "device": "cpu",
                        **{key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
                    }
                ),
                [],
            )
    finally:
        torch.set_deterministic_debug_mode("default")
        torch.set_num_threads(threads)
    return json.loads(out.getvalue())  # standard output contains only JSON


@pytest.fixture(scope="module")
def copy(straight, tmp_path_factory) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(straight, tmp_path_factory.mktemp("copy") / "run", symlinks=True)


@pytest.fixture(scope="module")
def logged(straight) -> dict:
    return json.loads((straight / "result.json").read_text())


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/best", "weights", "alone"])
def test_counts_equal_those_logged_in_training(copy, logged, tmp_path, where):
    best = copy / "checkpoints" / f"step-{logged['step']:08}"
    if where == "alone":
        ckpt = Path(shutil.copy(best / "ema.safetensors", tmp_path / "mine.safetensors"))
    else:
        ckpt = best / "ema.safetensors" if where == "weights" else copy / where
    found = run(ckpt=ckpt)
    assert {key: found[key] for key in COUNTS} == {key: logged["test"][key] for key in COUNTS}
    assert found["split"] == "test"
    written = tmp_path / "eval-test.json" if where == "alone" else copy / "eval-test.json"
    assert json.loads(written.read_text()) == found
    written.unlink()


def test_validation_counts_equal_those_logged_in_training(copy, logged, tmp_path):
    found = run(ckpt=copy, split="val", output=tmp_path / "val.json")
    assert {key: found[key] for key in COUNTS} == {key: logged["val"][key] for key in COUNTS}
    assert json.loads((tmp_path / "val.json").read_text()) == found


def test_the_result_of_a_moved_checkpoint_is_written_next_to_it(copy, logged, tmp_path):
    moved = shutil.copytree(copy / "checkpoints" / f"step-{logged['step']:08}", tmp_path / "kept" / "mine")
    assert run(ckpt=moved)["top1_count"] == logged["test"]["top1_count"]
    assert (tmp_path / "kept" / "eval-test.json").exists()
    assert not (tmp_path / "eval-test.json").exists()


def test_model_weights_differ_from_ema_weights(copy, tmp_path):
    ema, model = (run(ckpt=copy, weights=name, output=tmp_path / "x") for name in ("ema", "model"))
    assert ema["weights"].endswith("ema.safetensors")
    assert model["weights"].endswith("model.safetensors")
    assert ema["loss"] != model["loss"]


@pytest.mark.parametrize("batch_size", [1, 7, 359, 1000])
def test_counts_do_not_depend_on_the_batch_size(copy, logged, tmp_path, batch_size):
    out = io.StringIO()
    config = EvalConfig(ckpt=str(copy), batch_size=batch_size, device="cpu", output=str(tmp_path / "x"))
    with contextlib.redirect_stdout(out):
        evaluate(config, [])
    torch.set_deterministic_debug_mode("default")
    found = json.loads(out.getvalue())
    assert {key: found[key] for key in COUNTS[:3]} == {key: logged["test"][key] for key in COUNTS[:3]}


def test_counts_on_two_ranks_equal_those_logged_in_training(two_ranks):
    found = json.loads((two_ranks / "eval.json").read_text())
    logged = json.loads((two_ranks / "whole" / "result.json").read_text())
    assert {key: found[key] for key in COUNTS} == {key: logged["test"][key] for key in COUNTS}
    alone = run(ckpt=two_ranks / "whole", output=two_ranks / "alone.json")
    assert {key: found[key] for key in COUNTS[:3]} == {key: alone[key] for key in COUNTS[:3]}


def test_weights_without_a_configuration_are_rejected(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(UserError, match=r"foreign\.safetensors has no configuration in its header"):
        run(ckpt=foreign)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(foreign.read_bytes()[:20])
    with pytest.raises(UserError, match=r"damaged\.safetensors"):
        run(ckpt=damaged)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_pickles_are_never_loaded(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"model": Bomb()}))
    with pytest.raises(UserError, match=r"weights\.pth"):
        run(ckpt=path)


def test_missing_checkpoints_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist\. Give a run folder, a checkpoint folder or"):
        run(ckpt=tmp_path / "nowhere")
    with pytest.raises(UserError, match="contains no checkpoint"):
        run(ckpt=tmp_path)
    with pytest.raises(UserError, match="Give ckpt=PATH"):
        evaluate(EvalConfig(), [])


def test_data_with_other_classes_is_rejected(straight, make_classes, tmp_path):
    root = make_classes(5)
    best = next((straight / "checkpoints").glob("step-*")) / "ema.safetensors"
    import safetensors

    with safetensors.safe_open(best, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dictionary
    config = json.loads(header["config"])
    config["data"] |= {"name": "folder", "root": str(root), "val_fraction": 0.0}
    save_file(tensors, tmp_path / "x.safetensors", header | {"config": json.dumps(config)})
    with pytest.raises(UserError, match=r"trained on 10 classes .* the data has 5 .*root="):
        run(ckpt=tmp_path / "x.safetensors")


def test_missing_splits_and_folders_are_errors_that_name_the_settings_of_moa_eval(straight, tmp_path):
    best = next((straight / "checkpoints").glob("step-*")) / "ema.safetensors"
    import safetensors

    with safetensors.safe_open(best, "pt") as file:
        header = file.metadata()
    config = json.loads(header["config"])
    config["data"] |= {"name": "imagenet", "root": None, "val_fraction": 0.0}
    save_file({"head.bias": torch.zeros(10)}, tmp_path / "x.safetensors", header | {"config": json.dumps(config)})
    with pytest.raises(UserError, match=r"split=val does not exist: imagenet has only train and test\. .*split=test"):
        run(ckpt=tmp_path / "x.safetensors", split="val")
    with pytest.raises(UserError, match=r"data/imagenet/val: .* Set root to the folder"):
        run(ckpt=tmp_path / "x.safetensors")


def test_a_folder_for_the_result_that_does_not_exist_is_named_first(tmp_path):
    with pytest.raises(UserError, match=r"output=.*x\.json: there is no folder .*nowhere"):
        evaluate(EvalConfig(ckpt="not looked at", output=str(tmp_path / "nowhere" / "x.json")), [])


def test_the_command_prints_only_json(copy):
    done = subprocess.run(
        [sys.executable, "-m", "moa_train.cli.evaluate", f"ckpt={copy}", "device=cpu"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"] == 359
    assert "of 359 test images" in done.stderr
    assert "weights of the best checkpoint" in done.stderr


def test_evaluation_never_downloads_data(tmp_path):
    config = RunConfig()
    config.data = DataConfig(name="cifar10", root=str(tmp_path), download=True)
    trained = Trained(FoundWeights(tmp_path, None, ""), {}, {}, config, ["cat"])
    with pytest.raises(UserError, match=r"does not hold cifar10: .*tar\.gz\. To use your own copy, set root to"):
        trained.open_split("test")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("split", "total"), [("test", 8), ("val", 6), ("train", 26)])
def test_a_root_with_its_own_validation_split_needs_no_held_out_one(make_classes, tmp_path, split, total):
    config = RunConfig()
    config.data = DataConfig(name="folder", root=str(tmp_path / "moved away"), val_fraction=0.2)
    before = {"classes": json.dumps(["class0", "class1"]), "fingerprint": json.dumps("that of other images")}
    trained = Trained(FoundWeights(tmp_path, None, ""), {}, before, config, ["class0", "class1"])
    assert len(trained.open_split(split, str(make_classes(2)))) == total


def test_the_outcome_of_every_image_is_written_next_to_the_result(copy, logged, tmp_path):
    """The file agrees with the counts and with training's own, however the images are split into batches."""
    run(ckpt=copy, batch_size=7, output=tmp_path / "x.json")
    before, now = Outcomes.read(copy / "predictions-test.npz"), Outcomes.read(tmp_path / "x-predictions.npz")
    assert (before.rank == now.rank).all()
    assert (before.rank < 1).sum() == logged["test"]["top1_count"]
    assert (before.rank < 5).sum() == logged["test"]["top5_count"]
    assert -before.log_probability.mean(dtype=float) == pytest.approx(logged["test"]["loss"], rel=1e-6)
    assert ((before.top[:, 0] == before.labels) == (before.rank == 0)).all()
    assert before.fingerprint == now.fingerprint
    (tmp_path / "x-predictions.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read"):
        Outcomes.read(tmp_path / "x-predictions.npz")


@pytest.mark.parametrize("tta", ["flip", "crops"])
def test_averaging_over_views_is_recorded_and_changes_the_loss(copy, logged, tmp_path, tta):
    found = run(ckpt=copy, tta=tta, output=tmp_path / "x.json")
    assert found["tta"] == tta
    assert found["total"] == logged["test"]["total"]
    assert found["loss"] != logged["test"]["loss"]


@pytest.mark.parametrize(("split", "weights"), [("test", "ema"), ("val", "model"), ("train", "ema")])
def test_the_report_has_the_numbers_of_the_evaluation(copy, tmp_path, split, weights):
    found = run(ckpt=copy, split=split, weights=weights, report=True, output=tmp_path / "x.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("x-predictions.npz", "x-report.html", "x-report.json", "x.json")
    ]
    report = json.loads((tmp_path / "x-report.json").read_text())
    assert {key: report[key]["count"] for key in ("top1", "top5")} == {
        key: found[f"{key}_count"] for key in ("top1", "top5")
    }
    assert report["loss"]["value"] == pytest.approx(found["loss"], rel=1e-6)
    assert (report["label_errors"] is None) == (split == "train")
    html = (tmp_path / "x-report.html").read_text()
    assert f"{found['top1']:.2f}% top-1" in html
    assert ("trained on these images" in html) == (split == "train")
    assert "Training" in html


def test_a_report_without_matplotlib_is_an_error_before_anything_is_opened(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"report=true requires matplotlib, .* pip install 'moa-train\[plot\]'"):
        evaluate(EvalConfig(ckpt="not looked at", report=True), [])


@pytest.mark.parametrize(
    "changed", [{"weights": "model"}, {"tta": "flip"}, {"ckpt": "checkpoints/last"}, {"precision": "bf16"}]
)
def test_other_evaluations_keep_the_predictions_of_the_run(copy, changed):
    """Otherwise, moa-compare would compare this run's flipped images or other weights with those of other runs."""
    before = (copy / "predictions-test.npz").stat().st_mtime_ns
    changed = {"ckpt": copy, **changed, **({"ckpt": copy / changed["ckpt"]} if "ckpt" in changed else {})}
    run(**changed)
    run(**changed, output=copy / "other.json")
    assert (copy / "predictions-test.npz").stat().st_mtime_ns == before


def test_files_are_seen_as_the_pack_was_in_training(train, make_classes, tmp_path):
    """Images of a pack are not cropped. Other images do not replace the predictions of the run."""
    tree, pack = make_classes(2), tmp_path / "pack"
    for split in ("train", "test"):
        pack_tree(scan_split(tree, split), pack, split)
    changes = {"data__name": "folder", "data__root": pack, "data__image_size": 8, "data__val_fraction": 0}
    changes |= {"engine__batch_size": 8, "schedule__duration": "2 steps", "schedule__warmup": 0, "data__workers": 0}
    assert train(tmp_path / "run", data__limit="null", **changes) == 0
    trained = json.loads((tmp_path / "run" / "result.json").read_text())["test"]
    found = run(ckpt=tmp_path / "run", root=tree)
    assert found["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    (tmp_path / "run" / "provenance.json").rename(tmp_path / "starts.json")
    for starts in ("[{}]", "[]"):  # of older versions, or damaged
        (tmp_path / "run" / "provenance.json").write_text(starts)
        assert run(ckpt=tmp_path / "run", root=tree)["loss"] == found["loss"]
    (tmp_path / "starts.json").rename(tmp_path / "run" / "provenance.json")
    kept = (tmp_path / "run" / "predictions-test.npz").read_bytes()
    next((tree / "test").rglob("*.png")).unlink()
    assert run(ckpt=tmp_path / "run", root=tree)["total"] == found["total"] - 1
    assert (tmp_path / "run" / "predictions-test.npz").read_bytes() == kept
