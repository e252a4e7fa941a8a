import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moa_train.runtime import peer_watch
from moa_train.runtime.peer_watch import PeerWatch, connect


class Pair:
    """Rank 0 and rank 1, connected; what their watches called, in order."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = [[], []]
        ends, places = {}, iter(["never published"])
        published = threading.Event()

        def publish(place: str) -> None:
            nonlocal places
            places = iter([place])
            published.set()

        def lookup() -> str:
            published.wait()
            return next(places)

        def join(rank: int) -> None:
            ends[rank] = connect(rank, 2, publish, lookup, "127.0.0.1", 10.0)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.ends = ends

    def watch(self, rank: int, silence: float = 120.0) -> PeerWatch:
        """Start the watch of a rank."""
        called = self.calls[rank]
        return PeerWatch(
            rank,
            self.ends[rank],
            silence,
            abort=lambda: called.append("abort"),
            finish=lambda: called.append("finish"),
            leave=called.append,
        )


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    for end in made.ends.values():
        for connection in end.values():
            connection.close()


def test_a_goodbye_is_no_loss(pair):
    first, second = pair.watch(0), pair.watch(1)
    second.close()
    assert first.reason(patience=0.5) is None
    first.close()
    assert pair.calls == [[], []]


def test_a_dead_peer_is_noticed_by_its_connection(pair):
    first = pair.watch(0)
    pair.ends[1][0].close()  # as the kernel does for a dead process
    assert (
        first.reason(patience=60.0) == "Rank 1 exited without a message: it was killed, crashed, or ran out of memory."
    )
    first.close()
    assert pair.calls[0] == ["abort"]


def test_a_failure_is_reported_with_its_error(pair):
    first, second = pair.watch(0), pair.watch(1)
    second.close(OSError("disk on fire\nmore"))
    assert first.reason(patience=60.0) == "Rank 1 failed (OSError: disk on fire)."
    first.close()


def test_silence_is_a_loss(pair):
    first = pair.watch(0, silence=1.5)
    assert first.reason(patience=60.0) == "Rank 1 sent no heartbeat for 1.5 s (runtime.timeout)."
    first.close()
    assert pair.ends[1][0].recv(100).startswith(b'["alive"]\n')


def test_a_stuck_main_thread_is_left_once_its_save_is_done(pair, monkeypatch):
    monkeypatch.setattr(peer_watch, "GRACE", 0.2)
    monkeypatch.setattr(peer_watch, "INTERVAL", 0.2)
    first = pair.watch(0)
    pair.ends[1][0].close()
    first._thread.join(60.0)
    assert [call.partition(":")[0] for call in pair.calls[0]] == ["abort", "finish", "Rank 1 exited without a message"]
    first.close()


def test_strangers_are_not_taken_for_ranks():
    published: list[str] = []
    ready = threading.Event()
    found: dict[int, socket.socket] = {}

    def listen() -> None:
        found.update(connect(0, 2, lambda place: (published.append(place), ready.set()), str, "", 10.0))

    thread = threading.Thread(target=listen)
    thread.start()
    ready.wait()
    port, secret = json.loads(published[0])
    for words in (b"GET / HTTP/1.1\r\n", b'["wrong", 1]\n', b"7\n", b"\xff\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    with socket.create_connection(("127.0.0.1", port)) as rank:
        rank.sendall(json.dumps([secret, 1]).encode() + b"\n")
        thread.join(60.0)
        assert found[1].getpeername()[1] == rank.getsockname()[1]
        found[1].close()


ORPHAN = """
import sys, time
from moa_train.runtime.peer_watch import PeerWatch
import socket, signal
ours, theirs = socket.socketpair()
signal.signal(signal.SIGTERM, lambda *_: (print("asked to stop", flush=True), sys.exit(0)))
watch = PeerWatch(0, {1: ours}, 60.0, abort=print, finish=print, leave=print)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_rank_whose_torchrun_has_died_stops(tmp_path: Path):
    """The launcher starts the rank and dies once it is ready."""
    launcher = (
        "import os, subprocess, sys\n"
        "rank = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE, text=True,\n"
        "    env={**os.environ, 'TORCHELASTIC_RUN_ID': 'x'}, stderr=2)\n"
        "assert rank.stdout.readline() == 'ready\\n'\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", launcher, ORPHAN], capture_output=True, text=True, timeout=60)
    assert "torchrun exited before this rank" in done.stderr  # communicate() waits until the rank has ended


def test_a_save_that_failed_does_not_keep_a_stuck_process(pair, monkeypatch, capsys):
    monkeypatch.setattr(peer_watch, "GRACE", 0.2)
    monkeypatch.setattr(peer_watch, "INTERVAL", 0.2)
    first = pair.watch(0)

    def fail() -> None:
        raise OSError("the storage does not answer")

    first.finish = fail
    pair.ends[1][0].close()
    first._thread.join(60.0)
    assert pair.calls[0][-1].startswith("Rank 1 exited without a message")
    assert "the storage does not answer" in capsys.readouterr().err
    first.close()


ALONE = """
import signal, sys, time
from moa_train.runtime.distributed import Distributed
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with Distributed.start("cpu", 60.0):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_single_rank_whose_torchrun_has_died_stops_as_well() -> None:
    launcher = (
        "import os, subprocess, sys\n"
        "rank = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE, text=True,\n"
        "    env={**os.environ, 'TORCHELASTIC_RUN_ID': 'x', 'RANK': '0', 'WORLD_SIZE': '1'}, stderr=2)\n"
        "assert rank.stdout.readline() == 'ready\\n'\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", launcher, ALONE], capture_output=True, text=True, timeout=60)
    assert "torchrun exited before this rank" in done.stderr


SUSPENDED = """
import socket, sys
from moa_train.runtime import peer_watch
peer_watch.LONGEST = 1.0
ours, theirs = socket.socketpair()
watch = peer_watch.PeerWatch(0, {1: ours}, 4.0, abort=int, finish=int, leave=print)
print("ready", flush=True)
sys.stdin.readline()
print(watch.lost, flush=True)
print(watch.reason(60.0), flush=True)
watch.close()
"""


def test_time_in_which_this_process_was_suspended_is_no_silence() -> None:
    words = [sys.executable, "-c", SUSPENDED]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4.5)
        process.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "None\n"
        assert process.stdout.readline() == "Rank 1 sent no heartbeat for 4 s (runtime.timeout).\n"
