"""Averaging of a model's probabilities over several views of each image (test-time augmentation)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moa_train.assembly.inputs import build_eval_transform
from moa_train.data.array_source import ArraySource
from moa_train.data.file_source import FileSource
from moa_train.data.source import Source
from moa_train.interfaces import Batch
from moa_train.runtime.errors import UserError
from moa_train.schema import RunConfig, image_shape

_SHIFT = 16
"""Crops of images in memory are shifted by 1 / 16 of their size, by 2 pixels for CIFAR."""


@dataclass(frozen=True)
class Views:
    """How an evaluation loads images and which views of them it averages.

    Attributes:
        config: configuration for the loader.
        source: images for the loader, with a margin around the center crop if corner crops are taken.
        transform: from a batch on the device to normalized images.
        wrap: from a model to the module that averages its probabilities over the views.
    """

    config: RunConfig
    source: Source
    transform: Callable[[Batch], Tensor]
    wrap: Callable[[nn.Module], nn.Module]

    @classmethod
    def plan(cls, tta: str, config: RunConfig, source: Source) -> "Views":
        """Plan the views.

        Args:
            tta: as in ``EvalConfig``. The crops of files are those of the central part, in the shape of the model's
                input, of the image that is resized as for the usual center crop; all images of a batch need one size.
                Images in memory are padded instead, as with ``augment.crop=pad``.
            config: of the run.
            source: images to evaluate.

        Raises:
            UserError: the resized image has no margin to take corner crops from.
        """
        transform, size = build_eval_transform(config), image_shape(config.data.image_size)
        if tta != "crops":
            return cls(config, source, transform, Averaged if tta == "flip" else lambda model: model)
        if isinstance(source, ArraySource):
            high, wide = (max(1, side // _SHIFT) for side in size)

            def padded(batch: Batch) -> Tensor:
                images = nn.functional.pad(batch.images, (wide, wide, high, high))
                return transform(replace(batch, images=images))

            return cls(config, source, padded, lambda model: Averaged(model, size))
        ratio = config.data.eval_crop
        larger = int(size[0] / ratio), int(size[1] / ratio)
        if larger == size:
            raise UserError(f"tta=crops needs a margin around the center crop, but data.eval_crop is {ratio:g}.")
        wider = FileSource(source.title, source.tree, larger, source.rows, source.decoding)
        whole = replace(config, data=replace(config.data, eval_crop=1.0))
        return cls(whole, wider, transform, lambda model: Averaged(model, size))


class Averaged(nn.Module):
    """Average the probabilities of a model over each image and its mirror image, and over crops of both.

    Args:
        model: from images (B, C, H, W) to logits (B, K).
        crop: size of the crops, the center and the four corners; None: only the whole image.
    """

    def __init__(self, model: nn.Module, crop: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.model, self.crop = model, crop

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logarithms of the mean probabilities, float32, (B, K)."""
        views = [images_BCHW] if self.crop is None else crops(images_BCHW, self.crop)
        parts = [
            self.model(view.contiguous()).float().log_softmax(1) for image in views for view in (image, image.flip(3))
        ]
        return torch.stack(parts).logsumexp(0) - torch.tensor(float(len(parts))).log()


def crops(images_BCHW: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Return the center crop and the four corner crops."""
    (height, width), (high, wide) = images_BCHW.shape[2:], size
    down, right = height - high, width - wide
    corners = [(round(down / 2), round(right / 2)), (0, 0), (0, right), (down, 0), (down, right)]
    return [images_BCHW[:, :, top : top + high, left : left + wide] for top, left in corners]
