"""Read run folders for a comparison. Nothing is executed, and runs may be active meanwhile."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from moa_train.assembly.commands import command
from moa_train.engine.predictions import Outcomes, predictions_file
from moa_train.plugins import short_name
from moa_train.runs.folder import SweepFolder, status
from moa_train.runtime.errors import UserError
from moa_train.schema import RunConfig
from moa_train.serialization import from_dict
from moa_train.tracking.jsonl import Row, read_rows

log = logging.getLogger(__name__)

NOT_COMPARED = (
    *("run_dir", "resume", "replay", "preflight", "code", "sweep.", "tracking.", "runtime.timeout"),
    *("data.root", "data.download", "data.url", "data.workers", "data.unreadable_budget", "data.max_seconds"),
    *("engine.save_every", "engine.keep_", "engine.eval_batch_size"),
)
"""Settings, or prefixes of settings, that do not distinguish two runs."""
SEED = "runtime.seed"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        path: the run folder.
        config: all settings by dotted key.
        status: see `folder.status`.
        rows: the content of metrics.jsonl.
        result: the content of result.json; empty if the run is not finished.
        origin: the newest start in provenance.json.
    """

    path: Path
    config: Mapping[str, Any]
    status: str
    rows: Sequence[Row]
    result: Mapping[str, Any]
    origin: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the name of the run folder."""
        return self.path.resolve().name

    @property
    def seed(self) -> Any:
        """Return the seed of the run."""
        return self.config.get(SEED)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that distinguish runs, without the seed."""
        return {key: value for key, value in self.config.items() if key != SEED and not key.startswith(NOT_COMPARED)}

    @property
    def best_by(self) -> str:
        """Return the name of the metric that chooses the best checkpoint."""
        return short_name(str(self.config.get("engine.best_by", "top1")))

    def command(self, program: str, **settings: object) -> str:
        """Return a shell command with these settings and, as ``code=``, the user's own packages that the run imports.

        If another version of moa-train wrote the configuration, ``code=`` is left out.
        """
        try:
            config = from_dict(_json(self.path / "config.json", dict))
        except UserError:
            config = RunConfig()
        return command(program, config, **settings)

    @property
    def step(self) -> int:
        """Return the number of updates so far."""
        return max((row["step"] for row in self.rows), default=0)

    def curve(self, kind: str, metric: str, split: str | None = None) -> list[tuple[float, float]]:
        """Return (step, value) of the rows of a kind, ``train`` or ``eval``, that have a value."""
        return [
            (row["step"], row[metric])
            for row in self.rows
            if row.get("kind") == kind
            and isinstance(row.get(metric), int | float)
            and (kind == "train" or row.get("split") == split)
        ]

    @property
    def selection(self) -> str:
        """Return the split that chooses the best checkpoint, or ``none``."""
        return next((str(row["split"]) for row in reversed(self.rows) if "best" in row), "none")

    def best(self, metric: str, split: str) -> float | None:
        """Return the value of a metric at the best evaluation so far, or None if another split chooses checkpoints."""
        chosen = [row for row in self.rows if row.get("best") is True and row.get("split") == split]
        value = chosen[-1].get(metric) if chosen else None
        return float(value) if isinstance(value, int | float) else None

    def final(self, split: str, metric: str) -> float | None:
        """Return a metric of the final result on a split, or None if there is none."""
        value = self.result.get(split)
        value = value.get(metric) if isinstance(value, Mapping) else None
        return float(value) if isinstance(value, int | float) else None

    def data(self, split: str) -> Mapping[str, Any]:
        """Return the description of a split of the data, empty if the run did not open it."""
        found = self.origin.get("data", {}).get(split, {})
        return found if isinstance(found, Mapping) else {}

    @property
    def images_per_second(self) -> float | None:
        """Return the median speed of training."""
        return _middle([row.get("images_per_second") for row in self.rows if row.get("kind") == "train"])

    @property
    def memory(self) -> float | None:
        """Return the peak memory of rank 0 in bytes."""
        values = [row["memory"] for row in self.rows if isinstance(row.get("memory"), int | float)]
        return max(values, default=None)

    @property
    def training_seconds(self) -> float | None:
        """Return the time of the updates so far at the median speed, without evaluations and interruptions."""
        speed, batch = self.images_per_second, self.config.get("engine.batch_size")
        return self.step * batch / speed if speed and isinstance(batch, int) else None

    @property
    def machine(self) -> str:
        """Return a description of the hardware."""
        hardware = self.origin.get("hardware", {})
        return ", ".join(hardware.get("gpus") or [f"{hardware.get('cpu')}, {hardware.get('cores')} cores"])

    @cached_property
    def _outcomes(self) -> dict[str, Outcomes]:
        return {}

    def outcomes(self, split: str) -> Outcomes | None:
        """Return the outcome of every image of a split, or None if no evaluation recorded them.

        Raises:
            UserError: the file is damaged.
        """
        path = predictions_file(self.path, split)
        if split not in self._outcomes:
            if not path.is_file():
                return None
            self._outcomes[split] = Outcomes.read(path)
        return self._outcomes[split]


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: it is not a run folder, or a file in it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder.")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run folder: it has no config.json.")
    config, starts = _json(path / "config.json", dict), _json(path / "provenance.json", list)
    result = _json(path / "result.json", dict)
    log_file = path / "metrics.jsonl"
    rows = read_rows(log_file) if log_file.is_file() else []
    origin = starts[-1] if starts and isinstance(starts[-1], dict) else {}
    return Run(path, dict(_flat(config, "")), status(path), rows, result, origin)


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read runs and the runs of sweeps, in their order, and return them with notes about those that are left out.

    Args:
        paths: run folders, or folders of run folders.

    Raises:
        UserError: a folder holds no run, or a run that was named is damaged.
    """
    runs: dict[Path, Run] = {}
    notes: list[str] = []
    for path in paths:
        if not path.is_dir() or (path / "config.json").is_file():
            runs[path.resolve()] = read_run(path)
            continue
        inside = sorted(child.parent for child in path.glob("*/config.json"))
        if not inside:
            raise UserError(f"{path} holds no run yet: neither it nor a folder in it has a config.json.")
        for folder in inside:
            try:
                runs[folder.resolve()] = read_run(folder)
            except UserError as error:
                notes.append(f"{error} This run is left out.")
        states = [status(path / name) for name in SweepFolder(path).jobs() if path / name not in inside]
        if states:
            counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
            notes.append(f"{len(states)} more runs of {path} have not started to train ({counts}).")
    if not runs:
        raise UserError("None of the runs can be read:\n" + "\n".join(notes))
    return list(runs.values()), notes


def _json(path: Path, kind: type) -> Any:
    """Return the content of a file, or an empty object if it does not exist."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}).") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} is damaged: it holds no {kind.__name__}.")
    return content


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        pairs += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return pairs


def _middle(values: Sequence[Any]) -> float | None:
    numbers = [value for value in values if isinstance(value, int | float)]
    return median(numbers) if numbers else None
