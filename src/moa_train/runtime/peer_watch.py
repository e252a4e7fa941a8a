"""Detect within seconds that another rank has failed or died, and exit this process if its main thread is stuck.

Every rank holds one TCP connection to rank 0 in addition to those of gloo and NCCL. A separate thread serves the
connection, so neither a GPU kernel that waits for a dead rank nor a save on slow storage blocks it. When a process
dies, the operating system closes its connection immediately. When a machine or a network link fails, no connection is
closed; missing heartbeats reveal the failure.
"""

import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping

INTERVAL = 1.0
"""Seconds between heartbeats."""
GRACE = 6.0
"""Seconds within which the main thread must exit on its own after another rank was lost."""
LONGEST = 5.0
"""Seconds between two looks at the other ranks that count as their silence; after longer ones, this process was
suspended, perhaps together with them (SIGSTOP, `scontrol suspend`)."""


class PeerWatch:
    """Watch the other ranks through ``connections``: rank 0 watches every other rank, and the others watch rank 0.

    Args:
        rank: this rank.
        connections: {rank: connected socket}; the sockets are closed at the end.
        silence: seconds without a heartbeat after which a rank counts as lost.
        abort: called in the watch thread when a rank is lost, to release a main thread that waits for that rank.
        finish: called if the main thread has not exited after `GRACE` more seconds; waits for work that must not be
            interrupted, such as a save.
        leave: called with the reason if the main thread still has not exited; exits the process.
    """

    def __init__(
        self,
        rank: int,
        connections: Mapping[int, socket.socket],
        silence: float,
        *,
        abort: Callable[[], object],
        finish: Callable[[], object],
        leave: Callable[[str], object],
    ) -> None:
        self.rank, self.silence = rank, silence
        self.abort, self.finish, self.leave = abort, finish, leave
        self.lost: str | None = None
        """A sentence that describes what happened to the first lost rank, or None."""
        self._noticed, self._closing = threading.Event(), threading.Event()
        self._peers = dict(connections)
        self._received = dict.fromkeys(connections, b"")
        self._heard = dict.fromkeys(connections, time.monotonic())
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._thread = threading.Thread(target=self._run, name="peer watch", daemon=True)
        for connection in connections.values():
            connection.setblocking(False)
        # A worker that outlives its rank must not keep the connection open.
        os.register_at_fork(after_in_child=self._close_connections)
        self._thread.start()

    def close(self, error: BaseException | None = None) -> None:
        """Report to the other ranks that this rank is done or has failed, so that they do not wait for it."""
        self._closing.set()
        self._thread.join(GRACE)  # the thread may be in `abort`, which waits for a GPU
        words = ("bye",) if error is None else ("lost", f"Rank {self.rank} failed ({_brief(error)}).")
        self._send_to_all(*words)
        self._close_connections()

    def reason(self, patience: float) -> str | None:
        """Return what happened to the lost rank, after waiting up to ``patience`` seconds for a report."""
        self._noticed.wait(patience)
        return self.lost

    def _run(self) -> None:
        beat, looked = 0.0, time.monotonic()
        while not self._closing.is_set() and self.lost is None:
            now = time.monotonic()
            if now >= beat:
                self._send_to_all("alive")
                beat = now + INTERVAL
                self._check_parent()
            self._receive(0.2)
            looked, passed = time.monotonic(), time.monotonic() - looked
            if passed > LONGEST:
                self._heard = {peer: min(heard + passed, looked) for peer, heard in self._heard.items()}
            for peer, heard in self._heard.items():
                if self.lost is None and peer in self._peers and time.monotonic() - heard > self.silence:
                    self._lose(f"Rank {peer} sent no heartbeat for {self.silence:g} s (runtime.timeout).")
        if self.lost is None:
            return
        self._noticed.set()
        self._send_to_all("lost", self.lost)
        self._attempt(self.abort)
        if self._closing.wait(GRACE):
            return
        self._attempt(self.finish)
        if not self._closing.wait(INTERVAL):
            self.leave(self.lost)

    def _attempt(self, action: Callable[[], object]) -> None:
        """Do what is still possible: a save that failed, for example, must not keep this process from exiting."""
        try:
            action()
        except Exception as error:
            print(f"error: {_brief(error)}", file=sys.stderr, flush=True)

    def _receive(self, patience: float) -> None:
        with selectors.DefaultSelector() as selector:
            for peer, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, peer)
            if not self._peers:  # all other ranks are done
                self._closing.wait(patience)
            ready = [key.data for key, _ in selector.select(patience)] if self._peers else []
        for peer in ready:
            try:
                data = self._peers[peer].recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            self._heard[peer] = time.monotonic()
            *lines, self._received[peer] = (self._received[peer] + data).split(b"\n")
            for line in lines:
                self._obey(peer, *json.loads(line))
            if not data and peer in self._peers:
                self._peers.pop(peer).close()
                self._lose(f"Rank {peer} exited without a message: it was killed, crashed, or ran out of memory.")

    def _obey(self, peer: int, what: str, text: str = "") -> None:
        if what == "bye":
            self._peers.pop(peer).close()
        elif what == "lost":
            self._lose(text)

    def _lose(self, sentence: str) -> None:
        self.lost = self.lost or sentence

    def _check_parent(self) -> None:
        """Save and stop if torchrun has exited, because a new torchrun may start its own ranks on this machine."""
        if self._parent not in (None, os.getppid()):
            self._parent = None
            print("torchrun exited before this rank: saving and stopping.", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def _send_to_all(self, *words: str) -> None:
        for connection in self._peers.values():
            try:
                connection.send(json.dumps(words).encode() + b"\n")
            except OSError:  # The buffer is full, or the connection is broken, which the next read detects.
                continue

    def _close_connections(self) -> None:
        for connection in self._peers.values():
            connection.close()


def _brief(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".removesuffix(".").removesuffix(": ")


def connect(
    rank: int,
    world_size: int,
    publish: Callable[[str], object],
    lookup: Callable[[], str],
    address: str,
    timeout: float,
) -> dict[int, socket.socket]:
    """Connect every rank to rank 0, and return this rank's sockets as {rank: socket}.

    Args:
        rank: this rank.
        world_size: number of ranks.
        publish: called on rank 0 with its port and a secret, which ``lookup`` returns on the other ranks.
        lookup: returns the text that rank 0 published.
        address: host name or address of rank 0's machine, as seen from the other machines.
        timeout: seconds within which all connections must be made.

    Raises:
        OSError: a connection could not be made in time.
    """
    if rank:
        port, secret = json.loads(lookup())
        connection = socket.create_connection((address, port), timeout)
        connection.sendall(json.dumps([secret, rank]).encode() + b"\n")
        return {0: connection}
    end, secret = time.monotonic() + timeout, os.urandom(16).hex()
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    connections: dict[int, socket.socket] = {}
    with socket.create_server(("", 0), family=family, backlog=world_size, dualstack_ipv6=dual) as server:
        publish(json.dumps([server.getsockname()[1], secret]))
        while len(connections) < world_size - 1:
            server.settimeout(max(0.01, end - time.monotonic()))
            connection, _ = server.accept()
            connection.settimeout(5.0)
            try:
                with connection.makefile("rb", buffering=0) as stream:
                    given, peer = json.loads(stream.readline(200))
            except (OSError, ValueError, TypeError):  # not a rank, such as a port scanner
                connection.close()
                continue
            if given != secret:
                connection.close()
                continue
            connections[peer] = connection
    return connections
