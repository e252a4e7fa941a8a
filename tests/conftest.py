"""Fixtures for tiny real trainings: a MOA-Transformer with 50,000 parameters, scikit-learn's digits, a few steps."""

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# When pytest runs in the background, it and its child processes would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

TINY = {
    "data.limit": "100",  # an epoch is 3 1/8 steps
    "data.val_fraction": "0.1",
    "model.embed_dim": "32",
    "model.depths": "[1,1]",
    "model.heads": "[1,2]",
    "model.window": "4",
    "model.dropout": "0.1",
    "model.moa.reduction": "8",
    "augment.mixup": "0.8",
    "optim.name": "muon",
    "schedule.duration": "12 steps",
    "schedule.warmup": "2 steps",
    "engine.batch_size": "32",
    "engine.ema_decay": "0.9",
    "engine.eval_every": "4 steps",
    "engine.save_every": "4 steps",
    "tracking.log_every": "3",
    "tracking.loggers": "[]",
    "tracking.progress": "plain",
    "tracking.images": "0",
    "runtime.device": "cpu",
    "runtime.precision": "fp32",
    "runtime.deterministic": "true",
    "runtime.threads": "1",
}


def overrides(changes: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in {**TINY, **changes}.items()]


@pytest.fixture(scope="session")
def no_waits() -> Callable[[], AbstractContextManager[None]]:
    """A context manager in which every operation that makes the host wait for the GPU raises an error."""
    import torch

    def set_mode(name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # warns that this feature is a prototype
            torch.cuda.set_sync_debug_mode(name)

    @contextmanager
    def context() -> Iterator[None]:
        set_mode("error")
        try:
            yield
        finally:
            set_mode("default")

    return context


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """A function that takes changes, such as ``{"optim.lr": 1e-4}``, and returns the configuration of a tiny run."""
    from moa_train.cli.train import with_overrides
    from moa_train.schema import RunConfig

    return lambda changes=(): with_overrides(RunConfig(), overrides(dict(changes)))


@pytest.fixture(scope="session")
def train(tiny: Callable[..., Any]) -> Callable[..., int]:
    """A function that runs moa-train in this process: it takes a run folder and changes, and returns the exit code."""
    import torch

    from moa_train.cli.train import train as run
    from moa_train.runtime.seed import set_deterministic
    from moa_train.schema import RunConfig

    def go(run_dir: Path | None, *, resume: bool = False, **changes: Any) -> int:
        changes = {
            key.replace("__", "."): str(value) if isinstance(value, Path) else value for key, value in changes.items()
        }
        if resume:
            config, typed = RunConfig(resume=str(run_dir)), [f"{key}={value}" for key, value in changes.items()]
        else:
            config, typed = tiny(changes), []
            config.run_dir = str(run_dir) if run_dir else None
            config.init, config.init_head = changes.get("init"), changes.get("init_head", "strict")
        try:
            return int(run(config, typed))
        finally:
            set_deterministic(False)
            torch.set_num_threads(1)

    return go


@pytest.fixture(scope="session")
def outcome() -> Callable[..., dict[str, Any]]:
    """A function that returns everything that a repetition of a run must reproduce, for the newest or a given step."""
    from moa_train.engine.checkpoint import CheckpointStore
    from moa_train.tracking.jsonl import MACHINE_FIELDS, read_rows

    def read(run_dir: Path, step: int | None = None) -> dict[str, Any]:
        store = CheckpointStore(run_dir)
        checkpoint = store.newest() if step is None else store.at(step)
        assert checkpoint is not None
        tensors = {
            f"{part}/{name}": (str(tensor.dtype), tuple(tensor.shape), tensor.numpy().tobytes())
            for part in ("model", "ema", "optimizer")
            if part in checkpoint
            for name, tensor in checkpoint.tensors(part).items()
        }
        rows = [
            {k: v for k, v in row.items() if k not in MACHINE_FIELDS} for row in read_rows(run_dir / "metrics.jsonl")
        ]
        return {"step": checkpoint.step, "tensors": tensors, "state": checkpoint.state["train"], "rows": rows}

    return read


@pytest.fixture(scope="session")
def straight(train: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run; tests must not change it."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    assert train(run_dir) == 0
    return run_dir


@pytest.fixture(scope="session")
def two_ranks(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of engine/two_ranks.py: runs on one process and on two gloo ranks."""
    from moa_train.serialization import to_dict

    folder = tmp_path_factory.mktemp("two_ranks")
    for name, changes in (("whole", {}), ("first", {"engine.stop_after": "5 steps"})):
        config = tiny({**changes, "engine.micro_batch_size": 8})
        config.run_dir = str(folder / name)
        (folder / f"{name}.json").write_text(json.dumps(to_dict(config)))
    script = str(Path(__file__).parent / "engine" / "two_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, str(folder)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def make_classes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A function that writes a tree of PNG files with the given number of classes, and returns its root."""
    from PIL import Image
    from sklearn.datasets import load_digits

    def make(classes: int) -> Path:
        digits, root = load_digits(), tmp_path_factory.mktemp("classes")
        for label in range(classes):
            rows = [row for row in range(len(digits.target)) if digits.target[row] == label][:20]
            for number, row in enumerate(rows):
                split = "test" if number < 4 else "val" if number < 7 else "train"
                folder = root / split / f"class{label}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray((digits.images[row] * 15).astype("uint8")).save(folder / f"{number:02}.png")
        return root

    return make
