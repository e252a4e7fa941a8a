"""Weights & Biases, offline or online. A training never waits for it."""

import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from moa_train.knobs import knob
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_whole
from moa_train.runtime.libraries import require
from moa_train.tracking.jsonl import read_rows
from moa_train.tracking.logger import Logger, Metrics, numbers

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "WANDB_PROJECT": "moa-train",
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_ERROR_REPORTING": "false",  # without a network, sending error reports delays the exit by 12 seconds
    "WANDB_INIT_TIMEOUT": "20",
    "WANDB_FINISH_TIMEOUT": "20",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
}
"""Defaults of wandb's own environment variables. A variable that the user has set keeps its value."""

CLOSE_TIMEOUT = 90.0
"""Seconds to wait for the thread at the end, in case wandb ignores its own timeouts."""


@dataclass
class WandBArgs:
    """Settings of the logger ``wandb``."""

    project: str | None = knob(None, "project (default: WANDB_PROJECT, or moa-train)")
    entity: str | None = knob(None, "user or team that owns the project (default: the user's default entity)")
    name: str | None = knob(None, "name of the run (default: the name of the run folder)")
    mode: str | None = knob(
        None,
        "online, or offline to upload the run later with 'wandb sync' (default: WANDB_MODE, or online)",
        options=("online", "offline"),
    )
    group: str | None = knob(None, "group that the run is shown in, such as the seeds of one experiment")
    tags: list[str] = knob([], "tags of the run")


class WandB(Logger):
    """Log to Weights & Biases from a thread of its own, under a run ID that the run folder keeps in ``wandb-id``.

    Every start of a run logs the rows of metrics.jsonl again, so that W&B has the whole curve even if a kill or a lost
    network cost it some rows. No step appears twice. Online, W&B resumes the run and ignores every step up to its last
    one, also steps that a rollback or other settings have changed since; metrics.jsonl has their new rows. Offline, the
    new files replace those of the previous start; if these may have been uploaded already, the new files get a new run
    ID, because 'wandb sync' would append their rows to the uploaded ones. If W&B can't be reached at the start, the run
    is logged offline. Failures are warnings.
    """

    def __init__(self, run_dir: Path, first_step: int, config: Mapping[str, Any], args: WandBArgs) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        require("The logger wandb", ["wandb"], "wandb")
        import wandb

        mode = args.mode or wandb.setup().settings.mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError(
                "The logger wandb has no API key. Run 'wandb login', set WANDB_API_KEY, or log offline with "
                "tracking.args.wandb.mode=offline."
            )
        self._folder, path = run_dir / "wandb", run_dir / "wandb-id"
        uploaded = [*self._folder.glob("run-*"), *self._folder.glob("offline-run-*/*.synced")]
        if not path.exists() or (mode == "offline" and uploaded):
            write_whole(path, secrets.token_hex(4))
        self._settings: dict[str, Any] = {
            "mode": mode,
            "project": args.project,
            "entity": args.entity,
            "name": args.name or run_dir.resolve().name,
            "group": args.group,
            "tags": args.tags,
            "id": path.read_text(),
            "resume": "allow" if mode == "online" else None,
            "dir": str(run_dir),
            "config": dict(config),
            "allow_val_change": True,  # a resumed run may have other settings
            "reinit": "create_new",  # a rollback opens the run again in the same process
        }
        self._queue: SimpleQueue[tuple[int | None, dict[str, float]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()
        for row in read_rows(run_dir / "metrics.jsonl"):
            self._put(row.pop("step"), row.get("split", "train"), row)

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Log ``train/NAME`` for each number."""
        self._put(step, "train", metrics)

    def log_eval(self, step: int, metrics: Metrics, split: str = "val") -> None:
        """Log ``SPLIT/NAME`` for each number."""
        self._put(step, split, metrics)

    def close(self, final: Metrics | None = None) -> None:
        """Write final metrics to the summary, and give W&B a limited time to upload the rest."""
        self._put(None, "final", final or {})
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT)

    def _put(self, step: int | None, prefix: str, metrics: Metrics) -> None:
        if self._thread.is_alive():
            self._queue.put((step, numbers(prefix, metrics)))

    def _run(self) -> None:
        try:
            run = self._open()
            while (item := self._queue.get()) is not None:
                step, values = item
                if step is None:
                    run.summary.update(values)
                else:
                    run.log(values, step=step)
            run.finish()
        except Exception as error:
            log.warning(
                "Weights & Biases failed: %s\nThe training is not affected. metrics.jsonl has all rows, and "
                "resuming the run logs them again.",
                error,
            )

    def _open(self) -> Any:
        import wandb

        for previous in self._folder.glob("offline-run-*"):
            shutil.rmtree(previous)
        try:
            return wandb.init(**self._settings)
        except Exception as error:
            if self._settings["mode"] == "offline":
                raise
            log.warning(
                "Weights & Biases can't be reached: %s\nThe run is logged offline instead. To upload it later: "
                "wandb sync %s/offline-run-*",
                error,
                self._folder,
            )
            return wandb.init(**{**self._settings, "mode": "offline", "id": None, "resume": None})
