"""Train on two nodes: network namespaces joined by a virtual cable, one torchrun in each; break something, and time it.

    python tests/faults/two_nodes.py                      every scenario once
    python tests/faults/two_nodes.py --times 20 rank_killed

It requires Linux, root and iproute2 (`ip`). No packet leaves the two namespaces, which are removed at the end.
The name of each node resolves to 127.0.1.1 on that node, as Debian's installer sets it up.
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from launch import TINY, TRAIN, Job, arguments, result, rows

NODES = tuple(f"moa-{os.getpid()}-node{number}" for number in (0, 1))
"""Names of the namespaces and their hosts; several processes may have nodes at the same time."""
CABLE = ("eth0", "eth0")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PATIENCE = 240.0
BOUND = 60.0
"""Seconds for what takes 15 on an idle machine, and more than 200 if a torchrun waits for the other machine."""
TIMEOUT = 8
"""runtime.timeout of the runs, in seconds."""
RENDEZVOUS = "keep_alive_interval=2"
"""torchrun counts a node as dead after three such intervals, as in scripts/train.slurm."""


def missing() -> str | None:
    """Return what this machine lacks for the two nodes, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two nodes on one machine require Linux and root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "two nodes on one machine require ip (iproute2) and unshare (util-linux)"
    try:
        with network():
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"two nodes on one machine require the right to create and connect network namespaces: {error}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def network() -> Iterator[None]:
    """Remove the namespaces of killed processes, make the two and the cable between them; remove them at the end."""
    for files in Path("/etc/netns").glob("moa-*-node?"):
        pid = files.name.split("-")[1]
        if pid == str(os.getpid()) or not Path("/proc", pid).exists():
            subprocess.run(["ip", "netns", "del", files.name], capture_output=True, check=False)
            shutil.rmtree(files, ignore_errors=True)
    with ExitStack() as made:
        for node, other, address in zip(NODES, NODES[::-1], ADDRESSES[::-1], strict=True):
            files = Path("/etc/netns") / node  # what `ip netns exec` puts in place of the files in /etc
            files.mkdir(parents=True)
            made.callback(shutil.rmtree, files)
            (files / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {node}\n{address} {other}\n")
            ip("netns", "add", node)
            made.callback(ip, "netns", "del", node)
        ip("link", "add", CABLE[0], "netns", NODES[0], "type", "veth", "peer", "name", CABLE[1], "netns", NODES[1])
        for node, end, address in zip(NODES, CABLE, ADDRESSES, strict=True):
            ip("-n", node, "addr", "add", f"{address}/30", "dev", end)
            for device in ("lo", end):
                ip("-n", node, "link", "set", device, "up")
        yield


@contextmanager
def cut() -> Iterator[None]:
    """Lose every packet on the cable, such that no side is told: all are sent to a hardware address that nobody has."""
    ends = list(zip(NODES, CABLE, ADDRESSES[::-1], strict=True))
    for node, end, other in ends:
        ip("-n", node, "neigh", "replace", other, "lladdr", "02:00:00:00:00:77", "dev", end, "nud", "permanent")
    try:
        yield
    finally:
        for node, end, other in ends:
            ip("-n", node, "neigh", "del", other, "dev", end)


class Pair:
    """Two torchrun agents that train one run, and their output."""

    def __init__(self, folder: Path, *options: str, share_store: bool = True) -> None:
        self.folder, self.run, self.options, self.share_store = folder, folder / "run", options, share_store
        self.agents = [self.start(node) for node in (0, 1)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Kill what is left of the processes."""
        for node in NODES:
            pids = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True, check=True).stdout
            for pid in map(int, pids.split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.wait()

    def start(self, node: int) -> subprocess.Popen[bytes]:
        """Start the agent of one node, whose rank trains 18 steps and pauses for a second in one of the first."""
        words = ["ip", "netns", "exec", NODES[node], "unshare", "--uts"]
        words += ["sh", "-c", 'hostname "$0" && exec "$@"', NODES[node], sys.executable, "-m", "torch.distributed.run"]
        words += ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "pair"]
        words += ["--rdzv-endpoint", f"{NODES[0]}:29500", "--rdzv-conf", RENDEZVOUS, *self.options, "-m", TRAIN]
        words += arguments(f"{TINY} runtime.timeout={TIMEOUT} run_dir={self.run} resume=auto")
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "MOA_TRAIN_FAULTS": "step.loss=sleep@4"}
        environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "0" if self.share_store else "1"
        with (self.folder / f"node{node}.txt").open("a") as log:
            return subprocess.Popen(words, cwd=self.folder, env=environ, stdout=log, stderr=log)

    def rank(self, node: int) -> int:
        """Return the process id of the rank on a node."""
        agent = self.agents[node].pid
        return int(Path(f"/proc/{agent}/task/{agent}/children").read_text().split()[-1])

    def wait_for(self, what: str, condition: Callable[[], object], patience: float = PATIENCE) -> float:
        """Wait until a condition holds; return the seconds that it took."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < patience, f"{what}: not within {patience:g} s\n{self.said()}"
            time.sleep(0.05)
        return time.monotonic() - start

    def step(self) -> int:
        """Return the number of updates that the run has logged."""
        log = self.run / "metrics.jsonl"
        return max((int(row["step"]) for row in rows(self.run)), default=0) if log.exists() else 0

    def said(self) -> str:
        """Return the end of what both nodes have printed."""
        return "\n".join(f"-- node {node}\n{self.log(node)[-4000:]}" for node in (0, 1))

    def log(self, node: int) -> str:
        """Return what a node has printed."""
        return (self.folder / f"node{node}.txt").read_text()

    def finish(self) -> None:
        """Wait for a good end on both nodes."""
        self.wait_for("the end", lambda: all(agent.poll() is not None for agent in self.agents))
        assert [agent.returncode for agent in self.agents] == [0, 0], self.said()


def undisturbed(folder: Path, node: int) -> float:
    """Train on both nodes."""
    start = time.monotonic()
    with Pair(folder) as pair:
        pair.finish()
    return time.monotonic() - start


def rank_killed(folder: Path, node: int) -> float:
    """SIGKILL to the rank of a node: torchrun restarts both ranks, with nothing set for it but --max-restarts."""
    with Pair(folder, "--max-restarts", "3") as pair:
        pair.wait_for("step 1", lambda: pair.step() >= 1)
        os.kill(pair.rank(node), signal.SIGKILL)
        before = pair.step()
        seconds = pair.wait_for("another step", lambda: pair.step() > before)
        pair.finish()
    return seconds


def agent_killed(folder: Path, node: int) -> float:
    """SIGKILL to torchrun on a node, and another start: of that node, or of both if the other one ends as well.

    With the setting of scripts/train.slurm: torchrun 2.14 can otherwise not take a new agent into a later round, since
    its first agent publishes the address of the shared store in the first round only.
    """
    with Pair(folder, "--max-restarts", "3", share_store=False) as pair:
        pair.wait_for("step 1", lambda: pair.step() >= 1)
        orphan = pair.rank(node)
        pair.agents[node].kill()
        pair.agents[node].wait()
        start, before = time.monotonic(), pair.step()
        pair.wait_for("the end of the orphan", lambda: not Path(f"/proc/{orphan}").exists(), BOUND)
        if node == 0:  # it served the rendezvous
            pair.wait_for("the end of the other agent", lambda: pair.agents[1].poll() is not None, BOUND)
            pair.agents[1] = pair.start(1)
        pair.agents[node] = pair.start(node)
        pair.wait_for("another step", lambda: pair.step() > before)
        seconds = time.monotonic() - start
        pair.finish()
    return seconds


def link_paused(folder: Path, node: int) -> float:
    """Cut the cable for half of the timeout: the run waits and continues."""
    with Pair(folder) as pair:
        pair.wait_for("step 1", lambda: pair.step() >= 1)
        with cut():
            time.sleep(TIMEOUT / 2)
        pair.finish()
    return TIMEOUT / 2


def link_cut(folder: Path, node: int) -> float:
    """Cut the cable: both sides, torchrun too, end soon after the timeout and name the cause; a resume finishes."""
    with Pair(folder) as pair:
        pair.wait_for("step 1", lambda: pair.step() >= 1)
        ended = lambda: all(agent.poll() is not None for agent in pair.agents)  # noqa: E731
        with cut():
            seconds = pair.wait_for("the end of both sides", ended, BOUND)
        for side in (0, 1):
            assert f"Rank {1 - side} sent no heartbeat for {TIMEOUT} s" in pair.log(side), pair.said()
    Job(f"{TINY} run_dir={folder / 'run'} resume=auto", folder, ranks=2).ended(0)
    return seconds


SCENARIOS = {scenario.__name__: scenario for scenario in (rank_killed, agent_killed, link_paused, link_cut)}


def main() -> int:
    """Print a table in Markdown; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1, help="times to run each scenario; odd ones hit node 1")
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS), help=", ".join(SCENARIOS))
    options = parser.parse_args()
    if lacking := missing():
        print(f"error: {lacking}.", file=sys.stderr)
        return 2
    failed = False
    with tempfile.TemporaryDirectory() as place, network():
        reference = Path(place) / "undisturbed"
        reference.mkdir()
        undisturbed(reference, 0)
        whole = result(reference / "run")
        print(
            "| scenario | node | tries | passed | seconds: median (least to most) |\n| --- | --- | ---: | ---: | --- |"
        )
        for name in options.scenarios:
            for node in (0, 1):
                seconds = []
                tries = (options.times + 1 - node) // 2
                for attempt in range(tries):
                    folder = Path(place) / f"{name}-{node}-{attempt}"
                    folder.mkdir()
                    try:
                        taken = SCENARIOS[name](folder, node)
                        assert result(folder / "run") == whole, "other bits or rows than the undisturbed run"
                        seconds.append(taken)
                    except AssertionError as error:
                        print(error, file=sys.stderr, flush=True)
                failed |= len(seconds) < tries
                middle = (
                    f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})" if seconds else ""
                )
                print(f"| {name} | {node} | {tries} | {len(seconds)} | {middle} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
