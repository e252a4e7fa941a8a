"""Rows 1, 2, 3, 6, 7, 20: processes that are killed, asked to stop, or suspended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from launch import PATIENCE, TINY, TRAIN, Job, arguments, result, samples, wait_for_step

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.runtime.signals import Exit

KILLED = -signal.SIGKILL


@pytest.mark.fault(1, 3)
def test_killed_at_random_steps_and_resumed(tmp_path, whole_pair, draw, inject):
    """Kill a run ten times, three of them within one epoch; its result and all samples are the same bit for bit."""
    run, record = tmp_path / "run", tmp_path / "samples"
    for kill in range(10):
        faults = f"step.loss=kill@{draw.randint(2, 3) if kill < 3 else draw.randint(1, 5)}"
        job = Job(f"{TINY} run_dir={run} resume=auto", tmp_path, ranks=2, faults=faults, record=record)
        codes = job.codes()
        if codes == [0, 0]:
            break  # the rest of the run was shorter than the draw
        inject(row=3 if kill < 3 else 1)
        assert KILLED in codes, job.output  # the other rank may fail before its own fault
    assert kill >= 3
    Job(f"{TINY} run_dir={run} resume=auto", tmp_path, ranks=2, record=record).ended(0)
    assert result(run) == result(whole_pair)
    assert samples(record) == samples(whole_pair.parent / "samples")


POINTS = [
    "mid_write=kill",
    "mid_write=kill@3",
    "before_fsync=kill@2",
    "before_manifest=kill",
    "before_rename=kill",
    "after_rename=kill",
    "before_prune=kill@2",
    "mid_remove=kill@3",
]


@pytest.mark.fault(2)
def test_killed_at_every_point_of_a_save(tmp_path, whole, draw, inject):
    """Kill one run at all points; once there is a checkpoint, the newest valid one never gets older."""
    run, newest, tried = tmp_path / "run", 0, []
    for point in draw.sample(POINTS, len(POINTS)):
        job = Job(f"{TINY} run_dir={run} resume=auto", tmp_path, faults=f"checkpoint.{point}")
        code = job.codes()[0]
        if code == 0:
            break
        assert code == KILLED, job.output
        inject()
        checkpoint = CheckpointStore(run).newest()
        assert (checkpoint.step if checkpoint else 0) >= newest
        newest = checkpoint.step if checkpoint else 0
        tried.append(point)
    assert len(tried) >= len(POINTS) // 2
    Job(f"{TINY} run_dir={run} resume=auto", tmp_path).ended(0)
    assert result(run) == result(whole)


STOPS = [
    "step.input=term@1",  # the first batch, all ranks
    "step.loss=term@3/1",  # one rank
    "evaluate.batch=term@1/0",
    "checkpoint.before_manifest=usr1/0",
    "step.loss=int@2/0",
    "step.loss=usr1@2",
]


@pytest.mark.fault(6)
def test_stopped_at_any_point(tmp_path, whole_pair, draw, inject):
    """All ranks stop at the same step and save, and the resumed run ends like an uninterrupted one."""
    run, tried = tmp_path / "run", []
    for stop in draw.sample(STOPS, len(STOPS)):
        job = Job(f"{TINY} run_dir={run} resume=auto", tmp_path, ranks=2, faults=stop)
        codes = job.codes()
        if codes == [0, 0]:
            break
        assert codes == [Exit.STOPPED] * 2, job.output
        inject()
        said = job.output
        checkpoint = CheckpointStore(run).newest()
        assert f"Stopped at step {checkpoint.step}; saved" in said
        assert "Traceback" not in said
        tried.append(stop)
    assert len(tried) >= len(STOPS) // 2
    Job(f"{TINY} run_dir={run} resume=auto", tmp_path, ranks=2).ended(0)
    assert result(run) == result(whole_pair)


@pytest.mark.fault(6)
def test_a_stop_between_micro_batches_abandons_the_step(tmp_path, whole, inject):
    """The interrupted step leaves no trace, and the resumed run repeats it."""
    run = tmp_path / "run"
    for step in (0, 4, 4):  # in the first of its two micro-batches; at 4 again without a step done in between
        began = CheckpointStore(run).newest()
        number = 2 * (step - (began.step if began else 0)) + 1
        job = Job(f"{TINY} run_dir={run} resume=auto", tmp_path, faults=f"step.loss=term@{number}")
        inject()
        said = job.ended(Exit.STOPPED)
        assert f"Stopped at step {step}; saved" in said
        assert "SIGTERM: saving and stopping after the current pass" in said
        assert CheckpointStore(run).newest().step == step
    Job(f"{TINY} run_dir={run} resume=auto", tmp_path).ended(0)
    assert result(run) == result(whole)


@pytest.mark.fault(6)
def test_all_ranks_abandon_the_same_step(tmp_path, draw, inject):
    """The best checkpoint keeps its score, even if a stop saves it again."""
    command = f"{TINY} engine.micro_batch_size=2 engine.eval_every='1 step' resume=auto"
    Job(f"{command} run_dir={tmp_path / 'whole'}", tmp_path, ranks=2).ended(0)
    run = tmp_path / "run"
    for _ in range(2):
        stop = f"step.loss={draw.choice(['term', 'int', 'usr1', 'hup'])}@{draw.randint(1, 24)}/{draw.randint(0, 1)}"
        job = Job(f"{command} run_dir={run}", tmp_path, ranks=2, faults=stop)
        inject()
        assert job.codes() == [Exit.STOPPED] * 2, job.output
    Job(f"{command} run_dir={run}", tmp_path, ranks=2).ended(0)
    assert result(run) == result(tmp_path / "whole")
    assert CheckpointStore(run).best().step == CheckpointStore(tmp_path / "whole").best().step


@pytest.mark.fault(6)
def test_a_second_interrupt_exits_immediately(tmp_path, inject):
    run = tmp_path / "run"
    job = Job(f"{TINY} run_dir={run}", tmp_path, faults="step.loss=hang@5")  # two micro-batches a step
    wait_for_step(run, 2)
    time.sleep(0.5)  # until it hangs
    inject(2)
    job.signal(signal.SIGINT)
    while "SIGINT: saving and stopping" not in job.output:
        time.sleep(0.01)
    job.signal(signal.SIGINT)
    assert job.codes() == [Exit.INTERRUPTED], job.output
    assert "Second Ctrl-C" in job.output


@pytest.mark.fault(6)
def test_two_interrupts_abandon_a_save_that_hangs(tmp_path, inject):
    """On hanging storage the stop waits for the save; two interrupts end the wait."""
    run = tmp_path / "run"
    job = Job(f"{TINY} run_dir={run}", tmp_path, faults="checkpoint.before_manifest=hang@2")
    wait_for_step(run, 6)
    inject(3)
    job.signal(signal.SIGTERM)
    time.sleep(0.5)
    assert job.processes[0].is_alive()
    for _ in range(2):
        job.signal(signal.SIGINT)
        time.sleep(0.1)
    assert job.codes() == [Exit.INTERRUPTED], job.output
    before = CheckpointStore(run).newest()
    assert before is not None
    Job(f"{TINY} run_dir={run} resume=auto", tmp_path).ended(0)


@contextmanager
def torchrun(tmp_path, command: str, *options: str, faults: str = "") -> Iterator[subprocess.Popen]:
    environ = {**os.environ, "MOA_TRAIN_FAULTS": faults, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *options]
    words += ["-m", TRAIN, *arguments(command)]
    with (
        (tmp_path / "torchrun.txt").open("w") as log,
        subprocess.Popen(words, cwd=tmp_path, env=environ, stdout=log, stderr=log) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()  # if it still runs: it ends its ranks, by SIGKILL after 30 seconds


@pytest.mark.fault(6)
def test_torchrun_passes_the_signal_on(tmp_path, whole_pair, inject):
    run = tmp_path / "run"
    with torchrun(tmp_path, f"{TINY} run_dir={run}", faults="step.loss=sleep@4") as process:
        wait_for_step(run, 3)
        process.terminate()
        inject()
        assert process.wait(PATIENCE) == 1
    assert "saved. To resume" in (tmp_path / "torchrun.txt").read_text()
    Job(f"resume={run}", tmp_path, ranks=2).ended(0)
    assert result(run) == result(whole_pair)


@pytest.mark.fault(7)
def test_torchrun_restarts_a_run_that_lost_a_rank(tmp_path, whole_pair, inject):
    """Kill a rank; with --max-restarts and resume=auto, the result of the run is the same."""
    run = tmp_path / "run"
    command = f"{TINY} run_dir={run} resume=auto"
    with torchrun(tmp_path, command, "--max-restarts", "1", faults="step.loss=kill@8/1") as process:
        inject()
        assert process.wait(PATIENCE) == 0, (tmp_path / "torchrun.txt").read_text()
    assert len(json.loads((run / "provenance.json").read_text())) == 2
    assert result(run) == result(whole_pair)


@pytest.mark.fault(7)
def test_torchrun_shows_the_root_cause(tmp_path, inject):
    with torchrun(tmp_path, f"{TINY} run_dir={tmp_path / 'run'}", faults="step.loss=raise@4/1") as process:
        inject()
        assert process.wait(PATIENCE) == 1
    said = (tmp_path / "torchrun.txt").read_text()
    root = said[said.index("Root Cause") :]
    assert "rank      : 1" in root
    assert "InjectedFaultError" in root


@pytest.mark.fault(15)
def test_torchrun_ends_with_the_error_of_the_user(tmp_path, inject):
    with torchrun(tmp_path, f"{TINY} run_dir={tmp_path / 'run'} data=folder data.root=nowhere") as process:
        inject()
        assert process.wait(PATIENCE) == 1
    said = (tmp_path / "torchrun.txt").read_text()
    root = said[said.index("Root Cause") :]
    assert "nowhere/train: there is no such folder. Set data.root to" in root
    assert "Traceback" not in root


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    "fault",
    [
        "step.loss=kill@4/1",
        "step.loss=raise@4/1",
        "evaluate.batch=raise@1/1",
        "evaluate.batch=kill@1/0",
        "checkpoint.before_manifest=raise@1/0",
        "checkpoint.before_manifest=kill@1/0",
    ],
)
def test_a_lost_rank_ends_the_other(tmp_path, fault, inject):
    """The other rank ends long before the timeout, because its connections break."""
    job = Job(f"{TINY} run_dir={tmp_path / 'run'}", tmp_path, ranks=2, faults=fault)
    inject()
    codes = job.codes()
    lost = int(fault[-1])
    assert codes[lost] == (KILLED if "kill" in fault else Exit.FAILED), job.output
    assert codes[1 - lost] == Exit.FAILED, job.output
    other = job.logs[1 - lost].read_text()
    assert f"Rank {1 - lost} is exiting because it lost contact with another rank. Rank {lost} " in other
    assert ("exited without a message" if "kill" in fault else "failed (InjectedFaultError: ") in other
    assert "Traceback" not in other
    if "raise" in fault:
        assert "InjectedFaultError" in job.logs[lost].read_text()


@pytest.mark.fault(7)
def test_a_rank_that_hangs_ends_the_other_after_the_timeout(tmp_path, inject):
    job = Job(f"{TINY} run_dir={tmp_path / 'run'} runtime.timeout=8", tmp_path, ranks=2, faults="step.loss=stop@4/1")
    inject()
    job.processes[0].join(PATIENCE)
    code = job.processes[0].exitcode
    job.signal(signal.SIGKILL)
    job.codes()
    assert code == Exit.FAILED, job.output
    assert "Rank 1 sent no heartbeat for 8 s (runtime.timeout)." in job.logs[0].read_text()


@pytest.mark.fault(20)
def test_killed_while_tensorboard_writes(tmp_path, draw, inject):
    """The event files contain every step once, in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    command = f"{TINY} run_dir={run} resume=auto tracking.loggers=[tensorboard]"
    for _ in range(3):
        job = Job(command, tmp_path, faults=f"step.loss=kill@{draw.randint(4, 6)}")
        assert job.codes() == [KILLED], job.output
        inject()
    Job(command, tmp_path).ended(0)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    tag = next(tag for tag in tags if "loss" in tag and "train" in tag)
    assert [event.step for event in events.Scalars(tag)] == list(range(1, 19))
    steps = [row["step"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert steps == sorted(steps)
