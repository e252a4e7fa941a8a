"""scripts/train.slurm in a real bash, with programs in place of SLURM's that note how they are called."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.slurm"

SCONTROL = """#!/bin/bash
echo "$@" >> scontrol.txt
case "$*" in
    "show hostnames "*) echo node1; echo node2 ;;
    "show job -o 7") echo "JobId=7 PreemptEligibleTime=2026-11-26T10:00:00 PreemptTime=$PREEMPTED SuspendTime=None" ;;
esac
"""
SRUN = """#!/bin/bash
trap 'echo USR1 > signal.txt; exit 1' USR1
echo "$@" > srun.txt
[[ -e waits ]] || exit "$CODE"
while :; do sleep 0.1; done
"""


class Cluster:
    """A folder with the programs, in which the script runs as job 7."""

    def __init__(self, folder: Path) -> None:
        self.folder, programs = folder, folder / "bin"
        programs.mkdir()
        for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environ = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
        self.environ |= {"SLURM_JOB_NODELIST": "node[1-2]", "PREEMPTED": "None", "CODE": "1"}

    def submit(self, **environ: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["bash", SCRIPT, "model=moa_t"], cwd=self.folder, env={**self.environ, **environ})

    @property
    def requeued(self) -> bool:
        return "requeue 7" in (self.folder / "scontrol.txt").read_text().splitlines()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_a_warned_job_is_requeued(cluster):
    (cluster.folder / "waits").touch()
    job = cluster.submit()
    end = time.monotonic() + 60
    while not (cluster.folder / "srun.txt").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 1
    assert (cluster.folder / "signal.txt").read_text() == "USR1\n"  # forwarded to srun
    assert cluster.requeued
    started = (cluster.folder / "srun.txt").read_text()
    assert "--rdzv-endpoint=node1:20007" in started
    assert "run_dir=outputs/slurm-7 resume=auto model=moa_t" in started


def test_a_preempted_job_is_requeued(cluster):
    """With GraceTime, SLURM signals only the ranks, so the script sees nothing but the exit code of torchrun."""
    assert cluster.submit(PREEMPTED="2026-11-26T15:00:00").wait(60) == 1
    assert cluster.requeued


def test_a_failed_job_is_not_requeued(cluster):
    assert cluster.submit().wait(60) == 1
    assert not cluster.requeued


def test_a_finished_job_is_not_requeued(cluster):
    result = cluster.folder / "outputs" / "slurm-7" / "result.json"
    result.parent.mkdir(parents=True)
    result.touch()
    assert cluster.submit(CODE="0", PREEMPTED="2026-11-26T15:00:00").wait(60) == 0
    assert not cluster.requeued
