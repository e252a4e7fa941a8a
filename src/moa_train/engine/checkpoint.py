"""Save and find the checkpoints of a run, one folder per step. After the first save, a valid one always exists.

A checkpoint folder (see `manifest`) is written under a temporary name, flushed to disk, renamed, flushed and verified.
Only then is an older checkpoint removed. The newest and the best checkpoint are found by listing and verifying the
folders: by step and by the score in the manifest, never by time stamps or by a pointer that a crash could leave
outdated. The links `last` and `best` exist only for users' convenience.
"""

import contextlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from moa_train.engine.manifest import (
    FILES,
    MANIFEST,
    Checkpoint,
    folder_name,
    folder_step,
    fsync_folder,
    remove_folder,
)
from moa_train.engine.snapshot import Snapshot
from moa_train.engine.tensorfile import CheckpointError, UnreadableError
from moa_train.runtime import faults
from moa_train.runtime.files import file_type
from moa_train.schema import EngineConfig

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds between warnings while waiting for a save; a hanging storage system may never finish it."""

_SAVING = ".saving-"
_REPLACED = ".replaced"


class CheckpointStore:
    """Manage the checkpoints in ``<run_dir>/checkpoints``.

    Only one process saves (rank 0, which holds the run's lock); any number of processes read. Retention keeps the
    newest ``keep_last`` checkpoints, those of steps for which ``keep`` returns True, and the best one of each kind of
    measurement (for example, of each split). Only valid checkpoints count. Nothing is removed except files of known
    names in folders of known names.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_last: int = EngineConfig.keep_last,
        keep: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.directory = run_dir / "checkpoints"
        self.keep_last, self.keep = max(1, keep_last), keep
        self._executor: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None
        self._verified: dict[Path, tuple[object, ...]] = {}

    # Reading

    def newest(self, until: int | None = None) -> Checkpoint | None:
        """Return the valid checkpoint with the highest step (up to ``until``), or None if no checkpoint exists.

        A damaged checkpoint is skipped with a warning that names the file.

        Raises:
            CheckpointError: every checkpoint is damaged. A run must not silently start from scratch.
        """
        damage, folders = [], self._folders()
        for path in folders:
            if until is not None and (folder_step(path) or 0) > until:
                continue
            try:
                checkpoint = Checkpoint.open(path).verify()
            except CheckpointError as error:
                damage.append(str(error))
                continue
            for line in damage:
                log.warning("%s Falling back to step %d.", line, checkpoint.step)
            return checkpoint
        if self._folders() != folders:  # the run is still active and replaced the listed checkpoints by newer ones
            return self.newest(until)
        if damage:
            listed = "\n  ".join(damage[:6])
            raise CheckpointError(
                f"No checkpoint in {self.directory} is valid:\n  {listed}\n"
                "Restore one from a backup, or choose another run folder to start from scratch."
            )
        return None

    def best(self) -> Checkpoint | None:
        """Return the valid checkpoint with the highest score, or None if none was evaluated.

        Among equal scores, the earliest checkpoint is the best. A score counts only if it was measured like that of
        the newest checkpoint, for example on the same split.
        """
        now = next((state for state in map(_state, self._openable()) if state is not None), {})
        for checkpoint in self._ranked():
            if not _comparable(_state(checkpoint), now):
                continue
            if self._is_valid(checkpoint):
                return checkpoint
            if file_type(checkpoint.path) is None:  # the run is still active and has a better checkpoint
                return self.best()
            log.warning("%s, the best checkpoint so far, is damaged.", checkpoint.path)
        return None

    def _best_of_each_measurement(self) -> Iterator[Path]:
        """Yield the valid checkpoint with the highest score among those whose scores were measured alike."""
        seen = set()
        for checkpoint in self._ranked():
            measured = json.dumps((_state(checkpoint) or {}).get("measured"), sort_keys=True)
            if measured not in seen and self._is_valid(checkpoint):
                seen.add(measured)
                yield checkpoint.path

    def _ranked(self) -> list[Checkpoint]:
        """Return the checkpoints that have a score: the highest score first, and among equal scores the earliest."""
        scored = [(-found.score, found.step, found) for found in self._openable() if found.score is not None]
        return [found for _, _, found in sorted(scored, key=lambda entry: entry[:2])]

    def at(self, step: int) -> Checkpoint:
        """Return the valid checkpoint of ``step``. Raises CheckpointError, which lists the available steps."""
        folders = self._folders()
        damage: CheckpointError | None = None
        for path in folders:
            if folder_step(path) == step:
                try:
                    return Checkpoint.open(path).verify()
                except CheckpointError as error:
                    damage = damage or error
        steps = ", ".join(str(step) for step in sorted({folder_step(path) or 0 for path in folders}))
        raise damage or CheckpointError(
            f"{self.directory} has no checkpoint of step {step}. Available steps: {steps or 'none'}."
        )

    def _folders(self) -> list[Path]:
        """Return the checkpoint folders, newest step first. A replaced folder follows its replacement.

        Raises UnreadableError if the folders cannot be listed.
        """
        found, path = [], self.directory
        try:
            if file_type(path) != stat.S_IFDIR:
                return []
            for path in self.directory.iterdir():
                step = folder_step(path)
                if step is None or file_type(path, follow_links=False) != stat.S_IFDIR:
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                    if not {MANIFEST, *FILES}.isdisjoint(os.listdir(path)):  # noqa: PTH208 only the names are needed
                        found.append(((step, not path.suffix), path))
        except OSError as error:
            raise UnreadableError(path, error) from error
        return [path for _, path in sorted(found, reverse=True)]

    def _openable(self) -> Iterator[Checkpoint]:
        for path in self._folders():
            try:
                checkpoint = Checkpoint.open(path)
            except UnreadableError:
                raise
            except CheckpointError:
                continue
            yield checkpoint

    def _is_valid(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint is valid. Verify it unless its files are unchanged since the last verification.

        Raises UnreadableError if the checkpoint cannot be read.
        """
        try:
            statuses = [(checkpoint.path / name).lstat() for name in checkpoint.files]
            unchanged = (checkpoint.digest, *((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in statuses))
            if self._verified.get(checkpoint.path) != unchanged:
                checkpoint.verify()
                self._verified[checkpoint.path] = unchanged
        except UnreadableError:
            raise
        except (FileNotFoundError, NotADirectoryError, CheckpointError):
            return False
        except OSError as error:
            raise UnreadableError(checkpoint.path, error) from error
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
        """Save a checkpoint. An existing checkpoint of the same step is replaced, and stays permanent if it was.

        Args:
            step: number of completed optimizer steps.
            tensors: {part: {name: tensor}} with parts as in `manifest.PARTS`, on any device and with any strides.
            state: everything else, JSON-serializable.
            metadata: metadata for the headers of the weights files (model and ema).
            score: score that selects the best checkpoint, higher is better; None if this state was not evaluated.
            background: return once the tensors are copied to host memory. Only one save runs at a time. Its failure is
                raised by the next call of `save`, `poll`, `wait` or `close`.

        Raises:
            CheckpointError: the checkpoint cannot be written. No partial file remains, and older checkpoints are
                unchanged.
        """
        self.wait()
        if _is_permanent(self.directory / folder_name(step)):
            state = {**state, "kept": True}
        snapshot = Snapshot.take(step, tensors, state, metadata or {}, score, copy=background)
        if not background:
            self._save(snapshot)
            return
        self._executor = self._executor or ThreadPoolExecutor(1, "checkpoint")
        self._saving = self._executor.submit(self._save, snapshot)

    def poll(self) -> None:
        """Raise the error of a background save that has failed; return immediately otherwise."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the current save is done, and raise its error if it failed."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        while not wait_for([saving], PATIENCE).done:
            log.warning(
                "Waiting for a save in %s. The storage is slow or does not respond. Press Ctrl-C twice to exit without "
                "the save; older checkpoints are unchanged.",
                self.directory,
            )
        saving.result()

    def close(self) -> None:
        """Finish the current save, and raise its error if it failed."""
        try:
            self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None

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
            log.error("%s", failure)  # the error that is already propagating takes precedence

    def _save(self, snapshot: Snapshot) -> None:
        step = snapshot.step
        temporary = self.directory / f"{_SAVING}{folder_name(step)}"
        try:
            if not self.directory.is_dir():
                self.directory.mkdir(parents=True)
                fsync_folder(self.directory.parent)
            self._clean()
            self._check_space(snapshot)
            snapshot.write(temporary)
            faults.point("checkpoint.before_rename")
            self._put_into_place(temporary)
        except BaseException as error:
            with contextlib.suppress(OSError):
                remove_folder(temporary)
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"Cannot save step {step} in {self.directory}: {error.strerror or error}. "
                    "Free some space or fix the storage, then resume the run; older checkpoints are unchanged."
                ) from error
            raise
        faults.point("checkpoint.before_prune")
        try:
            self._clean()
            self._prune()
        except (OSError, UnreadableError) as error:
            log.warning("Older checkpoints were not removed: %s", error)

    def _check_space(self, snapshot: Snapshot) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < snapshot.bytes * 1.01 + 2**20:  # a margin for headers and disk blocks
            raise CheckpointError(
                f"Cannot save step {snapshot.step}: it requires {snapshot.bytes / 2**20:.0f} MiB, but {self.directory} "
                f"has only {free / 2**20:.0f} MiB free. Free some space, or keep fewer checkpoints."
            )

    def _put_into_place(self, temporary: Path) -> None:
        """Rename a finished folder and verify it; until then, keep an existing folder of the step as ``.replaced``."""
        final = temporary.with_name(temporary.name.removeprefix(_SAVING))
        if final.exists():
            final.rename(final.with_name(final.name + _REPLACED))
            faults.point("checkpoint.between_renames")
        temporary.rename(final)
        fsync_folder(self.directory)
        faults.point("checkpoint.after_rename")
        try:
            saved = Checkpoint.open(final).verify()
        except CheckpointError:
            remove_folder(final)
            self._clean()
            raise
        assert self._is_valid(saved)

    def _clean(self) -> None:
        """Clean up after a crash: remove partial folders, and restore a folder whose replacement was not completed."""
        for path in self.directory.iterdir():
            if path.is_symlink() or not path.is_dir():
                continue
            if path.name.startswith(_SAVING):
                remove_folder(path)
            elif folder_step(path) is not None:
                with contextlib.suppress(OSError):
                    path.rmdir()  # succeeds only if the folder is empty, after an interrupted removal
        for path in self.directory.glob(f"step-*{_REPLACED}"):
            if folder_step(path) is not None and not path.is_symlink():
                self._settle(path.with_suffix(""), replaced=path)

    def _settle(self, current: Path, replaced: Path) -> None:
        """Keep one of the two folders of a step."""
        if any(found.path == current and self._is_valid(found) for found in self._openable()):
            remove_folder(replaced, rest=current)
            return
        if current.is_dir():
            remove_folder(current, rest=replaced)
        if not current.exists():
            replaced.rename(current)

    def _prune(self) -> None:
        self._remove_copied_links()
        last = list(islice(filter(self._is_valid, self._openable()), self.keep_last))
        kept = {found.path for found in last} | set(self._best_of_each_measurement())
        if (best := self.best()) is not None:
            kept.add(best.path)
        for path in self._folders():
            step = folder_step(path) or 0
            # A damaged checkpoint newer than all valid ones is kept for inspection until its step is reached again.
            if path not in kept and step <= last[0].step and not self.keep(step) and not _is_permanent(path):
                remove_folder(path)
        self._point_links()

    def _remove_copied_links(self) -> None:
        """Remove folders that copying tools created in place of the links, if they are equal to a checkpoint."""
        known = {found.digest for found in self._openable()}
        for path in (self.directory / "last", self.directory / "best"):
            with contextlib.suppress(OSError, CheckpointError):
                if not path.is_symlink() and Checkpoint.open(path).digest in known:
                    remove_folder(path)

    def _point_links(self) -> None:
        newest, best = next(self._openable(), None), self.best()
        for name, target in (("last", newest), ("best", best)):
            link, temporary = self.directory / name, self.directory / f"{_SAVING}{name}"
            if link.exists() and not link.is_symlink():
                continue  # not created by this class
            with contextlib.suppress(OSError):  # the links are optional: some file systems do not support them
                temporary.unlink(missing_ok=True)
                if target is None:
                    link.unlink(missing_ok=True)
                else:
                    temporary.symlink_to(target.path.name)
                    temporary.replace(link)


def _state(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the content of a checkpoint's state.json, or None if the checkpoint is damaged or was just removed."""
    try:
        return checkpoint.state
    except UnreadableError:
        raise
    except CheckpointError:
        return None


def _is_permanent(path: Path) -> bool:
    """Return whether the run that saved a checkpoint kept it by ``engine.keep_every``, which may have changed since."""
    try:
        return bool(json.loads((path / "state.json").read_text()).get("kept"))
    except (OSError, ValueError, AttributeError):
        return False


def _comparable(state: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Return whether a score saved with ``state`` was measured like those saved with the state ``now``."""
    if state is None or "measured" in state or "measured" not in now:
        return state is None or state.get("measured") == now.get("measured")
    # An older version saved this checkpoint. Its score counts if the newest state lists it as the best.
    return bool(now["train"]["best"].get("step") == state["train"]["step"])
