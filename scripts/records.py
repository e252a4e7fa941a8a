"""The tables of tables.yaml and the records of their runs, docs/results/RECIPE/ROW-sSEED.json."""

import json
import re
import shlex
import statistics
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from moa_train.runtime.files import write_whole
from moa_train.tracking.jsonl import read_rows

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """A row of a table: a recipe with further settings."""

    label: str
    recipe: str
    name: str = "base"
    settings: list[str] = field(default_factory=list)
    split: str = "test"
    """The images on which the table compares accuracies: test, or the held-out val."""
    claim: str = ""
    """A comparison of the first row of the table with this one, for the list of conclusions."""
    paper: bool = False
    """Whether the paper's abstract states that the first row is better."""
    decision: str = ""
    """The decision that was made on the setting, such as "kept"."""

    def path(self, folder: Path, seed: int) -> Path:
        """Return the place of the run of a seed below ``folder``."""
        return folder / self.recipe / f"{self.name}-s{seed}"

    def record(self, seed: int) -> Path:
        """Return the file of a seed's record."""
        return self.path(ROOT / "docs" / "results", seed).with_suffix(".json")

    def records(self) -> dict[int, dict[str, Any]]:
        """Return the records of all seeds that have been run, by seed."""
        found = map(read_json, self.record(0).parent.glob(f"{self.name}-s*.json"))
        return {record["seed"]: record for record in sorted(found, key=lambda record: record["seed"])}

    def accuracies(self) -> dict[int, float]:
        """Return the top-1 accuracy by seed."""
        return {seed: record["result"][self.split]["top1"] for seed, record in self.records().items()}

    def cost(self) -> dict[str, int]:
        """Return parameters and multiply-accumulates of the model: of its records, or else of its settings."""
        for record in self.records().values():
            return {key: record[key] for key in ("parameters", "macs")}
        return model_cost(f"experiment={self.recipe}", *self.settings)


@dataclass(frozen=True)
class Table:
    """A table that compares rows with its first row."""

    name: str
    title: str
    rows: list[Row]
    figure: str = ""
    """The figure below the table: curves, loss, differences or none."""
    target: float | None = None
    """A top-1 accuracy on held-out images (%). The text below the table states when runs first reach it."""


def tables() -> dict[str, Table]:
    """Return every table by its name."""
    content = yaml.safe_load((ROOT / "scripts" / "tables.yaml").read_text())
    return {
        name: Table(
            name,
            table["title"],
            [_row(table, row) for row in table["rows"]],
            table.get("figure", ""),
            table.get("target"),
        )
        for name, table in content.items()
    }


def _row(table: dict[str, Any], row: dict[str, Any]) -> Row:
    """Return a row with the settings that all rows of its table share."""
    shared = {key: table[key] for key in ("recipe", "split") if key in table}
    return Row(**{**shared, **row, "settings": [*table.get("settings", []), *row.get("settings", [])]})


def keep(folder: Path, record: Path, seed: int, alone: bool) -> None:
    """Write the record of a finished run.

    Args:
        folder: run folder.
        record: file to write.
        seed: of the run.
        alone: whether no other run of the same command ran at the same time. Otherwise, its minutes mean nothing.
    """
    from moa_train.serialization import from_dict

    config, starts = from_dict(read_json(folder / "config.json")), read_json(folder / "provenance.json")
    rows = read_rows(folder / "metrics.jsonl")
    trained = [row for row in rows if row["kind"] == "train"]
    speeds = [row["images_per_second"] for row in trained if row["images_per_second"]]  # the first row has none
    content = {
        "seed": seed,
        "command": shlex.join(["moa-train", *_arguments(starts[0]["command"])]),
        "starts": [_start(start, config) for start in starts],
        **_summary(config, starts[0]["data"]["train"]["classes"]),
        "result": {key: value for key, value in read_json(folder / "result.json").items() if key != "weights"},
        "images_per_second": statistics.median(speeds or [0.0]),
        "minutes": _minutes(trained, config.engine.batch_size) if alone and speeds else None,
        "evaluations": [row for row in rows if row["kind"] == "eval"],
        "train": [[row["step"], row["epoch"], round(row["loss"], 4)] for row in trained],
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    _write(record, content)


def _arguments(command: str) -> list[str]:
    """Return the key=value arguments of a recorded command, without those that name folders of one machine."""
    keys = [text for text in shlex.split(command) if re.match(r"[\w.]+=", text)]
    return [text for text in keys if text.split("=")[0] not in ("data.root", "run_dir", "resume")]


def _start(start: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the facts about a start of a run that its record keeps."""
    from torch import device

    from moa_train.runtime.precision import Precision

    kind, chosen = start["choices"]["device"], start["choices"]["values"]
    precision = Precision.resolve(chosen.get("runtime.precision", config.runtime.precision), device(kind)).name
    facts = {key: start[key] for key in ("started", "code", "versions", "hardware")}
    return {**facts, "device": kind, "precision": precision}


def _minutes(trained: list[dict[str, Any]], batch_size: int) -> float:
    """Return the minutes of all updates, without evaluations and interruptions."""
    known = [row["images_per_second"] for row in trained if row["images_per_second"]]
    seconds, step = 0.0, 0
    for row in trained:
        seconds += (row["step"] - step) * batch_size / (row["images_per_second"] or known[0])
        step = row["step"]
    return round(seconds / 60, 4)


@cache
def model_cost(*arguments: str) -> dict[str, int]:
    """Return parameters and multiply-accumulates of the model that arguments of moa-train describe."""
    from hydra.core.config_store import ConfigStore

    from moa_train.cli.compose import compose, config_roots, typed
    from moa_train.plugins import DATASETS
    from moa_train.schema import RunConfig

    if machine := [text for text in arguments if text.startswith("runtime.")]:  # as well as the seed
        return model_cost(*(text for text in arguments if text not in machine))
    store = ConfigStore.instance()
    store.store(name="train_schema", node=RunConfig)
    store.store(group="hydra/help", name="train_help", node={})
    config = typed(compose("train", [*arguments, "data.root=."], config_roots([])))  # no image is read
    return _summary(config, DATASETS.load(config.data.name).num_classes)


def _summary(config: Any, classes: int) -> dict[str, int]:
    from moa_train.model.summary import summarize
    from moa_train.schema import image_shape

    found = summarize(config.model, image_size=image_shape(config.data.image_size), num_classes=classes)
    return {"parameters": found.total_parameters, "macs": found.total_macs}


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text())


def _write(path: Path, record: dict[str, Any]) -> None:
    """Write a record: a line per key, and per item of a list, such as an evaluation or a logged loss."""

    def text(value: Any) -> str:
        items = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        return f"[\n  {items}\n ]" if items else json.dumps(value)

    lines = ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in record.items())
    write_whole(path, f"{{\n{lines}\n}}\n")
