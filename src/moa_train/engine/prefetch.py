"""Copy batches to the device ahead of the step that uses them."""

from collections.abc import Iterator
from typing import Self

import torch

from moa_train.interfaces import Batch


class Prefetcher(Iterator[Batch]):
    """Iterate over batches. `ahead` starts the copy of the next batch to a GPU during the current step.

    Batches are copied on a separate stream, at the same time as the work that is queued on the current stream. On other
    devices, `ahead` does nothing, and batches stay on the host. A batch that was copied ahead but is not used is
    dropped. Loaders derive batches from the step, so a later session reads it again.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Batch | Exception | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            return next(self._batches)
        self.ahead()
        batch, self._next = self._next, None
        if isinstance(batch, Exception):
            raise batch
        assert batch is not None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in (batch.images, batch.labels):
            tensor.record_stream(current)  # otherwise, a later copy could reuse its memory too early
        return batch

    def ahead(self) -> None:
        """Start the copy of the next batch unless it has been started. `__next__` raises the loader's errors."""
        if self._stream is None or self._next is not None:
            return
        try:
            batch = next(self._batches)
            with torch.cuda.stream(self._stream):
                self._next = batch.to(self._device, non_blocking=True)
        except Exception as error:
            self._next = error
