"""A trace of some steps by torch's profiler, for chrome://tracing or ui.perfetto.dev."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from moa_train.tracking.writers import Metrics, Writer, writing

WARMUP = 3
"""Steps before the traced ones: in the first ones memory is taken and kernels are chosen."""


class Profile(Writer):
    """Traces ``steps`` steps after ``WARMUP`` others into ``path``, gzipped; fewer where the session ends before.

    Start it last: what happens between construction and the first step counts as part of that step.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.path = path
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
        """Pass on to the next step."""
        if self._profiler is None:
            return
        self._done += 1
        self._profiler.step()
        if self._done == self._last:
            self.close()

    def close(self, final: Metrics | None = None) -> None:
        """Stop tracing, and write what was traced."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: profile) -> None:
        with writing(self.path):
            profiler.export_chrome_trace(str(self.path))
