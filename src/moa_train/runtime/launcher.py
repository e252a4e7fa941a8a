"""Terminate a torchrun that waits for an unreachable machine after its ranks have exited."""

import os
import subprocess
import sys

STUCK = 2.0
"""Seconds within which torchrun must notice that a rank has exited. torchrun checks ten times per second."""

_SCRIPT = """
import os, signal, sys, time
launcher, rank, limit = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
ended = None

def look(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
        return state, int(parent)
    except OSError:
        return "", 0

for _ in range(600):
    if look(rank)[1] != launcher:
        break
    now = time.monotonic()
    # torchrun waits for its ranks one by one. While any of them still runs, it is not stuck.
    ranks = [state for state, parent in map(look, filter(str.isdecimal, os.listdir("/proc"))) if parent == launcher]
    ended = (ended or now) if set(ranks) == {"Z"} else None
    if ended and now - ended > limit:
        print("error: Killing torchrun because it waits for a machine that does not respond and has not noticed that "
              "its rank exited.", file=sys.stderr, flush=True)
        os.kill(launcher, signal.SIGKILL)
        break
    time.sleep(0.1)
"""


def end_stuck_launcher() -> None:
    """Start a process that kills torchrun unless torchrun notices the imminent exit of this rank.

    Between checks of its ranks, torchrun queries its store on the first machine. If that machine does not respond,
    torchrun waits until the kernel drops the connection (15 minutes) and handles no signals meanwhile. If torchrun may
    still restart the ranks, this function does nothing, because torchrun recovers when the connection does.
    """
    attempts = [int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    if "TORCHELASTIC_RUN_ID" not in os.environ or attempts[0] < attempts[1] or not sys.platform.startswith("linux"):
        return
    words = [sys.executable, "-I", "-S", "-c", _SCRIPT, str(os.getppid()), str(os.getpid()), str(STUCK)]
    subprocess.Popen(words, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
