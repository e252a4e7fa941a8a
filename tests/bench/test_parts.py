"""The parts of moa-bench that train, each run once."""

from dataclasses import replace

import pytest
import torch

from moa_train.assembly.run import build_run
from moa_train.bench import checkpoint, loop, ranks, start
from moa_train.engine.checkpoint import CheckpointStore
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import StopSignals
from moa_train.tracking.jsonl import read_rows

LOGGED = {"tracking.loggers": "[tensorboard]", "tracking.log_every": "2"}


def test_the_trainer_and_the_bare_loop_alternate(job, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.tempfile, "TemporaryDirectory", lambda: Kept(tmp_path))
    (table,) = loop.prepare(job({**LOGGED, "engine.keep_last": "100"}, rounds=2, steps=4))()
    trainer, bare, ratio = table.rows
    assert [row.what for row in table.rows] == ["trainer", "bare", "trainer / bare"]
    assert len(trainer.values) == len(bare.values) == 2
    assert ratio.values == [mine / its for mine, its in zip(trainer.values, bare.values, strict=True)]
    # Measurements end before steps 2, 6 and 10. Each has a save in its middle and two log rows.
    store = CheckpointStore(tmp_path)
    assert [store.at(step).step for step in (4, 8, 11)] == [4, 8, 11]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6, 8, 10, 11]
    assert list((tmp_path / "tensorboard").iterdir())


class Kept:
    """A temporary folder that is not deleted."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return str(self.path)

    def __exit__(self, *error):
        pass


def test_the_bare_loop_makes_the_same_updates_as_the_trainer(job, tmp_path):
    changes = {"optim.name": "adamw", "model.dropout": 0, "model.drop_path": 0, "model.moa.drop_path": 0}
    work = job({**changes, "engine.micro_batch_size": 16, "schedule.name": "constant"})
    config = loop.training(work.config, steps=3)
    run = build_run(config, run_dir=tmp_path, distributed=Distributed(work.device), stop=StopSignals())
    bare = loop.BareLoop(run)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    bare(3)
    for parameter, old in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)  # the bare loop has its own copy
    run.trainer.fit()
    run.trainer.tracker.close()
    for mine, its in zip(bare.model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-5)


def test_checkpoint_measurements(job, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint.tempfile, "TemporaryDirectory", lambda: Kept(tmp_path))
    (table,) = checkpoint.prepare(job(rounds=2))()
    assert [row.what for row in table.rows] == [
        "training waits", "full save", "find and verify", "restore", "torch.save", "training waits / torch.save",
        "full save / torch.save",
    ]  # fmt: skip
    assert all(len(row.values) == 2 for row in table.rows)
    newest = CheckpointStore(tmp_path).newest()
    assert newest is not None
    assert newest.step == 6  # two measurements that save, each with a warmup and two rounds
    assert newest.tensors("optimizer")
    size = sum(path.stat().st_size for path in newest.path.iterdir())
    assert f"{size / 2**20:.1f} MiB" in table.title


def test_two_processes_are_compared_with_one(job):
    (table,) = ranks.prepare(job({"runtime.threads": 2}, steps=3))()
    several, one, ratio = table.rows
    assert (several.what, one.what) == ("2 processes", "one process")
    assert ratio.values == [several.values[0] / one.values[0]]
    assert "1 of 2 threads each, batch 32" in table.title


def test_errors_of_processes_are_reported(job):
    config = loop.training(job().config, 3)
    config.data.name, config.data.root = "folder", "missing"
    with pytest.raises(RuntimeError, match=r"(?s)1 process\(es\) failed.*missing"):
        ranks.launch(config, 1, 3)


def test_too_many_ranks_are_rejected(job):
    with pytest.raises(UserError, match=r"requires as many CPU threads, but there are only \d+"):
        ranks.prepare(job(ranks=1000))
    with pytest.raises(UserError, match=r"engine\.batch_size=31 is not a multiple of --ranks 2"):
        ranks.prepare(job({"engine.batch_size": 31, "runtime.threads": 2}))


def test_startup_is_measured(job):
    work = replace(job(), overrides=["data.limit=64", "engine.batch_size=32", "runtime=cpu"])
    (table,) = start.prepare(work)()
    assert [row.what for row in table.rows] == ["first step", "imports, model", "first step / imports, model"]
    assert all(row.values[0] > 0 for row in table.rows)


def test_errors_of_commands_are_reported():
    with pytest.raises(RuntimeError, match="no such thing"):
        start.until("built", ["-c", "raise SystemExit('no such thing')"])
