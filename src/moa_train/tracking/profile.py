"""A trace of some steps by torch's profiler, for ui.perfetto.dev or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from moa_train.runtime.files import writing
from moa_train.tracking.logger import Logger, Metrics

WARMUP = 3
"""Steps before the trace starts; the first steps allocate memory and select kernels."""


class Profile(Logger):
    """Trace ``steps`` steps after ``WARMUP`` others and write them to ``path``, gzipped.

    Create this logger last: everything between its creation and the first step is counted as part of that step. If the
    session ends early, the trace has fewer steps.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self._path = path
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profiler: profile | None = profile(
            activities=activities,
            schedule=schedule(wait=1, warmup=WARMUP - 1, active=steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._last = WARMUP + steps
        self._done = 0
        self._profiler.start()

    def advance(self, step: int) -> None:
        """Start the next step of the trace."""
        if self._profiler is None:
            return
        self._done += 1
        self._profiler.step()
        if self._done == self._last:
            self.close()

    def close(self, final: Metrics | None = None) -> None:
        """Stop tracing and write the trace."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: profile) -> None:
        with writing(self._path):
            profiler.export_chrome_trace(str(self._path))
