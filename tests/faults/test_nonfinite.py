"""Row 8: NaN and infinity on one of two ranks."""

import json

import pytest
from launch import TINY, Job, result, samples, state_hash, train_rows

from moa_train.engine.checkpoint import CheckpointStore

POINTS = ["step.loss", "step.gradient", "step.input"]


@pytest.mark.fault(8)
@pytest.mark.parametrize("what", POINTS)
def test_all_ranks_abort_and_the_run_resumes_from_before(tmp_path, whole_pair, what, draw, inject):
    run, step, rank = tmp_path / "run", draw.randint(1, 16), draw.randint(0, 1)
    job = Job(f"{TINY} run_dir={run}", tmp_path, ranks=2, faults=f"{what}=true@{step + 1}/{rank}")
    inject()
    said = job.ended(2)
    assert said.count(f"The gradient of step {step} is not finite") >= 2
    assert "Traceback" not in said
    report = json.loads((run / f"nonfinite-step-{step:08d}.json").read_text())
    seen = samples(whole_pair.parent / "samples")
    assert [micros[0]["index"] for micros in report["ranks"]] == [seen[step, rank][1] for rank in range(2)]
    newest = CheckpointStore(run).newest()
    assert (newest.step if newest else 0) <= step
    if what == "step.loss" and newest:
        replayed = Job(f"resume={run} replay={step}", tmp_path, ranks=2).ended(0)
        again = json.loads(replayed[replayed.index("{") : replayed.rindex("}") + 1])
        assert again["step"] == step
        assert [[micro["index"] for micro in micros] for micros in again["ranks"]] == [
            [micro["index"] for micro in micros] for micros in report["ranks"]
        ]
    Job(f"{TINY} run_dir={run} resume=auto", tmp_path, ranks=2).ended(0)
    assert result(run) == result(whole_pair)


@pytest.mark.fault(8)
def test_skip_continues_without_the_update(tmp_path, whole_pair, draw, inject):
    run, step = tmp_path / "run", draw.randint(1, 16)
    command = f"{TINY} run_dir={run} engine.nonfinite=skip engine.nonfinite_budget=1"
    Job(command, tmp_path, ranks=2, faults=f"step.loss=true@{step + 1}/1").ended(0)
    inject()
    assert CheckpointStore(run).newest().state["train"]["nonfinite"] == 1
    steps = train_rows(run)
    before = train_rows(whole_pair)
    assert steps[:step] == before[:step]
    assert [row["step"] for row in steps if row["loss"] is None] == [step + 1]
    assert state_hash(run) != state_hash(whole_pair)


@pytest.mark.fault(8)
def test_rollback_repeats_from_the_checkpoint_at_half_the_lr(tmp_path, whole, draw, inject):
    run, step = tmp_path / "run", draw.randint(4, 16)
    command = f"{TINY} run_dir={run} engine.nonfinite=rollback"
    # One rank has two micro-batches per step.
    said = Job(command, tmp_path, faults=f"step.loss=true@{2 * step + 1}").ended(0)
    inject()
    assert "Rolling back; learning rate x 0.5" in said
    state = CheckpointStore(run).newest().state
    assert (state["train"]["nonfinite"], state["train"]["lr_factor"]) == (1, 0.5)
    assert [start["first_step"] for start in state["origin"]] == [0]
    steps = train_rows(run)
    before = train_rows(whole)
    assert [row["step"] for row in steps] == list(range(1, 19))
    back = next(i for i, (now, then) in enumerate(zip(steps, before, strict=True)) if now["lr"] != then["lr"])
    assert back <= step
    for now, then in zip(steps[back:], before[back:], strict=True):
        assert now["lr"] == pytest.approx(then["lr"] / 2)


@pytest.mark.fault(8)
def test_an_exceeded_budget_aborts(tmp_path, inject):
    command = f"{TINY} run_dir={tmp_path / 'run'} engine.nonfinite=skip engine.nonfinite_budget=0"
    said = Job(command, tmp_path, faults="step.gradient=true@3").ended(2)
    inject()
    assert "This is number 1, which exceeds engine.nonfinite_budget=0" in said
