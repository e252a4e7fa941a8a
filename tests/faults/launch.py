"""The commands as real processes, forked from a server that has imported everything, so that they start quickly."""

import atexit
import ctypes
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.manifest import PARTS
from moa_train.tracking.jsonl import MACHINE_FIELDS, read_rows

PATIENCE = 240.0
"""Seconds to wait for something that takes a few seconds on an idle machine."""

TRAIN, EVALUATE = "moa_train.cli.train", "moa_train.cli.evaluate"
PRELOADED = (
    *(TRAIN, EVALUATE, "moa_train.assembly.run", "moa_train.tracking.tensorboard"),
    *("sklearn.datasets", "torch._dynamo"),
)

TINY = (
    "data=digits data.limit=96 data.val_fraction=0.05 data.image_size=16 "
    "model.embed_dim=32 model.depths=[1,1] model.heads=[1,2] model.window=4 model.moa.reduction=8 "
    "runtime=exact runtime.device=cpu runtime.threads=1 engine.batch_size=16 engine.micro_batch_size=8 "
    "tracking.loggers=[] tracking.log_every=1 tracking.progress=plain "
    "engine.save_every='3 steps' engine.eval_every='5 steps' schedule.duration='18 steps' schedule.warmup=0%"
)
"""A run of 18 updates, 6 per epoch, with EMA, Muon, augmentation and drop path, so that everything has state."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


def arguments(text: str) -> list[str]:
    """Split a command line as a shell does, but keep the quotes, which Hydra needs."""
    words, quoted = [""], False
    for character in text:
        quoted ^= character == "'"
        if character == " " and not quoted:
            words.append("")
        else:
            words[-1] += character
    return [word for word in words if word]


class Job:
    """A running command on one or several ranks, each of which writes to ``<folder>/log-<n>-<rank>.txt``."""

    def __init__(
        self,
        command: str,
        folder: Path,
        *,
        ranks: int = 1,
        faults: str = "",
        module: str = TRAIN,
        own: Sequence[str] = (),
        places: Sequence[Path] = (),
        limit: int | None = None,
        obedient: bool = False,
        record: Path | None = None,
    ) -> None:
        """Start the processes.

        Args:
            command: the arguments.
            folder: current folder of the processes, which also gets their output.
            ranks: number of processes; they connect to each other like those of torchrun.
            faults: value of MOA_TRAIN_FAULTS.
            module: module whose ``main`` the processes call.
            own: additional arguments of each rank.
            places: current folder of each rank, if they differ as on several machines.
            limit: maximum size in bytes of a file that the processes write, which simulates a full disk.
            obedient: whether permissions of files apply even if the user is root.
            record: file to which the ranks append the samples of each micro-batch.
        """
        number = len(list(folder.glob("log-*-0.txt")))
        self.logs = [folder / f"log-{number}-{rank}.txt" for rank in range(ranks)]
        for log in self.logs:
            log.touch()  # so that the next job gets another number
        port = str(_free_port())
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environ = {key: str(value) for key, value in place.items()} if ranks > 1 else {}
            environ |= {"MOA_TRAIN_FAULTS": faults, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
            environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
            words = arguments(command) + (arguments(own[rank]) if own else [])
            words += ["device=cpu"] if module == EVALUATE else []  # trainings get it from TINY
            process = _context.Process(
                target=_run,
                args=(
                    *(module, words, environ, str(places[rank] if places else folder), str(self.logs[rank])),
                    *(limit, obedient, record),
                ),
            )
            process.start()
            self.processes.append(process)

    @property
    def output(self) -> str:
        """The output of all ranks so far."""
        return "\n".join(log.read_text() for log in self.logs)

    def signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def codes(self, patience: float = PATIENCE) -> list[int]:
        """Wait for all processes, and return their exit codes, negative for signals. Fail if one is still running."""
        end = time.monotonic() + patience
        for process in self.processes:
            process.join(max(0.01, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        assert not hanging, f"ranks {hanging} hang:\n{self.output}"
        return [process.exitcode or 0 for process in self.processes]

    def ended(self, code: int) -> str:
        """Wait for all processes, check that each exits with ``code``, and return the output."""
        assert self.codes() == [code] * len(self.processes), self.output
        return self.output


def _run(
    module: str,
    words: list[str],
    environ: dict[str, str],
    folder: str,
    log: str,
    limit: int | None,
    obedient: bool,
    record: Path | None,
) -> None:
    """Turn the new process into one that looks as if a shell had started it, and run the command."""
    multiprocessing.set_start_method("fork", force=True)  # for data loading workers, as in a process started by a shell
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if pytest runs under nohup
    os.setsid()
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environ)
    sys.argv = [module, *words]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if obedient:
        _obey_permissions()
    from moa_train.data import loader
    from moa_train.runtime import faults

    loader._STOP_PATIENCE = 3.0  # in place of 15 seconds
    faults.arm(os.environ)
    if record is not None:
        _record_samples(record)
    try:
        import_module(module).main()
    finally:
        atexit._run_exitfuncs()  # as a process started by a shell does, but not one of multiprocessing


def _obey_permissions() -> None:
    """Drop the capabilities of root to ignore permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for word in range(3):  # effective, permitted, inheritable
        data[word] &= ~0b110
    assert libc.capset(header, data) == 0


def _record_samples(path: Path) -> None:
    """Record every micro-batch of the training: step, number, samples, and a hash of the augmented pixels."""
    from moa_train.engine.step import TrainStep

    original = TrainStep._loss

    def recording(self: TrainStep, model: Any, batch: Any, step: int) -> Any:
        images, _ = self.transform(batch, step)
        pixels = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        line = json.dumps([step, batch.micro, batch.epoch.tolist(), batch.index.tolist(), pixels]) + "\n"
        with path.open("a") as file:
            file.write(line)
        return original(self, model, batch, step)

    TrainStep._loss = recording  # type: ignore[method-assign]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def samples(path: Path) -> dict[tuple[int, int], list[Any]]:
    """Return the samples that a `Job` recorded, by step and micro-batch; repeated steps must have the same samples."""
    seen: dict[tuple[int, int], list[Any]] = {}
    for line in path.read_text().splitlines():
        step, micro, *what = json.loads(line)
        assert seen.setdefault((step, micro), what) == what, f"step {step} was repeated with other samples"
    return seen


def state_hash(run: Path) -> str:
    """Return a hash of the newest checkpoint: of the scalars, and of names, types, shapes and bytes of all tensors."""
    checkpoint = CheckpointStore(run).newest()
    assert checkpoint is not None
    digest = hashlib.sha256(json.dumps(checkpoint.state["train"], sort_keys=True).encode())
    for part in (part for part in PARTS if part in checkpoint):
        for name, tensor in sorted(checkpoint.tensors(part).items()):
            digest.update(f"{part} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the metric rows of a run without the fields that depend on the machine."""
    return [
        {key: value for key, value in row.items() if key not in MACHINE_FIELDS}
        for row in read_rows(run / "metrics.jsonl")
    ]


def train_rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of training steps only: sessions that stop early add evaluations."""
    return [row for row in rows(run) if row["kind"] == "train"]


def result(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return everything that must be equal for two runs to count as the same."""
    return state_hash(run), rows(run)


def wait_for_step(run: Path, step: int) -> None:
    """Wait until a run has logged ``step`` updates."""
    log, end = run / "metrics.jsonl", time.monotonic() + PATIENCE
    while not any(row["step"] >= step for row in (read_rows(log) if log.exists() else ())):
        assert time.monotonic() < end, f"{run} does not reach step {step}"
        time.sleep(0.01)


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield all files below a folder with their contents, to check whether anything was written."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name != ".lock":
            yield str(path), path.read_bytes()
