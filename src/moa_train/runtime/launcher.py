"""Keep a torchrun that waits for an unreachable machine from outliving the ranks that it started."""

import os
import subprocess
import sys

STUCK = 2.0
"""Seconds for which torchrun may leave an ended rank unnoticed. It looks ten times a second."""

_SCRIPT = """
import os, signal, sys, time
launcher, rank, limit = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
ended = None
for _ in range(600):
    try:
        with open(f"/proc/{rank}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
    except OSError:
        break
    if int(parent) != launcher:
        break
    now = time.monotonic()
    ended = (ended or now) if state == "Z" else None
    if ended and now - ended > limit:
        print("error: torchrun is killed: it waits for a machine that does not answer, and has not noticed the end of "
              "its rank.", file=sys.stderr, flush=True)
        os.kill(launcher, signal.SIGKILL)
        break
    time.sleep(0.1)
"""


def end_stuck_launcher() -> None:
    """Have torchrun killed if it does not notice the end of this process, which is about to come.

    Between its looks at the ranks, torchrun asks its store on the first machine for news, and if that machine does not
    answer, it waits until the kernel gives the connection up (15 minutes) and handles no signal meanwhile. As long as
    torchrun may still restart the ranks, nothing is done: it recovers when the connection does.
    """
    attempts = [int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if "TORCHELASTIC_RUN_ID" not in os.environ or attempts[0] < attempts[1] or not sys.platform.startswith("linux"):
        return
    words = [sys.executable, "-I", "-S", "-c", _SCRIPT, str(os.getppid()), str(os.getpid()), str(STUCK)]
    subprocess.Popen(words, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
