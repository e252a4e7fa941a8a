"""Choose, create and lock the run folder."""

import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from moa_train.assembly.resume import refuse_other_run
from moa_train.plugins import short_name
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.files import write_whole
from moa_train.runtime.lock import RunLock
from moa_train.schema import RunConfig


@contextmanager
def run_folder(config: RunConfig, distributed: Distributed) -> Iterator[Path]:
    """Yield the run folder, which is the same on every rank, and hold a lock on it that excludes other runs."""
    named = config.run_dir is not None
    with ExitStack() as held:

        def take() -> str:
            path = choose_run_dir(config)
            held.enter_context(RunLock(path))
            if config.resume is None:
                refuse_other_run(path)  # another run may just have ended in it
            return str(path)

        config.run_dir = distributed.on_main(take)
        path = Path(config.run_dir)
        try:
            check_shared(path, distributed, config.runtime.timeout)
            yield path
        finally:
            if distributed.is_main and not named and {entry.name for entry in path.iterdir()} == {".lock"}:
                shutil.rmtree(path, ignore_errors=True)  # an error was found before anything was written


def check_shared(path: Path, distributed: Distributed, timeout: float) -> None:
    """Check that all ranks see the files that rank 0 writes to a folder, because they read the checkpoints from it.

    Network file systems may show a new file late, so a rank looks for it for ``timeout`` / 2 seconds, at most a minute.

    Raises:
        UserError: a rank does not see them; every rank raises it.
    """
    if distributed.world_size == 1:
        return
    token = path / distributed.on_main(lambda: f".shared-{uuid.uuid4().hex}")  # a name that no file system has cached
    try:
        distributed.on_main(partial(write_whole, token, ""))
        end = time.monotonic() + min(timeout / 2, 60.0)
        while not (found := os.access(token, os.R_OK)) and time.monotonic() < end:
            time.sleep(0.1)
        everyone = distributed.gather_objects([found, socket.gethostname()])
    finally:
        if distributed.is_main:
            token.unlink(missing_ok=True)
    if blind := [f"{rank} ({host})" for rank, (found, host) in enumerate(everyone) if not found]:
        raise UserError(
            f"run_dir: rank {', '.join(blind)} cannot read what rank 0 ({everyone[0][1]}) writes to {path}. The run "
            "folder must be on storage that all machines share, and have the same path on each of them. A relative "
            "path starts at the current folder of each rank."
        )


def choose_run_dir(config: RunConfig) -> Path:
    """Return the run folder: the given one, or a new one in outputs/, created here so that no other run can take it."""
    if config.run_dir:
        return Path(config.run_dir)
    name = f"{short_name(config.data.name)}-{config.model.title}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        path = Path("outputs") / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:  # another run was started in the same second
            continue
        except OSError as error:
            raise UserError(
                f"Cannot create the run folder {path}: {error.strerror}. Choose another one with run_dir=."
            ) from error
    return path
