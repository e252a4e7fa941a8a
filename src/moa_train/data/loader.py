"""Loaders: micro-batches of uint8 images from a source, for training and evaluation."""

import atexit
import contextlib
import ctypes
import logging
import shutil
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from moa_train.data.array_source import ArraySource
from moa_train.data.file_source import FileSource
from moa_train.data.order import Draw, Indices, Order, micro_batches
from moa_train.data.source import Source
from moa_train.data.view import CenterCrop, View
from moa_train.data.watch import FileWatch, start_method
from moa_train.interfaces import Batch
from moa_train.runtime.errors import UserError
from moa_train.runtime.signals import StopRequestedError
from moa_train.schema import DataConfig, RuntimeConfig

_POLL = 3.0
"""Seconds between checks of dead workers and requests to stop while a batch is awaited."""
_STOP_PATIENCE = 15.0
"""Seconds that a stop waits for a batch: slow storage must not cost an epoch, and torchrun kills ranks after 30."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_GRACE = 3.0
"""Seconds after which workers are killed that do not end on request."""
_log = logging.getLogger(__name__)


class TrainLoader:
    """An infinite stream of one rank's micro-batches, whose order depends only on (seed, step).

    For sources in memory, this process gathers a whole micro-batch at once. Files are read by worker processes, where
    each worker reads a whole micro-batch. The contents of a batch depend neither on the number of workers nor on the
    step that a session starts at.

    Args:
        source: training split.
        config: response to unreadable files (``unreadable``, ``unreadable_budget``).
        order: order of the samples; its seed is also the seed of the random crops of files.
        view: converts a file to pixels; not used for sources in memory.
        micro_batch_size: images per batch; divides the batch size of the order.
        rank: rank of this process.
        world_size: number of ranks.
        workers: processes that read files; 0: this process reads them. Not used for sources in memory.
        pin_memory: whether to return batches in page-locked memory.
        timeout: seconds to wait for a batch.
        stop: whether to give up waiting for storage that does not answer, which raises `StopRequestedError`.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        order: Order,
        view: View,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        timeout: float = RuntimeConfig.timeout,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.order, self.micro_batch_size = order, micro_batch_size
        self._share = micro_batches(order.batch_size, micro_batch_size, rank, world_size)
        self.view = view
        self._read = _Reader(source, order.seed, view, substitute=config.unreadable == "quarantine")
        self._budget, self._unreadable = config.unreadable_budget, dict[str, None]()
        self._start = partial(_start, self._read, workers=workers, pin_memory=pin_memory, wait=_Wait(timeout, stop))

    @property
    def quarantined(self) -> list[str]:
        """Messages about the unreadable files that this rank has found, in order."""
        return list(self._unreadable)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's micro-batches of step ``start_step`` and of all later steps, without end.

        Raises:
            UserError: an image cannot be read, the budget of unreadable images is exceeded, or a worker died or hangs.
            StopRequestedError: a stop was requested while the storage did not answer.
        """
        for batch in self._start(_Requests(self.order, self._share, self.micro_batch_size, start_step)):
            for message in batch.unreadable:
                self._quarantine(message)
            yield batch

    def _quarantine(self, message: str) -> None:
        if message in self._unreadable:
            return
        self._unreadable[message] = None
        _log.warning("Replaced unreadable image %d of at most %d: %s", len(self._unreadable), self._budget, message)
        if len(self._unreadable) > self._budget:
            raise UserError(
                f"{len(self._unreadable)} images are unreadable; data.unreadable_budget={self._budget} allows "
                f"{self._budget} per rank. The last one: {message}"
            )


class EvalLoader:
    """Every sample once, in chunks whose composition depends neither on the number of ranks nor on that of workers.

    Chunk k contains the samples [k B, (k + 1) B); the last chunk may be smaller. Rank r receives the chunks k with
    k mod W = r. ``Batch.step`` is k. An unreadable image is always an error.

    Args:
        source: split to evaluate.
        batch_size: images per chunk, B.
        rank: rank of this process.
        world_size: number of ranks, W.
        workers: processes that read files, started for each pass; 0: this process reads them.
        crop_ratio: files: side of the center crop relative to the side of the resized image.
        pin_memory: whether to return batches in page-locked memory.
        timeout: seconds to wait for a batch.
        stop: whether to give up waiting for storage that does not answer, which raises `StopRequestedError`.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        crop_ratio: float = 0.875,
        pin_memory: bool = False,
        timeout: float = RuntimeConfig.timeout,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.source, self.batch_size = source, batch_size
        self._chunks = range(rank, -(-len(source) // batch_size), world_size)
        self.view = CenterCrop(source.image_size, crop_ratio)
        read = _Reader(source, 0, self.view, substitute=False)
        self._start = partial(_start, read, workers=workers, pin_memory=pin_memory, wait=_Wait(timeout, stop))

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[Batch]:
        chunks = [self._request(chunk) for chunk in self._chunks]
        return self._start(chunks) if chunks else iter(())

    def _request(self, chunk: int) -> "_Request":
        index = np.arange(chunk * self.batch_size, min((chunk + 1) * self.batch_size, len(self.source)))
        return _Request(Draw(np.zeros_like(index), index, np.zeros_like(index)), chunk, 0)


@dataclass(frozen=True)
class _Request:
    draw: Draw
    step: int
    micro: int


@dataclass(frozen=True)
class _Requests:
    """All requests of a rank, starting at a step: an infinite sequence."""

    order: Order
    share: range
    size: int
    start_step: int

    def __iter__(self) -> Iterator[_Request]:
        for step in count(self.start_step):
            draw = self.order.step(step)
            for micro in self.share:
                yield _Request(draw[micro * self.size : (micro + 1) * self.size], step, micro)


class _Reader(Dataset):
    """Reads the batch of a request, in this process or in a worker."""

    def __init__(self, source: Source, seed: int, view: View, substitute: bool) -> None:
        self.source, self.seed, self.view, self.substitute = source, seed, view, substitute

    def __getitem__(self, request: _Request) -> Batch | UserError:
        draw, unreadable = request.draw, list[str]()
        try:
            if isinstance(self.source, ArraySource):
                images, index = self.source.gather(draw.index), draw.index
            else:
                images, index, unreadable = self.source.read(draw, self.seed, self.view, self.substitute)
        except UserError as error:
            return error  # not raised: an exception from a worker would have the worker's traceback as its message
        batch = self._batch(request, images, index, unreadable)
        return batch if get_worker_info() is None else _share(batch)

    def _batch(self, request: _Request, images: Tensor, index: Indices, unreadable: list[str]) -> Batch:
        draw = request.draw
        return Batch(
            images=images,
            labels=torch.from_numpy(self.source.labels[index]),
            index=torch.from_numpy(index),
            epoch=torch.from_numpy(draw.epoch),
            repeat=torch.from_numpy(draw.repeat),
            step=request.step,
            micro=request.micro,
            unreadable=tuple(unreadable),
        )


def _share(batch: Batch) -> Batch | UserError:
    """Move a worker's batch to shared memory, where failures are noticed; the thread that sends it only prints them."""
    try:
        for tensor in (batch.images, batch.labels, batch.index, batch.epoch, batch.repeat):
            tensor.share_memory_()
    except RuntimeError as error:
        free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        return UserError(
            f"A worker process cannot pass on a batch of {batch.images.nbytes / 2**20:.1f} MiB in shared memory "
            f"({str(error).splitlines()[0]}). /dev/shm has {free / 2**20:.1f} MiB free. Make it larger (docker run "
            "--shm-size=8g, or --ipc=host; mount -o remount,size=8g /dev/shm), or use fewer data.workers; with "
            "data.workers=0 the main process reads the images."
        )
    return batch


@dataclass(frozen=True)
class _Wait:
    """Waits for batches, but not forever.

    Attributes:
        timeout: seconds to wait for a batch.
        stop: whether the trainer was asked to stop.
    """

    timeout: float
    stop: Callable[[], bool]

    def __call__(self, receive: Callable[[], Batch | Exception], watch: FileWatch) -> Batch:
        """Return what ``receive`` returns; it raises TimeoutError or Empty every `_POLL` seconds until then.

        Raises:
            UserError: ``receive`` returned it, an image takes too long to decode, or the storage hangs.
            StopRequestedError: the storage did not answer for `_STOP_PATIENCE` seconds after a stop was requested.
        """
        waited = stopping = 0.0
        while True:
            try:
                result = receive()
                break
            except (TimeoutError, Empty):
                waited += _POLL
            stopping += _POLL if self.stop() else 0.0
            if stopping >= _STOP_PATIENCE:
                raise StopRequestedError("A stop was requested while the storage of the images did not answer.")
            watch.check()
            if waited >= self.timeout:
                raise UserError(
                    f"No images could be read for {self.timeout:.0f} s: the storage hangs, or is very slow. Check that "
                    f"it answers, then resume the run. Files that are being read: {watch.files() or 'none'}."
                )
        if isinstance(result, Exception):
            raise result
        return result


def _start(
    reader: _Reader, requests: Iterable[_Request], *, workers: int, pin_memory: bool, wait: _Wait
) -> Iterator[Batch]:
    if workers > 0 and not reader.source.in_memory:
        return _in_workers(reader, requests, workers, pin_memory, wait)
    batches: Iterator[Batch] = map(_unwrap, map(reader.__getitem__, requests))
    if not reader.source.in_memory:
        batches = _in_thread(reader, requests, wait)
    return (batch.pin_memory() if pin_memory else batch for batch in batches)


def _in_thread(reader: _Reader, requests: Iterable[_Request], wait: _Wait) -> Iterator[Batch]:
    """Read in a thread, one batch at a time, so that this thread can answer a stop while the storage hangs."""
    watch = _watch(reader, 1)
    wanted, results = SimpleQueue[_Request | None](), SimpleQueue[Batch | Exception]()

    def read() -> None:
        for request in iter(wanted.get, None):
            watch.begin(0)  # again for each batch, because the thread of an evaluation publishes its own files
            try:
                results.put(reader[request])
            except Exception as error:  # for the thread that waits
                results.put(error)

    threading.Thread(target=read, name="images", daemon=True).start()
    try:
        for request in requests:
            wanted.put(request)
            yield wait(partial(results.get, timeout=_POLL), watch)
    finally:
        wanted.put(None)


def _in_workers(
    reader: _Reader, requests: Iterable[_Request], workers: int, pin_memory: bool, wait: _Wait
) -> Iterator[Batch]:
    def results() -> Generator[Batch, None, None]:
        others, watch = set(active_children()), _watch(reader, workers)
        loader = _start_workers(reader, requests, workers, pin_memory, watch)
        processes = set(active_children()) - others
        try:
            while True:
                try:
                    batch = wait(partial(_receive, loader), watch)
                except StopIteration:
                    return
                yield batch
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise UserError(
                f"A worker process that reads images failed: {str(error).splitlines()[0]} Usual causes: memory or "
                "/dev/shm is full (reduce data.workers or the batch size), or the storage hangs. With data.workers=0, "
                "the main process reads the images."
            ) from error
        finally:
            killer = threading.Timer(_GRACE, _kill, [processes])  # torch waits 5 s for each that hangs
            killer.daemon = True
            with contextlib.suppress(RuntimeError):  # newer Pythons start no thread while they exit
                killer.start()
            del loader  # ends all workers that still respond
            killer.cancel()
            _kill(processes)

    batches = results()
    atexit.register(_close, weakref.ref(batches))
    return batches


def _receive(loader: Iterator[Batch | Exception]) -> Batch | Exception:
    try:
        return next(loader)
    except RuntimeError as error:
        if "timed out" in str(error):
            raise TimeoutError from None
        raise


def _kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _start_workers(
    reader: _Reader, requests: Iterable[_Request], workers: int, pin_memory: bool, watch: FileWatch
) -> Iterator[Batch | Exception]:
    on_child_death = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # the user chose the number of workers
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            pin_memory=pin_memory,
            timeout=_POLL,
            multiprocessing_context=start_method(),
            worker_init_fn=partial(_set_up_worker, watch),
            generator=torch.Generator(),  # otherwise, starting a loader would advance the global generator
        )
        batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler raises wherever the trainer is, even in the middle of a save. The next batch fails instead.
        signal.signal(signal.SIGCHLD, on_child_death or signal.SIG_DFL)
    return batches


def _close(batches: weakref.ref[Generator[Batch, None, None]]) -> None:
    """End the workers before the interpreter exits, because they ignore the signal that it sends."""
    if (generator := batches()) is not None:
        generator.close()


def _unwrap(result: Batch | UserError) -> Batch:
    if isinstance(result, UserError):
        raise result
    return result


def _watch(reader: _Reader, workers: int) -> FileWatch:
    assert isinstance(reader.source, FileSource)
    return FileWatch(workers, reader.source.decoding.max_seconds)


def _set_up_worker(watch: FileWatch, worker: int) -> None:
    """Show the trainer what this worker reads, and ignore signals that are sent to all processes.

    The trainer ends its workers itself. Where it cannot, because it is killed or leaves at once, the kernel ends them,
    even if they wait for storage.
    """
    watch.begin(worker)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
