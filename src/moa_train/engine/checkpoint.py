"""Checkpoints: a folder per optimizer step, of which a valid one exists at every instant after the first.

    <run_dir>/checkpoints/step-00001234/
        model.safetensors  ema.safetensors  optimizer.safetensors     tensors; ema only if weights are averaged
        state.json                                                    all the rest that a resume needs
        manifest.json                                                 size and SHA-256 of each file, written last

A folder is written under a temporary name, flushed to the disk, renamed, flushed, verified; only then is an older one
removed. What is newest or best is found by looking at what is there and verifying it: by step and by the score in the manifest,
never by time stamps, nor by a pointer that a crash could leave behind. The links `last` and `best` are for humans.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from moa_train.engine.weights import CheckpointError, read_tensors, write_tensors
from moa_train.runtime import faults

log = logging.getLogger(__name__)

FORMAT = 1
PARTS = ("model", "ema", "optimizer")
"""What tensors come in; each is a file ``<part>.safetensors``."""
FILES = (*(f"{part}.safetensors" for part in PARTS), "state.json")
MANIFEST = "manifest.json"
JSON_LIMIT = 64 * 2**20

_STEP = re.compile(r"step-(\d{8,})(\.replaced)?")
_SAVING = ".saving-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest is sound. Files are verified when they are read, or all by `verify`."""

    path: Path
    step: int
    score: float | None
    """What the best is chosen by, higher is better; None if it was not evaluated."""
    digest: str
    """SHA-256 of the manifest: two ranks that see the same digest see the same checkpoint."""
    files: Mapping[str, tuple[int, str]] = field(repr=False)
    """{name: (bytes, SHA-256)}"""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and check the manifest of the folder ``path``; raises CheckpointError."""
        text = _read(path / MANIFEST, JSON_LIMIT)
        try:
            manifest = json.loads(text)
            files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
            step, score = int(manifest["step"]), manifest["score"]
            # The manifest vouches for the files, its own sum for itself, and its form is fixed to the byte.
            sound = text == _manifest(step, score, files) and manifest["format"] <= FORMAT
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise CheckpointError(f"{path / MANIFEST} is damaged or of a newer format than {FORMAT}.")
        if (match := _STEP.fullmatch(path.name)) and int(match[1]) != step:
            raise CheckpointError(f"{path / MANIFEST} belongs to step {step}, not to this folder.")
        unknown = sorted(set(files) - set(FILES))
        if unknown or not {"model.safetensors", "state.json"} <= set(files):
            raise CheckpointError(f"{path / MANIFEST} names {', '.join(unknown) or 'too few files'}.")
        return cls(path, step, score, hashlib.sha256(text).hexdigest(), files)

    def verify(self) -> Self:
        """Compare size and SHA-256 of every file; raises CheckpointError that names the first damaged one."""
        for name in self.files:
            self._verify(name)
        return self

    def _verify(self, name: str) -> Path:
        path, (size, sha256) = self.path / name, self.files[name]
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is not a regular file.")
            if status.st_size != size:
                raise CheckpointError(f"{path} is damaged: {status.st_size} bytes, not {size}.")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in the manifest.")
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
        return path

    def __contains__(self, part: str) -> bool:
        return f"{part}.safetensors" in self.files

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Verify and read the tensors of ``model``, ``ema`` or ``optimizer``; missing ones are a CheckpointError."""
        return self.weights(part)[0]

    def weights(self, part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Like `tensors`, with the metadata of the file."""
        if part not in self:
            raise CheckpointError(f"{self.path} has no {part}.safetensors; it has {', '.join(self.files)}.")
        return read_tensors(self._verify(f"{part}.safetensors"))

    def state(self) -> dict[str, Any]:
        """Verify and read state.json."""
        state: dict[str, Any] = json.loads(_read(self._verify("state.json"), JSON_LIMIT))
        return state


@dataclass(frozen=True)
class _Job:
    step: int
    score: float | None
    tensors: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]
    state: bytes
    ready: torch.cuda.Event | None

    @property
    def bytes(self) -> int:
        values = (tensor for part in self.tensors.values() for tensor in part.values())
        return len(self.state) + sum(tensor.numel() * tensor.element_size() for tensor in values)


class CheckpointStore:
    """The checkpoints of a run folder. One process saves (rank 0, holding the run's lock), any number read.

    Retention keeps the newest ``keep_last``, those at multiples of ``keep_every`` steps (0: none), and the best. It counts valid
    ones only, and removes nothing but files of the names above in folders named as above.
    """

    def __init__(self, run_dir: Path, *, keep_last: int = 2, keep_every: int = 0) -> None:
        self.directory = run_dir / "checkpoints"
        self.keep_last, self.keep_every = max(1, keep_last), keep_every
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[Checkpoint] | None = None
        self._verified: dict[str, tuple[object, ...]] = {}

    # Reading

    def newest(self) -> Checkpoint | None:
        """Return the valid checkpoint of the highest step, or None if there has never been one.

        A damaged one is passed over with a warning that names the file; if all are damaged, that is a CheckpointError: a run
        must not silently start afresh.
        """
        damage = []
        for path in self._folders():
            try:
                checkpoint = Checkpoint.open(path).verify()
            except CheckpointError as error:
                damage.append(str(error))
                continue
            for line in damage:
                log.warning("%s Falling back to step %d.", line, checkpoint.step)
            return checkpoint
        if damage:
            listed = "\n  ".join(damage[:6])
            raise CheckpointError(
                f"No checkpoint in {self.directory} is valid:\n  {listed}\n"
                "Restore one from a copy, or choose another run folder to start afresh."
            )
        return None

    def best(self) -> Checkpoint | None:
        """Return the valid checkpoint of the highest score (of equals the earliest), or None if none was evaluated."""
        scored = [checkpoint for checkpoint in self._openable() if checkpoint.score is not None]
        for checkpoint in sorted(scored, key=lambda found: (found.score, -found.step), reverse=True):
            if self._is_valid(checkpoint):
                return checkpoint
            log.warning("The best checkpoint so far, %s, is damaged.", checkpoint.path)
        return None

    def at(self, step: int) -> Checkpoint:
        """Return the valid checkpoint of ``step``; raises CheckpointError that lists those there are."""
        for path in self._folders():
            if _step_of(path) == step:
                return Checkpoint.open(path).verify()
        steps = sorted({_step_of(path) for path in self._folders()})
        raise CheckpointError(f"{self.directory} has no checkpoint of step {step}; it has {steps or 'none'}.")

    def _folders(self) -> list[Path]:
        """Folders of checkpoints, newest step first; one that was being replaced comes after its replacement."""
        if not self.directory.is_dir():
            return []
        found = [
            path
            for path in self.directory.iterdir()
            if _STEP.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ]
        ours = [path for path in found if any((path / name).exists() for name in (MANIFEST, *FILES))]
        return sorted(ours, key=lambda path: (_step_of(path), not path.suffix), reverse=True)

    def _openable(self) -> Iterator[Checkpoint]:
        for path in self._folders():
            with contextlib.suppress(CheckpointError):
                yield Checkpoint.open(path)

    def _is_valid(self, checkpoint: Checkpoint) -> bool:
        """Verify a checkpoint unless it was verified before and the system says that nobody touched it since."""
        try:
            statuses = [(checkpoint.path / name).lstat() for name in checkpoint.files]
            print_now = (checkpoint.digest, *((s.st_ino, s.st_size, s.st_mtime_ns) for s in statuses))
            if self._verified.get(checkpoint.path.name) != print_now:
                checkpoint.verify()
                self._verified[checkpoint.path.name] = print_now
        except (OSError, CheckpointError):
            return False
        return True

    # Saving

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        metadata: Mapping[str, str] | None = None,
        score: float | None = None,
        background: bool = False,
    ) -> None:
        """Save ``{part: {name: tensor}}`` (`PARTS`, any device) and a JSON-able state; an older save of ``step`` is replaced.

        ``metadata`` goes into the header of the weights files (model and ema). In the background the call returns once the
        tensors are copied to host memory; one save is in flight at a time, and its failure is raised by the next `save`, `poll`, `wait` or
        `close`. Raises CheckpointError if it cannot be written; no partial file is left, and older checkpoints stay.
        """
        self.wait()
        assert set(tensors) <= set(PARTS) and "model" in tensors, f"parts must be of {PARTS}, not {list(tensors)}"
        job = _Job(
            step,
            score,
            {part: {name: _to_host(t, background) for name, t in named.items()} for part, named in tensors.items()},
            dict(metadata or {}),
            (json.dumps(state, indent=1) + "\n").encode(),
            _copies_done(tensors),
        )
        if background:
            self._saving = self._executor.submit(self._save, job)
        else:
            self._save(job)

    def poll(self) -> None:
        """Raise the error of a background save that has failed; costs nothing otherwise."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the save in flight is done; raises its error."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Finish the save in flight; raises its error."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            log.error("%s", failure)  # the error on its way out is the one to see

    def _save(self, job: _Job) -> Checkpoint:
        if job.ready is not None:
            job.ready.synchronize()
        final = self.directory / f"step-{job.step:08d}"
        temporary = self.directory / f"{_SAVING}{final.name}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clean()
            free = shutil.disk_usage(self.directory).free
            if free < job.bytes * 1.01 + 2**20:
                raise CheckpointError(
                    f"Cannot save step {job.step}: it needs {job.bytes / 2**20:.0f} MiB, and {self.directory} has "
                    f"{free / 2**20:.0f} MiB free. Free some space, or keep fewer checkpoints."
                )
            _write_folder(temporary, job)
            faults.point("checkpoint.before_rename")
            _rename(temporary, final)
            faults.point("checkpoint.after_rename")
            saved = Checkpoint.open(final)
            if not self._is_valid(saved):
                saved.verify()
        except BaseException as error:
            _remove(temporary)
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"Cannot save step {job.step} in {self.directory}: {error.strerror or error}. "
                    "Older checkpoints are untouched."
                ) from error
            raise
        faults.point("checkpoint.before_prune")
        try:
            self._clean()
            self._prune()
        except OSError as error:
            log.warning("Cannot remove older checkpoints: %s.", error)
        return saved

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints later than ``step``, which must be valid: what follows it will be another history."""
        self.wait()
        self.at(step)
        for path in self._folders():
            if _step_of(path) > step:
                _remove(path)
        self._point_links()

    def _clean(self) -> None:
        """Finish what a crash interrupted: half-written folders go, a folder that lost its replacement comes back."""
        for path in self.directory.glob(f"{_SAVING}*"):
            _remove(path)
        for path in self.directory.glob("step-*.replaced"):
            if not path.is_symlink() and _STEP.fullmatch(path.name):
                current = path.with_suffix("")
                if any(self._is_valid(found) for found in self._openable() if found.path == current):
                    _remove(path)
                elif not current.exists():
                    path.rename(current)

    def _prune(self) -> None:
        valid = [found for found in self._openable() if self._is_valid(found)]
        best = self.best()
        kept = {found.path for found in valid[: self.keep_last]} | {best.path if best else valid[0].path}
        if self.keep_every:
            kept |= {found.path for found in valid if found.step % self.keep_every == 0}
        for path in self._folders():
            # A damaged one that is newer than all that is valid stays for somebody to look at, until its step comes again.
            if path not in kept and _step_of(path) <= valid[0].step:
                _remove(path)
        self._point_links()

    def _point_links(self) -> None:
        newest, best = next(self._openable(), None), self.best()
        for name, target in (("last", newest), ("best", best)):
            link, temporary = self.directory / name, self.directory / f"{_SAVING}{name}"
            with contextlib.suppress(OSError):  # a convenience: not every file system has links
                if link.exists() and not link.is_symlink():
                    continue
                temporary.unlink(missing_ok=True)
                if target is None:
                    link.unlink(missing_ok=True)
                else:
                    temporary.symlink_to(target.path.name)
                    temporary.replace(link)


def _to_host(tensor: Tensor, copy: bool) -> Tensor:
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone() if copy else tensor
    # Into pinned memory, without waiting; see _copies_done.
    return tensor.to("cpu", non_blocking=True)


def _copies_done(tensors: Mapping[str, Mapping[str, Tensor]]) -> torch.cuda.Event | None:
    """Return an event that comes after all copies; later updates of the tensors queue up behind them."""
    if not any(tensor.is_cuda for part in tensors.values() for tensor in part.values()):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _write_folder(folder: Path, job: _Job) -> None:
    folder.mkdir()
    files: dict[str, tuple[int, str]] = {}
    for part, tensors in job.tensors.items():
        metadata = job.metadata if part in ("model", "ema") else None
        files[f"{part}.safetensors"] = write_tensors(folder / f"{part}.safetensors", tensors, metadata)
    _write_bytes(folder / "state.json", job.state)
    files["state.json"] = (len(job.state), hashlib.sha256(job.state).hexdigest())
    faults.point("checkpoint.before_manifest")
    _write_bytes(folder / MANIFEST, _manifest(job.step, job.score, files))
    _fsync(folder)


def _manifest(step: int, score: float | None, files: Mapping[str, tuple[int, str]]) -> bytes:
    """Compose the manifest; its last line is the SHA-256 of the rest."""
    entries = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in sorted(files.items())}
    content = {"format": FORMAT, "step": step, "score": score, "files": entries}
    content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps(content, indent=1) + "\n").encode()


def _rename(temporary: Path, final: Path) -> None:
    """Put a finished folder into place; one that is in the way is kept under a name that readers know as well."""
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        if replaced.exists():
            _remove(replaced)
        final.rename(replaced)
        faults.point("checkpoint.between_renames")
    temporary.rename(final)
    _fsync(final.parent)


def _remove(folder: Path) -> None:
    """Remove a checkpoint's own files, the manifest first, and the folder if nothing else is in it."""
    if folder.is_symlink():
        folder.unlink()
        return
    for name in (MANIFEST, *FILES):
        (folder / name).unlink(missing_ok=True)
        faults.point("checkpoint.mid_remove")
    with contextlib.suppress(OSError):  # somebody's own files stay
        folder.rmdir()


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, limit: int) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise CheckpointError(f"{path} is not a regular file of at most {limit} bytes.")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])


@dataclass(frozen=True)
class FoundWeights:
    """Where weights were found: the file, the checkpoint it belongs to (if any), and in words which one was taken."""

    path: Path
    checkpoint: Checkpoint | None
    description: str

    def load(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Verify (if there is a manifest) and read (tensors, metadata)."""
        return self.checkpoint.weights(self.path.stem) if self.checkpoint else read_tensors(self.path)


def load_weights_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a lone weights file into (tensors, metadata); raises CheckpointError for pickles and damage."""
    return read_tensors(path)


def find_weights(path: Path, parts: Sequence[str] = ("ema", "model")) -> FoundWeights:
    """Find what to evaluate in a run folder, a checkpoint's folder or a weights file.

    Of a run folder it takes the best checkpoint, else the newest; of a checkpoint the first of ``parts`` that it has: averaged
    weights before plain ones. Raises CheckpointError if there is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Give a run folder, a checkpoint folder or a .safetensors file.")
    if path.is_file():
        folder = path.parent
        if path.name in FILES and (folder / MANIFEST).is_file():
            checkpoint = Checkpoint.open(folder)
            return FoundWeights(path, checkpoint, f"{path.name} of step {checkpoint.step}")
        return FoundWeights(path, None, f"weights file {path.name}")
    if (path / MANIFEST).is_file():
        checkpoint, which = Checkpoint.open(path.resolve()), "checkpoint"
    else:
        run_dir = path.parent if path.name == "checkpoints" else path
        store = CheckpointStore(run_dir)
        best = store.best()
        found = best or store.newest()
        if found is None:
            raise CheckpointError(f"{path} holds no checkpoint: no checkpoints/step-.../{MANIFEST} in it.")
        checkpoint, which = found, "best checkpoint" if best else "newest checkpoint"
    part = next((part for part in parts if part in checkpoint), None)
    if part is None:
        raise CheckpointError(f"{checkpoint.path} has no {' or '.join(parts)} weights.")
    kind = "averaged weights" if part == "ema" else "weights"
    return FoundWeights(
        checkpoint.path / f"{part}.safetensors", checkpoint, f"{kind} of the {which}, step {checkpoint.step}"
    )
