"""A logger: one line of text per evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_train.knobs import knob
from moa_train.tracking.logger import Logger, Metrics


@dataclass
class NotesArgs:
    file: str = knob("notes.txt", "name of the file in the run folder")


class Notes(Logger):
    def __init__(self, run_dir: Path, first_step: int, config: Mapping[str, Any], args: NotesArgs) -> None:
        self.path = run_dir / args.file
        kept = self.path.read_text().splitlines() if self.path.exists() else []
        # A resumed run repeats its steps from first_step on.
        kept = [line for line in kept if int(line.split()[0]) < first_step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        with self.path.open("a") as file:
            file.write(f"{step} {split} top-1 {metrics['top1']:.2f}\n")
