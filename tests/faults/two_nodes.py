"""Train on two nodes: network namespaces joined by a virtual cable, one torchrun in each; break something, and time it.

    python tests/faults/two_nodes.py                      every scenario once
    python tests/faults/two_nodes.py --times 20 rank-0    one of them, 20 times

It requires Linux, root and iproute2 (`ip`), and sends nothing outside of the two namespaces, which it makes and removes.
The name of each node resolves to 127.0.1.1 on that node, as Debian's installer sets it up.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launch import TINY, TRAIN, arguments, rows

NODES = ("moa-node0", "moa-node1")
CABLE = ("eth0", "eth0")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PATIENCE = 240.0
TIMEOUT = 20
"""runtime.timeout of the runs, in seconds."""


def missing() -> str | None:
    """Return what this machine lacks for the two nodes, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two nodes on one machine require Linux and root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "two nodes on one machine require ip (iproute2) and unshare (util-linux)"
    if subprocess.run(["ip", "netns", "add", "moa-probe"], capture_output=True, check=False).returncode:
        return "two nodes on one machine require the right to create network namespaces (ip netns add)"
    subprocess.run(["ip", "netns", "del", "moa-probe"], check=True)
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def network() -> Iterator[None]:
    """Make the two namespaces and the cable between them; remove them at the end."""
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


def cut() -> None:
    """Lose every packet on the cable, such that no side is told: all are sent to a hardware address that nobody has."""
    for node, end, other in zip(NODES, CABLE, ADDRESSES[::-1], strict=True):
        ip("-n", node, "neigh", "replace", other, "lladdr", "02:00:00:00:00:77", "dev", end, "nud", "permanent")


def mend() -> None:
    """Undo `cut`."""
    for node, end, other in zip(NODES, CABLE, ADDRESSES[::-1], strict=True):
        ip("-n", node, "neigh", "del", other, "dev", end)


class Pair:
    """Two torchrun agents that train one run, and their output."""

    def __init__(self, folder: Path, *options: str, more: str = "", environ: dict[str, str] | None = None) -> None:
        self.folder, self.run = folder, folder / "run"
        self.options, self.environ = options, environ or {}
        self.command = f"{TINY} runtime.timeout={TIMEOUT} run_dir={self.run} resume=auto {more}"
        self.agents = [self.start(node) for node in (0, 1)]

    def start(self, node: int) -> subprocess.Popen[bytes]:
        """Start the agent of one node."""
        words = ["ip", "netns", "exec", NODES[node], "unshare", "--uts"]
        words += ["sh", "-c", 'hostname "$0" && exec "$@"', NODES[node], sys.executable, "-m", "torch.distributed.run"]
        words += ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "pair"]
        words += ["--rdzv-endpoint", f"{NODES[0]}:29500", *self.options, "-m", TRAIN, *arguments(self.command)]
        with (self.folder / f"node{node}.txt").open("a") as log:
            return subprocess.Popen(
                words,
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.environ},
                stdout=log,
                stderr=log,
            )

    def rank(self, node: int) -> int:
        """Return the process id of the rank on a node."""
        agent = self.agents[node].pid
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        return int(children[-1])

    def step(self) -> int:
        """Return the number of updates that the run has logged."""
        log = self.run / "metrics.jsonl"
        return max((int(row["step"]) for row in rows(self.run)), default=0) if log.exists() else 0

    def wait_for(self, what: str, condition: Callable[[], object]) -> float:
        """Wait until a condition holds; return the seconds that it took."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < PATIENCE, f"{what}: not within {PATIENCE:g} s\n{self.said()}"
            time.sleep(0.05)
        return time.monotonic() - start

    def wait_for_step(self, step: int) -> float:
        """Wait until the run has logged ``step`` updates; return the seconds that it took."""
        return self.wait_for(f"step {step}", lambda: self.step() >= step)

    def said(self) -> str:
        """Return the last lines of both nodes."""
        return "\n".join(f"-- node {node}\n{self.log(node)[-3000:]}" for node in (0, 1))

    def log(self, node: int) -> str:
        """Return what a node has printed."""
        return (self.folder / f"node{node}.txt").read_text()

    def close(self) -> None:
        """End what is left of the processes."""
        for node, agent in enumerate(self.agents):
            if agent.poll() is None:
                with ExitStack() as ended:
                    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
                        ended.callback(os.kill, int(child), signal.SIGKILL)
                    agent.kill()
                agent.wait()
