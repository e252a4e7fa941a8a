"""The experiments of scripts/tables.yaml: every row composes and trains, records are kept, tables are computed."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from moa_train.cli.compose import compose, config_roots, typed
from moa_train.cli.train import train
from moa_train.schema import RunConfig

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts" / "tables.py")
assert spec is not None
assert spec.loader is not None
tables = importlib.util.module_from_spec(spec)
sys.modules["tables"] = tables  # dataclasses look their module up
spec.loader.exec_module(tables)

ROWS = {
    (row.recipe, row.name): row for _, rows in tables.tables().values() for row in rows
}  # rows that tables share occur once


def test_names_are_unambiguous():
    """Rows of the same name are the same run."""
    for _, rows in tables.tables().values():
        for row in rows:
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


@pytest.mark.parametrize("key", ROWS, ids=":".join)
def test_every_row_trains_for_two_steps(images, tmp_path, key):
    row = ROWS[key]
    settings = [
        f"experiment={row.recipe}",
        "data=folder",
        "geometry=small",
        f"data.root={images}",
        "data.image_size=32",
        "data.workers=0",
    ]
    settings += [*SMALL[row.recipe.split("_")[0].rstrip("0123456789")].split(), *row.settings, "schedule.warmup=0%"]
    settings += ["schedule.duration=2 steps", "engine.batch_size=4", f"run_dir={tmp_path / 'run'}"]
    settings += ["runtime.device=cpu", "runtime.threads=1", "data.val_fraction=0", "engine.eval_split=none"]
    store = ConfigStore.instance()
    store.store(name="train_schema", node=RunConfig)
    store.store(group="hydra/help", name="train_help", node={})
    assert train(typed(compose("train", settings, config_roots([]))), settings) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test"]["total"] == 4


def test_a_table_is_run_recorded_and_written(images, tmp_path, monkeypatch):
    """Two rows, two seeds: the runs are not repeated, and the table has what an independent computation gives."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "tables.yaml", tmp_path / "scripts")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "RESULTS.md").write_text("Before\n<!-- small_form -->\n<!-- end -->\nAfter\n")
    for name, path in (("ROOT", ""), ("RUNS", "outputs"), ("RECORDS", "docs/results"), ("RESULTS", "docs/RESULTS.md")):
        monkeypatch.setattr(tables, name, tmp_path / path)
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
    tables.run("small_form", ["seeds=0,1", "jobs=2", *settings])
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "docs" / "results").rglob("*.json")}
    assert len(records) == 4
    assert not any(str(tmp_path) in path.read_text() for path in records)
    tables.run("small_form", ["seeds=0,1", *settings])
    assert records == {path: path.stat().st_mtime_ns for path in records}

    for path in records:  # so that the differences are known: 1 and 3
        record = json.loads(path.read_text())
        record["result"]["test"]["top1"] = 50.0 + record["seed"] + ("published" in path.name) * (1 + 2 * record["seed"])
        path.write_text(json.dumps(record))
    tables.write()
    text = (tmp_path / "docs" / "RESULTS.md").read_text()
    assert text.startswith("Before\n")
    assert text.endswith("After\n")
    half = 12.706 * math.sqrt(2) / math.sqrt(2)  # t(0.975, 1), standard deviation of 1 and 3, n = 2
    assert f"| paper | 2 | 50.50 ± {math.sqrt(0.5):.2f} | reference | |" in text
    assert f"+2.00 ({2 - half:+.2f} to {2 + half:+.2f}, n = 2) | within noise |" in text


def test_an_unknown_table_is_an_error():
    with pytest.raises(SystemExit, match=r"there is no table 'table9'\. Tables: cifar, "):
        tables.run("table9", [])


def test_the_tables_in_the_documents_are_current(tmp_path, monkeypatch):
    """Every figure between the marks of RESULTS.md comes from the records of runs."""
    before = tables.RESULTS.read_text()
    copy = tmp_path / "RESULTS.md"
    copy.write_text(before)
    monkeypatch.setattr(tables, "RESULTS", copy)
    tables.write()
    assert copy.read_text() == before
