import signal
import subprocess
import sys

import pytest

RANK = """
from moa_train.runtime import launcher
launcher.STUCK = 0.5
launcher.end_stuck_launcher()
"""
LAUNCHER = """
import os, subprocess, sys, time
environ = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environ | {"TORCHELASTIC_MAX_RESTARTS": sys.argv[3]})
if sys.argv[2] == "looks":
    rank.wait()
    time.sleep(1.5)
elif sys.argv[2] == "waits":
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3)"])
    other.wait()  # as torchrun does, which has two ranks here
    rank.wait()
elif sys.argv[3] == "1":
    time.sleep(4)
else:
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("launcher", "restarts", "code"),
    [("stuck", "0", -signal.SIGKILL), ("looks", "0", 0), ("stuck", "1", 0), ("waits", "0", 0)],
)
def test_a_launcher_that_misses_the_end_of_its_rank_is_killed(launcher, restarts, code):
    """Unless it may still restart the rank, or waits for another rank that still saves."""
    words = [sys.executable, "-c", LAUNCHER, RANK, launcher, restarts]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == code
    assert ("Killing torchrun" in done.stderr) == (code != 0)
