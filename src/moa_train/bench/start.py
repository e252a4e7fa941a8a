"""Compare the time from starting ``moa-train`` to its first step with that of imports and building the model."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from moa_train.assembly.checks import check_config
from moa_train.assembly.inputs import open_splits
from moa_train.bench.job import Job
from moa_train.bench.tables import Row, Table
from moa_train.bench.timing import alternate
from moa_train.runtime.distributed import Distributed
from moa_train.schema import image_shape

BASELINE = """
import json, sys, torch, torchvision
from moa_train.model.registry import create_model
from moa_train.schema import ModelConfig
from moa_train.serialization import from_dict
config, size, classes = json.loads(sys.argv[1])
create_model(from_dict(config, ModelConfig, "model."), image_size=tuple(size), num_classes=classes)
print("built", flush=True)
"""


def prepare(job: Job) -> Callable[[], Iterator[Table]]:
    """Check the configuration and the data, and return the function that yields one table."""
    check_config(job.config)
    open_splits(job.config, Distributed(job.device))
    return lambda: iter([_compare(job)])


def _compare(job: Job) -> Table:
    config = job.config
    model = [asdict(config.model), image_shape(config.data.image_size), job.num_classes]

    def product() -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = [
                f"run_dir={folder}/run",
                "engine.eval_split=none",
                "tracking.log_every=1",
                "tracking.progress=plain",
            ]
            return until("step 1/", ["-m", "moa_train.cli.train", *job.overrides, *settings])

    measures = {"first step": product, "imports, model": lambda: until("built", ["-c", BASELINE, json.dumps(model)])}
    alternate(measures, 1)  # fill the page cache
    rows = [Row(name, "s", seconds) for name, seconds in alternate(measures, job.rounds).items()]
    return Table("start", f"{config.model.title}, {config.data.name}", [*rows, rows[0].over(rows[1])])


def until(mark: str, arguments: Sequence[str]) -> float:
    """Run Python, return the seconds until it prints ``mark``, and terminate it."""
    lines: list[str] = []
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if mark in line:
                seconds = time.perf_counter() - started
                process.terminate()
                process.communicate()
                return seconds
    raise RuntimeError(f"python {' '.join(arguments)} ended without printing {mark!r}:\n{''.join(lines[-50:])}")
