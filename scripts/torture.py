"""Run the fault catalog repeatedly with different seeds, and print how many injected faults the runs survived.

    python scripts/torture.py                      three rounds, starting at a random seed
    python scripts/torture.py --rounds 10 --seed 1 -k "killed or stop"

The seed of each round is printed. To repeat a round: pytest tests/faults --fault-seed SEED. Other options are passed to
pytest.
"""

import argparse
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| (\d+) \| (.+) \| (\d+) \| (\d+) \|$", re.MULTILINE)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options; all other arguments are passed on."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    options.add_argument("--seed", type=int, default=None, help="seed of the first round (default: random)")
    return options


def main() -> int:
    """Print a Markdown table and return 1 if any test failed."""
    options, further = parser().parse_known_args()  # passed to pytest
    first = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    tries, passed = defaultdict[int, int](int), defaultdict[int, int](int)
    titles: dict[int, str] = {}
    failed, start = False, time.monotonic()
    for seed in range(first, first + options.rounds):
        command = [sys.executable, "-m", "pytest", "tests/faults", "-q", "--fault-seed", str(seed), *further]
        print(f"{' '.join(command[1:])}", file=sys.stderr, flush=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            failed = True
            print(done.stdout[-20_000:], done.stderr[-2_000:], file=sys.stderr, flush=True)
        for row, title, tried, well in ROW.findall(done.stdout):
            titles[int(row)] = title
            tries[int(row)] += int(tried)
            passed[int(row)] += int(well)
    minutes = (time.monotonic() - start) / 60
    print(f"\nSeeds {first} to {first + options.rounds - 1}, {minutes:.0f} minutes\n")
    print("| # | fault | tries | passed |\n| --- | --- | ---: | ---: |")
    for row in sorted(titles):
        print(f"| {row} | {titles[row]} | {tries[row]} | {passed[row]} |")
    print(f"| | all | {sum(tries.values())} | {sum(passed.values())} |")
    return int(failed or tries != passed)


if __name__ == "__main__":
    sys.exit(main())
