"""The experiments of scripts/tables.yaml: every row composes and trains, records are kept, tables are computed."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from safetensors import safe_open

from moa_train.cli.compose import compose, config_roots, typed
from moa_train.cli.evaluate import evaluate
from moa_train.cli.train import train
from moa_train.runtime.errors import UserError
from moa_train.schema import EvalConfig, RunConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # where Python finds them if tables.py is run
try:
    import figures
    import records
    import results
    import tables
finally:
    sys.path.pop(0)

ROWS = {
    (row.recipe, row.name): row for table in records.tables().values() for row in table.rows
}  # rows that tables share occur once


def test_names_are_unambiguous():
    """Rows of the same name are the same run."""
    for table in records.tables().values():
        for row in table.rows:
            assert ROWS[row.recipe, row.name].settings == row.settings


def test_every_recipe_of_the_paper_is_in_a_table():
    recipes = {path.stem for path in (ROOT / "conf" / "experiment").glob("paper_*.yaml")}
    assert recipes == {recipe for recipe, _ in ROWS if recipe.startswith("paper_")}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes of tiny images, in folders."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2), ("val", 2)):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    return root


SMALL = {
    "paper": "augment=cifar model.depths=[1,1,1] model.embed_dim=32 model.heads=[1,2,4] model.patch_size=2",
    "cifar": "",
}
"""Settings with which a step is fast on a CPU."""


def train_two_steps(row: records.Row, images: Path, folder: Path, *further: str) -> None:
    settings = [
        f"experiment={row.recipe}",
        "data=folder",
        "geometry=small",
        f"data.root={images}",
        "data.image_size=32",
        "data.workers=0",
    ]
    settings += [*SMALL[row.recipe.split("_")[0].rstrip("0123456789")].split(), *row.settings, "schedule.warmup=0%"]
    settings += ["schedule.duration=2 steps", "engine.batch_size=4", f"run_dir={folder}", *further]
    settings += ["runtime.device=cpu", "runtime.threads=1", "data.val_fraction=0", "engine.eval_split=none"]
    settings += ["runtime.deterministic=true"]  # measures no kernels
    store = ConfigStore.instance()
    store.store(name="train_schema", node=RunConfig)
    store.store(group="hydra/help", name="train_help", node={})
    assert train(typed(compose("train", settings, config_roots([]))), settings) == 0


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory) -> Path:
    """A short run of the recipe that teaches others, and its predictions for the training images."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train_two_steps(ROWS["cifar100_night", "base"], images, folder)
    evaluate(EvalConfig(ckpt=str(folder), split="train", device="cpu"), [])
    return folder


@pytest.mark.parametrize("key", ROWS, ids=":".join)
def test_every_row_trains_for_two_steps(images, teacher, tmp_path, key):
    taught = [f"distill.teachers=[{teacher}]"] if "distilled" in key[0] else []
    train_two_steps(ROWS[key], images, tmp_path / "run", *taught)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test"]["total"] == 4


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A copy of the files that `write` reads and writes."""
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results")
    (tmp_path / "docs" / "images").mkdir()
    for path in (ROOT / "docs" / "images").glob("*.svg"):
        shutil.copy(path, tmp_path / "docs" / "images")
    (tmp_path / "scripts").mkdir()
    for name in ("docs/RESULTS.md", "README.md", "scripts/tables.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    return tmp_path


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_table_is_run_recorded_and_written(images, copy, monkeypatch):
    """Two rows, two seeds: the runs are not repeated, and the table has what an independent computation gives."""
    shutil.rmtree(copy / "docs" / "results")
    (copy / "docs" / "RESULTS.md").write_text("Before\n<!-- small_form -->\n<!-- end -->\nAfter\n")
    monkeypatch.setenv("LAUNCH", f"{sys.executable} -m moa_train.cli.train")
    settings = [
        "data=folder",
        "geometry=small",
        f"data.root={images}",
        "data.image_size=32",
        "data.workers=0",
        "schedule.duration=2 steps",
    ]
    settings += ["engine.batch_size=4", "schedule.warmup=0%", "runtime.device=cpu", "tracking.log_every=1"]
    settings += ["runtime.precision=fp32"]
    tables.run("small_form", ["seeds=0", *settings])
    tables.run("small_form", ["seeds=0,1", "jobs=2", *settings])
    kept = {path: path.stat().st_mtime_ns for path in (copy / "docs" / "results").rglob("*.json")}
    assert len(kept) == 4
    assert not any(str(copy) in path.read_text() for path in kept)
    tables.run("small_form", ["seeds=0,1", *settings])
    assert kept == {path: path.stat().st_mtime_ns for path in kept}

    for path in kept:  # so that the differences are known: 1 and 3
        record = records.read_json(path)
        assert (record["minutes"] is None) == (record["seed"] == 1), "seed 1 shared the machine"
        assert [record["starts"][0][key] for key in ("device", "precision")] == ["cpu", "fp32"]
        run = copy / "outputs" / "cifar100_ablation" / path.stem
        with safe_open(run / "checkpoints" / "last" / "model.safetensors", "pt") as file:
            tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 not a dictionary
        sizes = [math.prod(tensor.get_shape()) for tensor in tensors if tensor.get_dtype() == "F32"]  # no indices
        assert record["parameters"] == sum(sizes)
        assert record["macs"] > 1e7
        record["result"]["test"]["top1"] = 50.0 + record["seed"] + ("published" in path.name) * (1 + 2 * record["seed"])
        path.write_text(json.dumps(record))
    results.write()
    text = (copy / "docs" / "RESULTS.md").read_text()
    assert text.startswith("Before\n")
    assert text.endswith("After\n")
    half = 12.706 * math.sqrt(2) / math.sqrt(2)  # t(0.975, 1), standard deviation of 1 and 3, n = 2
    assert f" | 2 | 50.50 ± {math.sqrt(0.5):.2f} | reference |  |" in text
    assert f"+2.00 ({2 - half:+.2f} to {2 + half:+.2f}, n = 2) | within noise |" in text
    assert "Runs: 4 on " in text


def test_an_unknown_table_is_an_error():
    with pytest.raises(SystemExit, match=r"there is no table 'table9'\. Tables: cifar, "):
        tables.run("table9", [])


def test_the_documents_are_current(copy):
    """Every figure between the marks comes from records: writing them again changes no document and no picture."""
    before = content(copy)
    results.write()
    assert content(copy) == before


def test_figures_are_redrawn_if_their_data_change(copy):
    pictures = {path: path.read_text() for path in (copy / "docs" / "images").iterdir()}
    for path in pictures:
        path.unlink()
    results.write()
    for path, text in pictures.items():
        assert digests(path.read_text()) == digests(text)
    drawn = {path: path.read_text() for path in pictures}
    for path in pictures:
        path.unlink()
    results.write()
    assert {path: path.read_text() for path in pictures} == drawn, "the same bytes"

    changed = copy / "docs" / "results" / "cifar100_ablation" / "no_moa-s0.json"
    record = records.read_json(changed)
    record["result"]["test"]["top1"] += 1
    changed.write_text(json.dumps(record))
    results.write()
    small = copy / "docs" / "images" / "small.svg"
    assert digests(small.read_text()) != digests(pictures[small])


def digests(svg: str) -> str:
    return svg.partition("<dc:description>")[2].partition("<")[0]


def test_without_records_there_are_no_results(copy):
    shutil.rmtree(copy / "docs" / "results")
    results.write()
    text = (copy / "docs" / "RESULTS.md").read_text()
    assert "- MOA (paper form), compared with local windows only: not measured yet." in text
    assert "| local windows only | 406 | 14.7 |  |  |  |  |" in text
    assert "±" not in text.partition("<!-- conclusions -->")[2]
    assert "<!-- small_moa.no_moa -->not measured yet<!-- end -->" in (copy / "README.md").read_text()
    assert "![" not in text
    assert not list((copy / "docs" / "images").iterdir())


@pytest.mark.parametrize(("effect", "pairs"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_agrees_with_published_tables(effect, pairs):
    """The well-known sizes of a two-sided paired t test at 5% with a power of 80%, by standardized effect."""
    assert results.seeds_needed(deviation=0.5 / effect) == pairs


@pytest.mark.parametrize("differences", [[0.7], [0.7, 61.1 - 60.4, 50.7 - 50]])
def test_seeds_without_a_spread_decide_nothing(differences):
    assert results.verdict(differences) == ""
    assert results.described(differences) == f"+0.70 (n = {len(differences)})"


def test_minutes_are_those_of_the_updates():
    rows = [{"step": 10, "images_per_second": None}, {"step": 20, "images_per_second": 50.0}]
    rows.append({"step": 60, "images_per_second": 100.0})
    assert records._minutes(rows, 60) == pytest.approx((10 * 60 / 50 + 10 * 60 / 50 + 40 * 60 / 100) / 60, abs=1e-4)


def test_runs_on_other_hardware_are_counted(copy):
    """A GPU and a CPU: one line for both, accuracy against minutes, and a sentence about the runs."""
    path = copy / "docs" / "results" / "cifar100_ablation" / "base-s0.json"
    row = next(table.rows[0] for table in records.tables().values() if table.name == "cifar100_cpu")
    shutil.rmtree(row.record(0).parent, ignore_errors=True)
    row.record(0).parent.mkdir()
    for seed, minutes in enumerate((30.0, 32.0)):
        record = records.read_json(path)
        record |= {"seed": seed, "minutes": minutes}
        record["result"]["test"]["top1"] = 65.0 + seed
        record["starts"][0] |= {"device": "cpu", "hardware": {"cpu": "Zen", "cores": 2, "gpus": []}}
        row.record(seed).write_text(json.dumps(record))
    accuracy, time = "65.50 ± 0.71% test accuracy (n = 2)", "31 minutes on 2 cores of Zen (2 timed runs)"
    assert results.sentence(row) == f"{accuracy} in {time}"
    ((point,),) = results.minutes([row])["panels"].values()
    assert point["x"] == {"mean": 31.0, "deviation": pytest.approx(math.sqrt(2))}
    record = records.read_json(path)
    row.record(2).write_text(json.dumps(record | {"seed": 2}))
    facts = "(torch 2.11.0, bf16, commit 1682266, source 8709952b, started 2026-11-26)"
    expected = f"Runs: 2 on 2 cores of Zen {facts}; 1 on NVIDIA H200 {facts}."
    assert results.provenance([row]).split() == expected.split()
    assert results.sentence(row).endswith(f"(n = 3) in {time}"), "the run on the GPU has no minutes"


def test_the_text_states_when_runs_first_reach_the_target(copy):
    """Of three runs, one never reaches it, and only one had its machine for itself."""
    rows = next(table.rows for table in records.tables().values() if table.name == "cifar10_cpu")
    shutil.rmtree(rows[0].record(0).parent, ignore_errors=True)
    rows[0].record(0).parent.mkdir()
    curves = ([80.0, 90.0, 89.9, 91.0], [80.0, 89.9, 89.9, 90.1], [80.0, 85.0, 86.0, 89.9])
    for seed, curve in enumerate(curves):
        record = records.read_json(copy / "docs" / "results" / "cifar100_ablation" / "base-s0.json")
        evaluated = [{"split": "val", "epoch": 2.0 * i, "top1": top1} for i, top1 in enumerate(curve, 1)]
        record |= {"seed": seed, "minutes": 12.0 if seed == 1 else None}
        record["evaluations"] = [*evaluated, {"split": "test", "top1": 99.0}]
        rows[0].record(seed).write_text(json.dumps(record))
    target = records.Table("cifar10_cpu", "", rows, target=90.0)
    first = "cifar10_cpu: 2 of 3 runs reach 90% of the held-out images after 6.00 ± 2.83 epochs"
    time = "9 minutes on NVIDIA H200 (1 timed run)"  # 12 minutes for 8 epochs
    assert results.reached(target).replace("\n", " ") == f"{first}, {time}."
    assert results.reached(records.Table("cifar10_cpu", "", rows, target=95.0)).startswith("cifar10_cpu: 0 of 3 runs")
    assert not results.reached(records.Table("cifar10_cpu", "", rows))


def test_a_band_is_the_deviation_of_curves():
    band = results.band([{1.0: 2.0, 2.0: 4.0}, {1.0: 4.0, 2.0: 4.0, 3.0: 9.0}])
    assert band == {"x": [1.0, 2.0], "mean": [3.0, 4.0], "deviation": [pytest.approx(math.sqrt(2)), 0.0]}


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'moa-train\[plot\]'"):
        figures.draw({"kind": "lines", "panels": []}, tmp_path / "x.svg")
