"""The folder of a sweep: its command in sweep.json, and one run folder per job.

outputs/sweep-20260131-120000/
    sweep.json           the arguments of the command, with which ``moa-train -m sweep.dir=FOLDER`` continues it, and
                         the names of the jobs of a grid
    trials.jsonl         the journal of Optuna, if sweep.trials is set
    lr-0.001_seed-0/     a run folder, in which status.json records a failure or an early stop of the run
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_whole
from moa_train.runtime.lock import RunLock, holder
from moa_train.tracking.jsonl import Row, read_rows

FILE = "sweep.json"
STATUS = "status.json"
LONGEST = 120
"""Characters of a folder name. File systems allow 255 bytes."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep: the name of its folder, and the arguments that distinguish it."""

    name: str
    overrides: Sequence[str]


def named(jobs: Sequence[Sequence[str]], swept: Sequence[str]) -> list[Job]:
    """Return the jobs with folder names made of the swept keys, such as ``lr-0.001_seed-0``.

    Args:
        jobs: the arguments of each job.
        swept: the keys that distinguish the jobs.
    """
    leaves = [key.rpartition(".")[2] for key in swept]
    short = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(swept, leaves, strict=True)}
    names = []
    for job in jobs:
        pairs = [text.lstrip("+").partition("=") for text in job]
        name = "_".join(f"{short[key]}-{value}" for key, _, value in pairs if key in short)
        names.append(re.sub(r"[^\w.+%-]+", "-", name) or "run")  # without characters that a shell or Hydra interprets
    digests = [hashlib.sha256(json.dumps(list(job)).encode()).hexdigest()[:8] for job in jobs]
    unique = [
        name if len(name) <= LONGEST and names.count(name) == 1 else f"{name[:LONGEST]}-{digest}"
        for name, digest in zip(names, digests, strict=True)
    ]
    return [Job(name, job) for name, job in zip(unique, jobs, strict=True)]


class SweepFolder:
    """A sweep on disk. Several processes, also on several machines, may work on one sweep: each job has a lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def arguments(self) -> list[str] | None:
        """Return the recorded arguments of the sweep, or None if the folder holds no sweep.

        Raises:
            UserError: sweep.json is damaged.
        """
        path = self.path / FILE
        try:
            arguments = json.loads(path.read_text())["arguments"]
            return [str(text) for text in arguments]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}). Restore it, or choose another sweep.dir.") from error

    def jobs(self) -> list[str]:
        """Return the names of the jobs of a grid, or an empty list if they are not known."""
        try:
            return [str(name) for name in json.loads((self.path / FILE).read_text())["jobs"]]
        except (ValueError, KeyError, TypeError, OSError):
            return []

    def record(self, arguments: Sequence[str], jobs: Sequence[Job] = ()) -> None:
        """Write sweep.json."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot create the folder {self.path} of the sweep: {error.strerror}. Choose another sweep.dir."
            ) from error
        content = {"arguments": list(arguments), "jobs": [job.name for job in jobs]}
        write_whole(self.path / FILE, json.dumps(content, indent=1) + "\n")

    def run_dir(self, name: str) -> Path:
        """Return the run folder of a job."""
        return self.path / name

    @contextmanager
    def hold(self, name: str, runs: Sequence[str]) -> Iterator[bool]:
        """Reserve a job or a trial with its runs, and yield whether no other process has it."""
        with ExitStack() as held:
            try:
                held.enter_context(RunLock(self.path / ".jobs" / name))
                for run in runs:  # a run may have outlived the sweep that started it
                    with RunLock(self.run_dir(run)):
                        pass
                free = True
            except UserError:
                free = False
            yield free


def mark(run_dir: Path, status: str | None, **details: Any) -> None:
    """Record that a run has failed or was pruned, or remove this record."""
    if status is None:
        (run_dir / STATUS).unlink(missing_ok=True)
    else:
        write_whole(run_dir / STATUS, json.dumps({"status": status, **details}) + "\n")


def is_finished(run_dir: Path) -> bool:
    """Return whether a run has its final result."""
    return (run_dir / "result.json").is_file()


def status(run_dir: Path) -> str:
    """Return finished, running, failed, pruned, stopped (it can be resumed) or waiting."""
    if is_finished(run_dir):
        return "finished"
    if holder(run_dir) is not None:
        return "running"
    try:
        return str(json.loads((run_dir / STATUS).read_text())["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return "stopped" if (run_dir / "metrics.jsonl").is_file() else "waiting"


def scores(run_dir: Path, metric: str) -> list[tuple[int, float]]:
    """Return number, from 1, and value of the evaluations that choose the best checkpoint of a run.

    Evaluations without a finite value count, but are left out.
    """
    path = run_dir / "metrics.jsonl"
    rows: list[Row] = read_rows(path) if path.is_file() else []
    values = [row.get(metric) for row in rows if "best" in row]
    return [(number, value) for number, value in enumerate(values, 1) if value is not None]
