#!/usr/bin/env python3
"""Run the experiments of tables.yaml, and write their tables into docs/RESULTS.md.

python scripts/tables.py run TABLE[,TABLE...] [seeds=0,1,2] [jobs=1] [key=value ...]
    Train what is missing, and keep its records. Several jobs at once make use of a GPU, which one small run would not.
python scripts/tables.py write
    Write docs/RESULTS.md from these records.

The records of a run (docs/results/RECIPE/ROW-sSEED.json) are kilobytes: its settings, versions, hardware, evaluations
and result. Every figure between the marks of docs/RESULTS.md comes from them.
"""

import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from scipy import stats

from moa_train.runtime.files import write_whole
from moa_train.tracking.jsonl import read_rows

ROOT = Path(__file__).resolve().parents[1]
RUNS, RECORDS, RESULTS = ROOT / "outputs", ROOT / "docs" / "results", ROOT / "docs" / "RESULTS.md"


@dataclass(frozen=True)
class Row:
    """A row of a table: a recipe with further settings."""

    label: str
    recipe: str
    name: str = "base"
    settings: list[str] = field(default_factory=list)
    split: str = "test"
    """The images on which the table compares accuracies: test, or the held-out val."""

    def path(self, folder: Path, seed: int) -> Path:
        """Return the place of the run of a seed below ``folder``."""
        return folder / self.recipe / f"{self.name}-s{seed}"

    def record(self, seed: int) -> Path:
        """Return the file of a seed's records."""
        return self.path(RECORDS, seed).with_suffix(".json")

    def records(self) -> dict[int, dict[str, Any]]:
        """Return the records of all seeds that have been run."""
        found = (RECORDS / self.recipe).glob(f"{self.name}-s*.json")
        return {record["seed"]: record for record in sorted(map(_read, found), key=lambda record: record["seed"])}


def tables() -> dict[str, tuple[str, list[Row]]]:
    """Return title and rows of every table."""
    content = yaml.safe_load((ROOT / "scripts" / "tables.yaml").read_text())
    return {name: (table["title"], [_row(table, row) for row in table["rows"]]) for name, table in content.items()}


def _row(table: dict[str, Any], row: dict[str, Any]) -> Row:
    """Return a row with what all rows of its table share."""
    shared = {key: table[key] for key in ("recipe", "split") if key in table}
    return Row(**{**shared, **row, "settings": [*table.get("settings", []), *row.get("settings", [])]})


def run(names: str, arguments: list[str]) -> None:
    """Train every row for every seed, and keep the records of finished runs."""
    if unknown := set(names.split(",")) - tables().keys():
        sys.exit(f"error: there is no table {min(unknown)!r}. Tables: {', '.join(tables())}.")
    own = {"seeds": "0,1,2,3,4", "jobs": "1"}
    own |= {key: value for key, _, value in (text.partition("=") for text in arguments) if key in own}
    settings = [text for text in arguments if text.split("=")[0] not in own]
    rows = {(row.recipe, row.name): row for name in names.split(",") for row in tables()[name][1]}.values()
    pending = [(row, int(seed)) for seed in own["seeds"].split(",") for row in rows]  # pairs of a seed soon complete
    running: dict[subprocess.Popen[bytes], tuple[Row, int]] = {}
    failed = 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
    try:
        while running or (pending and not failed):
            while pending and not failed and len(running) < int(own["jobs"]):
                row, seed = pending.pop(0)
                if not row.record(seed).exists():
                    running[start(row, seed, settings, log=own["jobs"] != "1")] = row, seed
            for process in [process for process in running if process.poll() is not None]:
                row, seed = running.pop(process)
                failed = failed or process.returncode
                if not process.returncode:
                    keep(row.path(RUNS, seed), row.record(seed), seed)
            time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()  # saves a checkpoint
        for process in running:
            process.wait()
    if failed:
        sys.exit(failed)


def start(row: Row, seed: int, settings: list[str], log: bool) -> subprocess.Popen[bytes]:
    """Start or resume a run; its output goes to this terminal, or to a file next to its folder."""
    folder = row.path(RUNS, seed)
    launch = shlex.split(os.environ.get("LAUNCH", "moa-train"))
    keys = [f"experiment={row.recipe}", f"runtime.seed={seed}", *row.settings, *settings]
    command = [*launch, *keys, f"run_dir={folder.relative_to(ROOT)}", "resume=auto"]
    print(shlex.join(command), flush=True)
    if not log:
        return subprocess.Popen(command, cwd=ROOT)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def keep(folder: Path, record: Path, seed: int) -> None:
    """Write the record of a finished run."""
    starts = _read(folder / "provenance.json")
    rows = read_rows(folder / "metrics.jsonl")
    trained = [row for row in rows if row["kind"] == "train"]
    speeds = [row["images_per_second"] for row in trained if row["images_per_second"]]  # the first row has none
    record.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "seed": seed,
        "command": " ".join(["moa-train", *_arguments(starts[0]["command"])]),
        "starts": [{key: start[key] for key in ("started", "code", "versions", "hardware")} for start in starts],
        "result": {key: value for key, value in _read(folder / "result.json").items() if key != "weights"},
        "images_per_second": statistics.median(speeds or [0.0]),
        "evaluations": [row for row in rows if row["kind"] == "eval"],
        "train": [[row["step"], row["epoch"], round(row["loss"], 4)] for row in trained],
    }
    write_whole(record, json.dumps(content, indent=1) + "\n")


def _arguments(command: str) -> list[str]:
    """Return the key=value arguments of a recorded command, without those that name folders of one machine."""
    keys = [text for text in shlex.split(command) if re.match(r"[\w.]+=", text)]
    return [shlex.quote(text) for text in keys if text.split("=")[0] not in ("data.root", "run_dir", "resume")]


def write() -> None:
    """Replace every table in docs/RESULTS.md by the current one."""
    text = RESULTS.read_text()
    for name, (title, rows) in tables().items():
        block = f"<!-- {name} -->\n{markdown(name, title, rows)}\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL)
    write_whole(RESULTS, text)


def markdown(name: str, title: str, rows: list[Row]) -> str:
    """Return a table in Markdown: mean and standard deviation over seeds, and paired differences from the first row."""
    lines = [f"**{title}**", "", f"`scripts/reproduce.sh {name}`", ""]
    images = {"test": "test", "val": "held-out"}[rows[0].split]
    lines += [f"| | seeds | {images} top-1 (%) | difference, paired by seed | |", "| --- | ---: | ---: | ---: | --- |"]
    reference = accuracies(rows[0])
    for index, row in enumerate(rows):
        found = accuracies(row)
        lines.append(f"| {row.label} | {len(found) or ''} | {mean(list(found.values()))} | ")
        lines[-1] += f"{difference(found, reference)} |" if index else "reference | |"
    return "\n".join(lines)


def accuracies(row: Row) -> dict[int, float]:
    """Return the top-1 accuracy by seed."""
    return {seed: record["result"][row.split]["top1"] for seed, record in row.records().items()}


def mean(values: list[float]) -> str:
    """Return mean and standard deviation, or what there is of them."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def difference(found: dict[int, float], reference: dict[int, float]) -> str:
    """Return the mean difference over common seeds with its 95% t interval, and whether it is within noise."""
    differences = [found[seed] - reference[seed] for seed in sorted(found.keys() & reference.keys())]
    if len(differences) < 2:
        return " | "
    low, high = interval(differences)
    verdict = "within noise" if low <= 0 <= high else "worse" if high < 0 else "better"
    return f"{statistics.fmean(differences):+.2f} ({low:+.2f} to {high:+.2f}, n = {len(differences)}) | {verdict}"


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the 95% confidence interval of the mean, by Student's t distribution."""
    center, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return center - half, center + half


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", names, *arguments]:
            run(names, arguments)
        case ["write"]:
            write()
        case _:
            sys.exit(__doc__)
