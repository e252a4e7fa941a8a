"""Choose, create and lock the run folder."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from moa_train.assembly.resume import refuse_other_run
from moa_train.plugins import short_name
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
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
            yield path
        finally:
            if distributed.is_main and not named and {entry.name for entry in path.iterdir()} == {".lock"}:
                shutil.rmtree(path, ignore_errors=True)  # an error was found before anything was written


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
