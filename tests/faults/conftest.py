"""The fault catalog: `--fault-seed` seeds its random choices; a table at the end counts the injected faults."""

import random
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for launch, also in the processes that it starts

import launch

CATALOGUE = {
    1: "SIGKILL of all ranks at random steps",
    2: "SIGKILL at each point of a save",
    3: "three kills within one epoch",
    4: "batches across worker counts and restarts",
    5: "resume on 2, then 1, then 2 ranks",
    6: "SIGTERM, SIGINT, SIGUSR1 at any point, to any rank",
    7: "a rank killed, raising an exception, suspended",
    8: "NaN and Inf in loss, gradient and input",
    9: "malicious files",
    10: "truncated and corrupted files",
    11: "resume with the settings or data of another run",
    12: "disk full, missing permissions",
    13: "unreadable and unusual images",
    14: "broken data sets",
    15: "invalid values and unknown keys",
    16: "ranks with different configurations",
    17: "two runs in one folder, stale lock",
    18: "shuffled time stamps",
    19: "evaluation across rank and worker counts",
    20: "SIGKILL while TensorBoard writes",
    21: "failing system calls: listing, writing, closing",
    22: "two nodes: a dead rank, a dead torchrun, a cut link",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-seed", type=int, default=0, help="seed of the fault catalog's random choices")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(row, ...): rows of the catalog; injected faults count for the first")


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    """Random choices that depend on the seed and on the name of the test."""
    return random.Random(f"{request.config.getoption('--fault-seed')} {request.node.nodeid}")


@pytest.fixture
def inject(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that counts the faults that a test injects; they pass if the test passes."""
    first = request.node.get_closest_marker("fault").args[0]

    def add(faults: int = 1, row: int = first) -> None:
        request.node.user_properties.append(("fault", (row, faults)))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table: row, fault, tries, passed."""
    tries, passed = defaultdict[int, int](int), defaultdict[int, int](int)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for row, faults in (value for name, value in report.user_properties if name == "fault"):
                tries[row] += faults
                passed[row] += faults if outcome == "passed" else 0
    if tries:
        terminalreporter.section("fault catalog")
        for row in sorted(tries):
            terminalreporter.line(f"| {row} | {CATALOGUE[row]} | {tries[row]} | {passed[row]} |")
        terminalreporter.line(f"| | all | {sum(tries.values())} | {sum(passed.values())} |")


def _finished(folder: Path, ranks: int, more: str = "") -> Path:
    run, record = folder / "run", folder / "samples"
    said = launch.Job(f"{launch.TINY} run_dir={run} {more}", folder, ranks=ranks, record=record).ended(0)
    assert "Warning" not in said, said
    return run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run on one rank."""
    return _finished(tmp_path_factory.mktemp("whole"), 1)


@pytest.fixture(scope="session")
def whole_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run on two ranks."""
    return _finished(tmp_path_factory.mktemp("whole_pair"), 2)
