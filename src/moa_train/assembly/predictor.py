"""Predict the classes of images with trained weights, prepared exactly as in evaluation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moa_train.assembly.inputs import eval_batch_size, normalization, workers
from moa_train.assembly.trained import Trained
from moa_train.data.image import DecodedImage, Decoding, EncodedImage, reading
from moa_train.data.loader import EvalLoader
from moa_train.data.paths import UNREADABLE, PathSource
from moa_train.data.view import CenterCrop
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision
from moa_train.schema import image_shape

if TYPE_CHECKING:
    from PIL.Image import Image

AnyImage: TypeAlias = Union[str, PathLike[str], "Image", NDArray[np.uint8], Tensor]
"""A path, a Pillow image, a uint8 array (H, W), (H, W, 1) or (H, W, 3), or a uint8 tensor (1 or 3, H, W)."""


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of an image.

    Attributes:
        classes: their names, most likely first.
        probabilities: their probabilities, in the same order.
    """

    classes: list[str]
    probabilities: list[float]


class Predictor:
    """A trained model that is ready to predict, with its preprocessing and the names of its classes.

    Images are prepared as in evaluation. In fp32, the default, the logits of an image are bit for bit those of an
    evaluation in which its batch holds the same images. In other batches they differ by rounding (docs/PREDICT.md),
    because the kernels of matrix products depend on the size of the batch.

    Attributes:
        model: in eval mode, on ``precision.device``, from normalized images to logits.
        classes: names of the classes, in the order of the logits.
        image_size: height and width of the images that the model receives, in pixels.
        description: which weights these are.

    Args:
        trained: the weights.
        device: where the model runs.
        precision: in place of the precision of evaluations in the run.
        max_pixels, max_seconds, range: in place of those of the run's ``data``; None keeps the run's.
    """

    def __init__(
        self,
        trained: Trained,
        device: torch.device,
        precision: str | None = None,
        *,
        max_pixels: int | None = None,
        max_seconds: float | None = None,
        range: Sequence[float] | None = None,
    ) -> None:
        config = trained.config
        limits: dict[str, Any] = {"max_pixels": max_pixels, "max_seconds": max_seconds, "range": range}
        given = {name: value for name, value in limits.items() if value is not None}
        self.precision = Precision.resolve(precision or config.runtime.eval_precision, device)
        self.model: nn.Module = trained.build().to(device).eval()
        self.classes, self.image_size = trained.classes, image_shape(config.data.image_size)
        self.description = trained.found.description
        self.batch_size = eval_batch_size(config.engine, device)
        self._crop, self._config = config.data.eval_crop, config
        self._view, self._decoding = CenterCrop(self.image_size, self._crop), Decoding.of(replace(config.data, **given))
        self.normalize = normalization(config)

    def predict(self, images: AnyImage | Sequence[AnyImage], top: int = 5) -> list[Prediction]:
        """Return the ``top`` most likely classes of each image.

        Args:
            images: one image or a sequence of images of any sizes (see `AnyImage`).
            top: number of classes per image.

        Raises:
            UserError: an image cannot be read or has the wrong type. The message says which one.
        """
        logits_BK = self.logits(images)
        return [Prediction(*self.name(row, top)) for row in logits_BK]

    def logits(self, images: AnyImage | Sequence[AnyImage]) -> Tensor:
        """Return the logits of images: float32, (B, K), on the CPU. Arguments and errors as in `predict`."""
        many: Sequence[Any] = images if isinstance(images, list | tuple) else [images]

        def pixels(row: int) -> Tensor:
            try:
                return self.pixels(many[row])
            except UserError as error:
                raise UserError(f"images[{row}]: {error}") if many is images else error from error

        parts = [
            self.forward(torch.stack([pixels(row) for row in range(start, min(start + self.batch_size, len(many)))]))
            for start in range(0, len(many), self.batch_size)
        ]
        return torch.cat([torch.empty(0, len(self.classes)), *parts])

    def pixels(self, image: AnyImage) -> Tensor:
        """Return the pixels that the model receives before normalization: uint8, (3, H, W)."""
        if isinstance(image, str | PathLike):
            path = Path(image)
            with reading(path):
                return self._prepare(EncodedImage.of(path, self._decoding))
        try:
            return self._prepare(_decoded(image, self._decoding))
        except UserError:
            raise
        except Exception as error:  # the decoders of Pillow raise various errors
            raise UserError(f"The image cannot be decoded: {str(error) or type(error).__name__}") from error

    def _prepare(self, image: EncodedImage) -> Tensor:
        return self._view(image, np.empty(0))

    @torch.inference_mode()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits of uint8 images of the size of the model: float32, (B, K), on the CPU."""
        with self.precision.evaluation():
            logits_BK = self.model(self.normalize(images_BCHW.to(self.precision.device)))
        return logits_BK.float().cpu()

    def name(self, logits_K: Tensor, top: int) -> tuple[list[str], list[float]]:
        """Return the names and probabilities of the ``top`` classes. Of equal logits, the lower class comes first."""
        order = logits_K.argsort(descending=True, stable=True)[:top]
        probabilities = logits_K.double().softmax(0)[order]
        return [self.classes[index] for index in order.tolist()], probabilities.tolist()

    def batches(
        self,
        paths: Sequence[str],
        *,
        batch_size: int | None = None,
        processes: int | None = None,
        advance: Callable[[int, int], None] = lambda done, rounds: None,
    ) -> Iterator["PredictedBatch"]:
        """Predict image files batch by batch; worker processes decode them.

        Args:
            paths: the files.
            batch_size: images per forward pass (default: as in evaluation).
            processes: worker processes (default: as in training).
            advance: called after each batch with the number of batches done and their total number.
        """
        source = PathSource(paths, self.image_size, self._decoding)
        loader = EvalLoader(
            source,
            batch_size=batch_size or self.batch_size,
            workers=min(len(paths), workers(self._config.data)) if processes is None else processes,
            crop_ratio=self._crop,
        )
        for done, batch in enumerate(loader, 1):
            kept = batch.index != UNREADABLE
            found = [paths[index] for index in batch.index[kept].tolist()]
            yield PredictedBatch(found, batch.images[kept], self.forward(batch.images)[kept], batch.unreadable)
            advance(done, len(loader))


@dataclass(frozen=True)
class PredictedBatch:
    """The readable images of a batch.

    Attributes:
        paths: their files.
        images: uint8, (B, 3, H, W), as prepared for the model.
        logits: float32, (B, K).
        unreadable: a message for each file that could not be read.
    """

    paths: list[str]
    images: Tensor
    logits: Tensor
    unreadable: tuple[str, ...]


def _decoded(image: Any, decoding: Decoding) -> DecodedImage:
    from PIL.Image import Image

    if isinstance(image, Image):
        return DecodedImage.of_pillow(image, decoding)
    if isinstance(image, Tensor):
        x_CHW = image
    elif isinstance(image, np.ndarray):
        x_CHW = torch.from_numpy(np.require(image, requirements=("C", "W")))  # torch warns of read-only arrays
        x_CHW = x_CHW[None] if x_CHW.ndim == 2 else x_CHW.movedim(-1, 0)
    else:
        raise UserError(
            f"{type(image).__name__} is not an image. Give a path, a Pillow image, a uint8 array (H, W, 3) or a uint8 "
            "tensor (3, H, W), or a list of these."
        )
    if x_CHW.dtype != torch.uint8 or x_CHW.ndim != 3 or x_CHW.shape[0] not in (1, 3) or not x_CHW.numel():
        kind, shapes = ("tensor", "(3, H, W)") if isinstance(image, Tensor) else ("array", "(H, W, 3)")
        raise UserError(
            f"The {kind} has the type {image.dtype} and the shape {tuple(image.shape)}. Give uint8 values from 0 to "
            f"255 of shape {shapes}, or a list of them."
        )
    return DecodedImage(x_CHW.cpu().expand(3, -1, -1))
