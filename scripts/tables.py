#!/usr/bin/env python3
"""Run the experiments of tables.yaml, and write their tables and figures into docs/RESULTS.md.

python scripts/tables.py run TABLE[,TABLE...] [seeds=0,1,2] [jobs=1] [key=value ...]
    Train the missing runs, and keep their records. Several jobs at once make use of a GPU, which one small run does
    not.
python scripts/tables.py write
    Write docs/RESULTS.md and its figures from these records.

The record of a run (docs/results/RECIPE/ROW-sSEED.json) holds its settings, versions, hardware, logged losses,
evaluations and result, but no weights. Every figure between the marks of docs/RESULTS.md comes from records.
"""

import os
import shlex
import signal
import subprocess
import sys
import time

import records
import results
from records import Row, tables

from moa_train.runtime.errors import UserError


def run(names: str, arguments: list[str]) -> None:
    """Train every row for every seed, and keep the records of finished runs."""
    if unknown := set(names.split(",")) - tables().keys():
        sys.exit(f"error: there is no table {min(unknown)!r}. Tables: {', '.join(tables())}.")
    own = {"seeds": "0,1,2,3,4", "jobs": "1"}
    own |= {key: value for key, _, value in (text.partition("=") for text in arguments) if key in own}
    settings = [text for text in arguments if text.split("=")[0] not in own]
    rows = {(row.recipe, row.name): row for name in names.split(",") for row in tables()[name].rows}.values()
    pending = [(row, int(seed)) for seed in own["seeds"].split(",") for row in rows]  # pairs of a seed soon complete
    running: dict[subprocess.Popen[bytes], tuple[Row, int]] = {}
    alone = own["jobs"] == "1"
    failed = 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
    try:
        while running or (pending and not failed):
            while pending and not failed and len(running) < int(own["jobs"]):
                row, seed = pending.pop(0)
                if not row.record(seed).exists():
                    running[start(row, seed, settings, log=not alone)] = row, seed
            for process in [process for process in running if process.poll() is not None]:
                row, seed = running.pop(process)
                failed = failed or process.returncode
                if not process.returncode:
                    records.keep(row.path(records.ROOT / "outputs", seed), row.record(seed), seed, alone)
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
    folder = row.path(records.ROOT / "outputs", seed)
    launch = shlex.split(os.environ.get("LAUNCH", "moa-train"))
    keys = [f"experiment={row.recipe}", f"runtime.seed={seed}", *row.settings, *settings]
    command = [*launch, *keys, f"run_dir={folder.relative_to(records.ROOT)}", "resume=auto"]
    print(shlex.join(command), flush=True)
    if not log:
        return subprocess.Popen(command, cwd=records.ROOT)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("ab") as file:
        return subprocess.Popen(command, cwd=records.ROOT, stdout=file, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case ["run", names, *arguments]:
                run(names, arguments)
            case ["write"]:
                results.write()
            case _:
                sys.exit(__doc__)
    except UserError as error:
        sys.exit(f"error: {error}")
