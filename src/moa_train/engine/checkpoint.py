"""The checkpoints of a run: a folder per optimizer step, of which a valid one exists at every instant after the first.

A folder (see `manifest`) is written under a temporary name, flushed to the disk, renamed, flushed and verified; only
then is an older one removed. What is newest or best is found by looking at what is there and verifying it: by the step
and by the score in the manifest, never by time stamps, nor by a pointer that a crash could leave behind. The links
`last` and `best` are for humans.
"""

import contextlib
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
"""Seconds after which whoever waits for a save is told so: storage that is gone may never answer."""

_SAVING = ".saving-"
_REPLACED = ".replaced"


class CheckpointStore:
    """The checkpoints in ``<run_dir>/checkpoints``. One process saves (rank 0, with the run's lock), any number read.

    Retention keeps the newest ``keep_last``, those of steps that ``keep`` tells to keep and the best. It counts
    valid ones only, and removes nothing but files of the known names in folders of the known names.
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
        """Return the valid checkpoint of the highest step (up to ``until``), or None if there has never been one.

        A damaged one is passed over with a warning that names the file. If all are damaged that is a CheckpointError:
        a run must not silently start afresh.
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
        if self._folders() != folders:  # the run goes on: it removed what we looked at, and has newer ones
            return self.newest(until)
        if damage:
            listed = "\n  ".join(damage[:6])
            raise CheckpointError(
                f"No checkpoint in {self.directory} is valid:\n  {listed}\n"
                "Restore one from a copy, or choose another run folder to start afresh."
            )
        return None

    def best(self) -> Checkpoint | None:
        """Return the valid checkpoint of the highest score (of equals the earliest), or None if none was evaluated.

        Scores count if they were measured like those of the newest checkpoint: on the same split, and so on.
        """
        openable = list(self._openable())
        now = next((state for state in map(_state, openable) if state is not None), {})
        scored = [
            (found.score, -found.step, found)
            for found in openable
            if found.score is not None and _comparable(_state(found), now)
        ]
        for _, _, checkpoint in sorted(scored, key=lambda entry: entry[:2], reverse=True):
            if self._is_valid(checkpoint):
                return checkpoint
            if file_type(checkpoint.path) is None:  # the run goes on, and has a better one
                return self.best()
            log.warning("%s, the best so far, is damaged.", checkpoint.path)
        return None

    def at(self, step: int) -> Checkpoint:
        """Return the valid checkpoint of ``step``; raises CheckpointError, which lists the steps there are."""
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
            f"{self.directory} has no checkpoint of step {step}; it has: {steps or 'none'}."
        )

    def _folders(self) -> list[Path]:
        """List folders of checkpoints, the newest step first; one that was being replaced follows its replacement.

        Raises UnreadableError where the system does not say what is there.
        """
        found, path = [], self.directory
        try:
            if file_type(path) != stat.S_IFDIR:
                return []
            for path in self.directory.iterdir():
                step = folder_step(path)
                if step is None or file_type(path, follow_links=False) != stat.S_IFDIR:
                    continue
                with contextlib.suppress(FileNotFoundError):  # just removed
                    if not {MANIFEST, *FILES}.isdisjoint(os.listdir(path)):  # noqa: PTH208 names are enough
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
        """Verify a checkpoint, unless it was verified before and the file system says that it is unchanged since.

        Raises UnreadableError where the system fails to read it.
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
        """Save a checkpoint; an older one of the same step is replaced.

        Args:
            step: optimizer steps done.
            tensors: {part: {name: tensor}}, parts as in `manifest.PARTS`; any device and strides.
            state: the rest, JSON-able.
            metadata: for the headers of the weights files (model and ema).
            score: what the best is chosen by, higher is better; None if this state was not evaluated.
            background: return once the tensors are copied to host memory. One save is in flight at a time; its failure
                is raised by the next `save`, `poll`, `wait` or `close`.

        Raises:
            CheckpointError: if it cannot be written; no partial file is left, and older checkpoints are untouched.
        """
        self.wait()
        snapshot = Snapshot.take(step, tensors, state, metadata or {}, score, copy=background)
        if not background:
            self._save(snapshot)
            return
        self._executor = self._executor or ThreadPoolExecutor(1, "checkpoint")
        self._saving = self._executor.submit(self._save, snapshot)

    def poll(self) -> None:
        """Raise the error of a background save that has failed; costs nothing otherwise."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the save in flight is done; raises its error."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        while not wait_for([saving], PATIENCE).done:
            log.warning(
                "Waiting for a save in %s: its storage is slow, or does not answer. Ctrl-C, twice, leaves without it; "
                "older checkpoints are untouched.",
                self.directory,
            )
        saving.result()

    def close(self) -> None:
        """Finish the save in flight; raises its error."""
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
            log.error("%s", failure)  # the error on its way out is the one to see

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
                    "Older checkpoints are untouched."
                ) from error
            raise
        faults.point("checkpoint.before_prune")
        try:
            self._clean()
            self._prune()
        except (OSError, UnreadableError) as error:
            log.warning("Older checkpoints are not removed: %s", error)

    def _check_space(self, snapshot: Snapshot) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < snapshot.bytes * 1.01 + 2**20:  # headers, blocks
            raise CheckpointError(
                f"Cannot save step {snapshot.step}: it takes {snapshot.bytes / 2**20:.0f} MiB and {self.directory} has "
                f"only {free / 2**20:.0f} MiB free. Free some space, or keep fewer checkpoints."
            )

    def _put_into_place(self, temporary: Path) -> None:
        """Rename a finished folder and verify it; one in its way stays until then, under a name that readers know."""
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
        """Finish what a crash interrupted: half-written folders go, one that never got its replacement comes back."""
        for path in self.directory.iterdir():
            if path.is_symlink() or not path.is_dir():
                continue
            if path.name.startswith(_SAVING):
                remove_folder(path)
            elif folder_step(path) is not None:
                with contextlib.suppress(OSError):
                    path.rmdir()  # only if it is empty: all but removed
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
        kept = {found.path for found in last}
        if (best := self.best()) is not None:
            kept.add(best.path)
        for path in self._folders():
            step = folder_step(path) or 0
            # A damaged one that is newer than all valid ones stays for somebody to look at, until its step comes again.
            if path not in kept and step <= last[0].step and not self.keep(step):
                remove_folder(path)
        self._point_links()

    def _remove_copied_links(self) -> None:
        """Remove folders in the place of links, which tools that follow links leave, if they equal a checkpoint."""
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
                continue  # not ours
            with contextlib.suppress(OSError):  # a convenience: not every file system has links
                temporary.unlink(missing_ok=True)
                if target is None:
                    link.unlink(missing_ok=True)
                else:
                    temporary.symlink_to(target.path.name)
                    temporary.replace(link)


def _state(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the content of a checkpoint's state.json, or None if it is damaged or was just removed."""
    try:
        return checkpoint.state
    except UnreadableError:
        raise
    except CheckpointError:
        return None


def _comparable(state: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Return whether a score saved with ``state`` was measured like those saved with the state ``now``."""
    if state is None or "measured" in state or "measured" not in now:
        return state is None or state.get("measured") == now.get("measured")
    # An older version saved it. It counts as long as the newest state knows it as the best.
    return bool(now["train"]["best"].get("step") == state["train"]["step"])
