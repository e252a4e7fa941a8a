"""Run the jobs of a sweep, each in a process of its own, so that a crash ends one job only."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from moa_train.runs.folder import Job, SweepFolder, is_finished, mark
from moa_train.runtime.command_line import hydra_quoted
from moa_train.runtime.signals import Exit, StopSignals

POLL = 0.5
"""Seconds between checks of a running job."""
STOPPED = (Exit.STOPPED, Exit.INTERRUPTED)


@dataclass
class Runner:
    """Starts jobs one after the other, and passes stop signals to the one that runs.

    Attributes:
        arguments: the arguments that all jobs share.
        ranks: processes per job; several are started by torchrun.
        stop: the exit code with which the sweep ends because of a signal, or None.
    """

    folder: SweepFolder
    arguments: Sequence[str]
    ranks: int = 1
    stop: int | None = None
    outcomes: dict[str, str] = field(default_factory=dict)
    """What became of each job so far, by name."""
    codes: list[int] = field(default_factory=list)

    def command(self, job: Job) -> list[str]:
        """Return the command that starts or resumes a job."""
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        run_dir = hydra_quoted(str(self.folder.run_dir(job.name)))
        words = [sys.executable, *(launch if self.ranks > 1 else []), "-m", "moa_train.cli.train"]
        return [*words, *self.arguments, *job.overrides, f"run_dir={run_dir}", "resume=auto"]

    def run(self, job: Job, title: str, prune: Callable[[Path], bool] = lambda run_dir: False) -> bool:
        """Run a job to its end unless it is finished, and return whether it is finished now.

        Args:
            job: the job.
            title: its place in the sweep, such as ``run 3 of 6``.
            prune: is asked regularly whether to stop the run early; it saves a checkpoint.
        """
        run_dir = self.folder.run_dir(job.name)
        line = f"{title}: {shlex.join(job.overrides)}"
        if is_finished(run_dir):
            self.outcomes[job.name] = "finished before"
            print(f"{line}: finished before", flush=True)
            return True
        print(f"\n{line}", flush=True)
        mark(run_dir, None)
        leaving = pruned = False
        process = subprocess.Popen(self.command(job))
        while (code := _wait(process)) is None:
            pruned = pruned or (self.stop is None and prune(run_dir))
            if (pruned or self.stop is not None) and not leaving:
                # SIGTERM even for Ctrl-C, which a terminal also sends to the job: a second SIGINT would quit unsaved.
                leaving = True
                process.terminate()
        if is_finished(run_dir):
            self.outcomes[job.name] = "finished"
            return True
        if pruned:
            mark(run_dir, "pruned")
            self.outcomes[job.name] = "pruned"
        elif self.stop is not None or code in STOPPED:
            self.stop = self.stop or code
            self.outcomes[job.name] = "stopped"
        else:
            mark(run_dir, "failed", exit=code)
            self.outcomes[job.name] = f"failed with exit code {code}"
            self.codes.append(code if code > 0 else int(Exit.FAILED))
        return False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """End the sweep on a stop signal: the running job saves and exits, and no other job starts."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.stop = int(Exit.STOPPED)

        ignored = [number for number in StopSignals.HANDLED if signal.getsignal(number) == signal.SIG_IGN]  # by nohup
        before = {number: signal.signal(number, handle) for number in StopSignals.HANDLED if number not in ignored}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(POLL)
    except subprocess.TimeoutExpired:
        return None


def run_grid(runner: Runner, jobs: Sequence[Job]) -> None:
    """Run the jobs in their order. Jobs that are finished, or that another process has reserved, are skipped."""
    for number, job in enumerate(jobs, 1):
        if runner.stop is not None:
            return
        with runner.folder.hold(job.name, [job.name]) as free:
            title = f"run {number} of {len(jobs)}"
            if free:
                runner.run(job, title)
            else:
                runner.outcomes[job.name] = "runs in another process"
                print(f"{title}: {shlex.join(job.overrides)}: runs in another process", flush=True)
