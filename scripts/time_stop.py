"""Measure how long a run takes to save and exit: the seconds from a signal until all processes have ended.

    python scripts/time_stop.py --times 6 --ranks 2 experiment=cifar100_cpu data.root=CIFAR100
    python scripts/time_stop.py --times 6 engine.eval_every='1 step'     # mostly evaluating

The script sends SIGTERM, SIGINT and SIGUSR1 in turn, each at a random time within the first seconds of the training
loop. With several ranks, it sends them to torchrun.
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
        output = log.read_text()
        if "Stopped at step" not in output:
            raise SystemExit(f"The run did not save and stop. End of its output:\n{output[-3000:]}")
        return seconds


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options; all other arguments are passed on."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--times", type=int, default=6, help="number of runs to stop (default: 6)")
    options.add_argument("--ranks", type=int, default=1, help="number of processes per run (default: 1)")
    options.add_argument(
        "--within",
        type=float,
        default=3.0,
        help="send the signal at most this many seconds after the first step (default: 3)",
    )
    return options


def main() -> None:
    """Print the median and range of the seconds in one line."""
    options, overrides = parser().parse_known_args()
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
