"""Measure how long a run takes to save and exit: the seconds from the signal to the end of all processes.

    python scripts/time_stop.py --times 6 --ranks 2 experiment=cifar100_cpu data.root=CIFAR100
    python scripts/time_stop.py --times 6 engine.eval_every='1 step'     # mostly evaluating

SIGTERM, SIGINT and SIGUSR1 are sent in turn, at a random moment in the first seconds of the training loop. With several
ranks, they are sent to torchrun.
"""

import argparse
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RUN = ("-m", "moa_train.cli.train", "tracking.log_every=1", "tracking.progress=plain")


def stop_once(number: signal.Signals, delay: float, ranks: int, overrides: list[str]) -> float:
    """Start a run, stop it ``delay`` seconds after its first step, and return the seconds until it ends."""
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log.txt"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        launcher += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
        command = [sys.executable, *(launcher if ranks > 1 else ()), *RUN, *overrides, f"run_dir={run}"]
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)
        rows = run / "metrics.jsonl"
        while process.poll() is None and not (rows.exists() and rows.read_bytes()):
            time.sleep(0.01)
        time.sleep(delay)
        start = time.monotonic()
        process.send_signal(number)
        process.wait()
        seconds = time.monotonic() - start
        said = log.read_text()
        if "Stopped at step" not in said:
            raise SystemExit(f"The run did not stop and save. End of its output:\n{said[-3000:]}")
        return seconds


def main() -> None:
    """Print the median and the range in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=6, help="number of stops; the three signals are sent in turn")
    parser.add_argument("--ranks", type=int, default=1, help="number of processes")
    parser.add_argument("--within", type=float, default=3.0, help="latest signal, seconds after the first step")
    options, overrides = parser.parse_known_args()
    draw = random.Random(0)
    seconds = [
        stop_once(SIGNALS[turn % 3], draw.uniform(0, options.within), options.ranks, overrides)
        for turn in range(options.times)
    ]
    print(
        f"{' '.join(overrides) or 'defaults'}, {options.ranks} rank(s): median {statistics.median(seconds):.1f} s, "
        f"{min(seconds):.1f} to {max(seconds):.1f} s, n = {len(seconds)}"
    )


if __name__ == "__main__":
    main()
