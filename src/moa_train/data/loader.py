"""Loaders: from a source and an order to micro-batches of uint8 images."""

import atexit
import logging
import signal
import threading
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import active_children

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moa_train.data.arrays import ArraySource
from moa_train.data.batch import Batch
from moa_train.data.order import Draw, Order, micro_batches
from moa_train.data.source import Source
from moa_train.data.view import CentreCrop, View
from moa_train.runtime.errors import UserError
from moa_train.schema import DataConfig

_POLL = 5.0
_log = logging.getLogger(__name__)


class TrainLoader:
    """Endless micro-batches of one rank, in an order that (seed, step) alone determines.

    Sources in memory are gathered here, a whole micro-batch at once; files are read by worker processes, one
    micro-batch each. What a batch holds depends on neither the number of workers nor the step that a session starts at.

    Args:
        source: training split.
        config: what to do about unreadable files (``unreadable``, ``unreadable_budget``).
        order: order of the samples; its seed is also that of random crops.
        view: makes pixels of a file; sources in memory have no use for it.
        micro_batch_size: images per batch; divides the order's batch size.
        rank: of this process.
        world_size: number of processes.
        workers: processes that read files; 0 reads them in this process. Sources in memory need none.
        pin_memory: hand out batches in page-locked memory.
        timeout: seconds to wait for a worker.
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
        timeout: float = 600.0,
    ) -> None:
        self.order, self.micro_batch_size = order, micro_batch_size
        self._share = micro_batches(order.batch_size, micro_batch_size, rank, world_size)
        self.view = view
        self._read = _Reader(source, order.seed, view, substitute=config.unreadable == "quarantine")
        self._budget, self._unreadable = config.unreadable_budget, dict[str, None]()
        self._start = partial(_start, self._read, workers=workers, pin_memory=pin_memory, timeout=timeout)

    @property
    def quarantined(self) -> list[str]:
        """Messages for the unreadable files that this rank has met, in order."""
        return list(self._unreadable)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's micro-batches of step ``start_step``, of the next step, and so on for ever.

        Raises:
            UserError: an image cannot be read, or more than the budget of them; a worker died or hangs.
        """
        for batch in self._start(_Requests(self.order, self._share, self.micro_batch_size, start_step)):
            for message in batch.unreadable:
                self._quarantine(message)
            yield batch

    def _quarantine(self, message: str) -> None:
        if message in self._unreadable:
            return
        self._unreadable[message] = None
        _log.warning("Quarantined %d of at most %d: %s", len(self._unreadable), self._budget, message)
        if len(self._unreadable) > self._budget:
            raise UserError(
                f"{len(self._unreadable)} unreadable images exceed the budget of {self._budget}. The last: {message}"
            )


class EvalLoader:
    """Every sample once, in chunks whose composition depends on neither ranks nor workers.

    Chunk k holds samples [k B, (k + 1) B), the last one what is left; rank r takes the chunks k with k mod W = r.
    ``Batch.step`` is k. An unreadable image is an error here, always.

    Args:
        source: split to evaluate.
        batch_size: B, images a chunk.
        rank: of this process.
        world_size: W, number of processes.
        workers: processes that read files; 0 reads them here. They are started for each pass.
        crop_ratio: of files: side of the central crop over the side that the image is resized to.
        interpolation: of files.
        pin_memory: hand out batches in page-locked memory.
        timeout: seconds to wait for a worker.
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
        interpolation: str = "bicubic",
        pin_memory: bool = False,
        timeout: float = 600.0,
    ) -> None:
        self.source, self.batch_size = source, batch_size
        self._chunks = range(rank, -(-len(source) // batch_size), world_size)
        self.view = CentreCrop(source.image_size, crop_ratio, interpolation)
        read = _Reader(source, 0, self.view, substitute=False)
        self._start = partial(_start, read, workers=workers, pin_memory=pin_memory, timeout=timeout)

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
    """The requests of a rank from a step on, without end."""

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
    """Turns requests into batches, in this process or in a worker."""

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
            return error  # as a value: raised in a worker, it would come back with the worker's traceback as its text
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


def _start(
    reader: _Reader, requests: Iterable[_Request], *, workers: int, pin_memory: bool, timeout: float
) -> Iterator[Batch]:
    if workers > 0 and not reader.source.in_memory:
        return _in_workers(reader, requests, workers, pin_memory, timeout)
    return (batch.pin_memory() if pin_memory else batch for batch in map(_unwrap, map(reader.__getitem__, requests)))


def _in_workers(
    reader: _Reader, requests: Iterable[_Request], workers: int, pin_memory: bool, timeout: float
) -> Iterator[Batch]:
    def results() -> Generator[Batch, None, None]:
        others = set(active_children())
        loader = _start_workers(reader, requests, workers, pin_memory)
        processes = set(active_children()) - others
        try:
            yield from map(_unwrap, _patiently(loader, timeout))
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise UserError(
                f"A process that reads images failed: {str(error).splitlines()[0]} Usual causes: memory or /dev/shm "
                "is full (lower data.workers or the batch size), or storage hangs. data.workers=0 reads without them."
            ) from error
        finally:
            del loader  # ends the workers that listen
            for process in processes:
                process.kill()

    batches = results()
    atexit.register(_close, weakref.ref(batches))
    return batches


def _start_workers(
    reader: _Reader, requests: Iterable[_Request], workers: int, pin_memory: bool
) -> Iterator[Batch | UserError]:
    on_child_death = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # the user chose how many
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            pin_memory=pin_memory,
            timeout=_POLL,
            worker_init_fn=_leave_signals_to_trainer,
            generator=torch.Generator(),  # else starting a loader would draw from the global one
        )
        batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise wherever the trainer is, in the middle of a save too: better at the next batch.
        signal.signal(signal.SIGCHLD, on_child_death or signal.SIG_DFL)
    return batches


def _patiently(loader: Iterator[Batch | UserError], timeout: float) -> Iterator[Batch | UserError]:
    """Yield batches. Each waits for ``timeout`` seconds, looking every ``_POLL`` seconds whether workers are alive."""
    waited = 0.0
    while True:
        try:
            result = next(loader)
        except StopIteration:
            return
        except RuntimeError as error:
            waited += _POLL
            if "timed out" not in str(error) or waited >= timeout:
                raise
            continue
        waited = 0.0
        yield result


def _close(batches: weakref.ref[Generator[Batch, None, None]]) -> None:
    """End the workers before the interpreter does: they ignore the signal that it would send."""
    if (generator := batches()) is not None:
        generator.close()


def _unwrap(result: Batch | UserError) -> Batch:
    if isinstance(result, UserError):
        raise result
    return result


def _leave_signals_to_trainer(worker: int) -> None:
    """Ignore the signals that a terminal or a scheduler sends to all processes: the trainer ends its workers."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
