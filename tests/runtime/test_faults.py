import os
import signal
import subprocess
import sys

import pytest

from moa_train.runtime import faults
from moa_train.runtime.errors import UserError


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    faults.arm({})


def run(plan: str, code: str, **environ: str) -> subprocess.CompletedProcess:
    program = f"from moa_train.runtime.faults import point\n{code}"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MOA_TRAIN_FAULTS": plan, **environ},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_a_fault_kills_at_the_nth_call_of_its_point():
    done = run("b=kill@2", "[(point('a'), point('b'), print(i, flush=True)) for i in range(5)]")
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["0"]


def test_faults_apply_to_one_rank_and_not_after_a_restart():
    assert run("a=kill/1", "point('a')", RANK="0").returncode == 0
    assert run("a=kill/1", "point('a')", RANK="1").returncode == -signal.SIGKILL
    assert run("a=kill", "point('a')", TORCHELASTIC_RESTART_COUNT="1").returncode == 0


def test_an_invalid_plan_is_an_error():
    assert "Did you mean 'kill'?" in run("a=kil", "").stderr


def test_faults_that_return_or_raise():
    faults.arm({"MOA_TRAIN_FAULTS": "a=true@2, b=raise, c=full@1"})
    assert [faults.point("a") for _ in range(3)] == [False, True, False]
    with pytest.raises(faults.InjectedFaultError, match="at b"):
        faults.point("b")
    with pytest.raises(OSError, match="No space left"):
        faults.point("c")
    assert not faults.point("d")
    with pytest.raises(UserError, match="point=action@n/rank"):
        faults.arm({"MOA_TRAIN_FAULTS": "a"})
