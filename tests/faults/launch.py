"""The commands as real processes, started quickly: a server that has imported everything forks each of them."""

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
"""Seconds to wait for what takes a few on a free machine."""

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
"""18 updates, 6 an epoch, with averaged weights, Muon, augmentation and stochastic depth: all that has state."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


def arguments(text: str) -> list[str]:
    """Split a command line's arguments; quotes hold what has blanks together, as in a shell, and stay for Hydra."""
    words, quoted = [""], False
    for character in text:
        quoted ^= character == "'"
        if character == " " and not quoted:
            words.append("")
        else:
            words[-1] += character
    return [word for word in words if word]


class Job:
    """A command under way, on one rank or several, which log to ``<folder>/log-<n>-<rank>.txt``."""

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
        """Start it.

        Args:
            command: arguments, as typed.
            folder: where to log and to run.
            ranks: processes, which find each other as torchrun's do.
            faults: for MOA_TRAIN_FAULTS.
            module: whose ``main`` to call.
            own: further arguments of each rank.
            places: folder to run in of each rank, as on machines of their own.
            limit: largest size of a file that the processes may write, in bytes: a full disk.
            obedient: permissions hold for the processes, though they may be root's.
            record: file, in the folder, to which ranks append which samples they computed with.
        """
        number = len(list(folder.glob("log-*-0.txt")))
        self.logs = [folder / f"log-{number}-{rank}.txt" for rank in range(ranks)]
        for log in self.logs:
            log.touch()  # the next one has another number
        port = str(_free_port())
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environ = {key: str(value) for key, value in place.items()} if ranks > 1 else {}
            environ |= {"MOA_TRAIN_FAULTS": faults, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
            environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
            words = arguments(command) + (arguments(own[rank]) if own else [])
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
        """What all ranks have printed so far."""
        return "\n".join(log.read_text() for log in self.logs)

    def signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def codes(self, patience: float = PATIENCE) -> list[int]:
        """Wait for the end; return the exit codes, negative for signals. What is left then is killed, and a failure."""
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
        """Wait for the end, which must be with ``code`` on every rank; return the output."""
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
    """In the new process: become what a shell would have started."""
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a process that a shell has started
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
    from moa_train.runtime import faults

    faults.arm(os.environ)
    if record is not None:
        _record_samples(record)
    import_module(module).main()


def _obey_permissions() -> None:
    """Give up root's right to write and read everywhere (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for word in range(3):  # effective, permitted, inheritable
        data[word] &= ~0b110
    assert libc.capset(header, data) == 0


def _record_samples(path: Path) -> None:
    """Have every micro-batch that is trained on noted: step, number, samples and a hash of the augmented pixels."""
    from moa_train.engine.step import TrainStep

    original = TrainStep._loss

    def noted(self: TrainStep, model: Any, batch: Any, step: int) -> Any:
        images, _ = self.transform(batch, step)
        pixels = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        line = json.dumps([step, batch.micro, batch.epoch.tolist(), batch.index.tolist(), pixels]) + "\n"
        with path.open("a") as file:
            file.write(line)
        return original(self, model, batch, step)

    TrainStep._loss = noted  # type: ignore[method-assign]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def samples(path: Path) -> dict[tuple[int, int], list[Any]]:
    """Return what `Job` recorded, by step and micro-batch; of a step that was repeated all repetitions must agree."""
    seen: dict[tuple[int, int], list[Any]] = {}
    for line in path.read_text().splitlines():
        step, micro, *what = json.loads(line)
        assert seen.setdefault((step, micro), what) == what, f"step {step} was repeated with other samples"
    return seen


def state_hash(run: Path) -> str:
    """H: the hash over all state in a run's newest checkpoint: sorted names, types, shapes, bytes; and the scalars."""
    checkpoint = CheckpointStore(run).newest()
    assert checkpoint is not None
    digest = hashlib.sha256(json.dumps(checkpoint.state["train"], sort_keys=True).encode())
    for part in (part for part in PARTS if part in checkpoint):
        for name, tensor in sorted(checkpoint.tensors(part).items()):
            digest.update(f"{part} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the metric rows of a run, without what the machine has a say in."""
    return [
        {key: value for key, value in row.items() if key not in MACHINE_FIELDS}
        for row in read_rows(run / "metrics.jsonl")
    ]


def train_rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of updates alone: sessions of their own length end with evaluations of their own."""
    return [row for row in rows(run) if row["kind"] == "train"]


def result(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return what two runs must have in common to count as the same."""
    return state_hash(run), rows(run)


def wait_for_step(run: Path, step: int) -> None:
    """Wait until a run has logged ``step`` updates."""
    log, end = run / "metrics.jsonl", time.monotonic() + PATIENCE
    while not any(row["step"] >= step for row in (read_rows(log) if log.exists() else ())):
        assert time.monotonic() < end, f"{run} does not reach step {step}"
        time.sleep(0.01)


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield all files below a folder with their contents, to see whether anything was written."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name != ".lock":
            yield str(path), path.read_bytes()
