"""The subject of an export: trained weights with their preprocessing, and real images to check the exported file on."""

import base64
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from moa_train import __version__
from moa_train.assembly.inputs import build_eval_loader, build_eval_transform
from moa_train.assembly.trained import Trained
from moa_train.data.augment import Normalize
from moa_train.data.image import Decoding
from moa_train.data.source import Source
from moa_train.engine.metrics import rank_of_label
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.text import printable
from moa_train.schema import DataConfig, ExportConfig, RunConfig, image_shape
from moa_train.tracking.console import EvaluationProgress

Runner = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""A function from images (B, H, W, 3) to logits (B, K)."""

VECTORS = 3
"""Number of images that are stored in an exported file, with their logits."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of an exported file.

    Attributes:
        size: height and width of the input.
        cover: height and width that the resized image just covers; the input is its center.
        mean: channel means that the file itself subtracts, for values from 0 to 1.
        std: channel standard deviations that the file itself divides by.
        range: black and white in images of more than 8 bits (default: 0 and the largest value of the file's bits).
    """

    size: tuple[int, int]
    cover: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    range: tuple[float, ...] | None

    @classmethod
    def of(cls, config: DataConfig, source: Source) -> "Preprocessing":
        """Return the preprocessing of an evaluation. Small images that are kept in memory are not cropped."""
        size, (mean, std) = image_shape(config.image_size), Normalize.statistics(config)
        ratio = 1.0 if source.in_memory else config.eval_crop
        height, width = (math.floor(side / ratio) for side in size)
        return cls(size, (height, width), tuple(mean), tuple(std), Decoding.of(config).value_range)

    def as_dict(self) -> dict[str, Any]:
        """Return the preprocessing in JSON types, with a description in words."""
        return {
            "input": "uint8, (batch, height, width, 3), RGB",
            "decode": f"orientation tags of image files are ignored; {self.levels}",
            "resize": "bicubic with antialiasing, keeping the aspect ratio, so that the image just covers `cover`; "
            "then cut out the center of size `size`",
            "normalize": "inside the file: (x / 255 - mean) / std",
            **asdict(self),
        }

    @property
    def levels(self) -> str:
        """Describe how gray levels of more than 8 bits become 8 bits."""
        if self.range is None:
            return "16-bit gray is scaled to 8 bits"
        low, high = self.range
        return f"gray of more than 8 bits is scaled to 8 bits: {low:g} becomes 0 and {high:g} becomes 255"


class Deployed(nn.Module):
    """Map uint8 images (B, H, W, 3) to logits (B, K): normalization, then a model in eval mode."""

    shift: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, config: DataConfig) -> None:
        super().__init__()
        normalize = Normalize.of(config)
        self.model = model.requires_grad_(False)
        self.register_buffer("shift", normalize.shift)
        self.register_buffer("scale", normalize.scale)
        self.eval()

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Return logits."""
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).contiguous().float()
        logits_BK: Tensor = self.model((images_BCHW - self.shift) * self.scale)
        return logits_BK

    def run(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits, for arrays."""
        with torch.inference_mode():
            logits: NDArray[np.float32] = self(torch.from_numpy(images_BHWC)).float().numpy()
            return logits


@dataclass(frozen=True)
class Subject:
    """Trained weights and real images.

    Attributes:
        config: settings of the command.
        trained: the weights.
        run: configuration of the run that trained them, with the settings of this command applied.
        source: the images to check the exported file on.
        stream: output of the progress.
    """

    config: ExportConfig
    trained: Trained
    run: RunConfig
    source: Source
    stream: TextIO

    @cached_property
    def model(self) -> Deployed:
        """The model with its normalization."""
        return Deployed(self.trained.build(), self.run.data)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes an input."""
        return Preprocessing.of(self.run.data, self.source)

    @cached_property
    def reference(self) -> NDArray[np.float32]:
        """The checkpoint's own logits, computed as in moa-eval: (N, K)."""
        model, transform = self.model.model, build_eval_transform(self.run)
        parts = []
        with torch.inference_mode():
            for batch in self.batches("evaluating the checkpoint"):
                parts.append(model(transform(batch)).float().numpy())
        return np.concatenate(parts)

    def logits(self, runner: Runner, title: str) -> NDArray[np.float32]:
        """Return the logits of all images: (N, K)."""
        return np.concatenate([runner(as_input(batch.images)) for batch in self.batches(title)])

    def batches(self, title: str, source: Source | None = None) -> Any:
        """Yield the evaluation batches of the images, or of another source, and show the progress."""
        loader = build_eval_loader(self.run, source or self.source, Distributed(torch.device("cpu")))
        progress = EvaluationProgress(title, style=self.run.tracking.progress, stream=self.stream)
        for done, batch in enumerate(loader, start=1):
            yield batch
            progress(done, len(loader))

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels of the images: (N,)."""
        return self.source.labels

    def scores(self, logits: NDArray[np.float32]) -> dict[str, Any]:
        """Return top-1, top-5 and loss of logits of all images, with exact counts."""
        ranks, total = self.ranks(logits), len(self.labels)
        counts = {"top1_count": int((ranks < 1).sum()), "top5_count": int((ranks < 5).sum())}
        loss = nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(self.labels))
        values = {"top1": 100 * counts["top1_count"] / total, "top5": 100 * counts["top5_count"] / total}
        return {"split": self.config.split, **values, "loss": float(loss), **counts, "total": total}

    def ranks(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the number of classes ranked before the label of each image: (N,)."""
        ranks: NDArray[np.int64] = rank_of_label(torch.from_numpy(logits), torch.from_numpy(self.labels)).numpy()
        return ranks

    def agreement(self, logits: NDArray[np.float32]) -> dict[str, Any]:
        """Compare the logits of an exported fp32 model with the checkpoint's.

        Raises:
            UserError: the number of right answers differs.
        """
        before, now = self.scores(self.reference), self.scores(logits)
        difference = float(np.abs(logits - self.reference).max())
        if before["top1_count"] != now["top1_count"]:
            raise UserError(
                f"The exported model classifies {now['top1_count']} of {now['total']} images correctly, but the "
                f"checkpoint {before['top1_count']}; the largest difference between logits is {difference:.3g}. "
                "Nothing was written. If the logits differ only by rounding, the order of two nearly equal ones may "
                "have changed: try another seed=, with a smaller images= if all images of the split were used. A "
                "larger difference is a bug in the exporter or in a library."
            )
        changed = int((logits.argmax(1) != self.reference.argmax(1)).sum())
        return {**now, "different_answers": changed, "largest_difference": difference}

    @cached_property
    def examples(self) -> NDArray[np.uint8]:
        """The images of the test vectors: (V, H, W, 3)."""
        batch = next(iter(self.batches("reading images", self.source.subset(np.arange(VECTORS), self.source.title))))
        return as_input(batch.images)

    def record(self, runner: Runner, scores: dict[str, Any]) -> dict[str, str]:
        """Return what an exported file contains in addition to the model, as JSON texts by name.

        Args:
            runner: the exported model, for the logits of the test vectors.
            scores: the result of `scores` for this model.
        """
        vectors = [
            {"png": png(image), "label": int(label), "logits": [float(f"{value:.7g}") for value in logits]}
            for image, label, logits in zip(self.examples, self.labels, runner(self.examples), strict=False)
        ]
        values = {
            "classes": self.trained.classes,
            "preprocessing": self.preprocessing.as_dict(),
            "test_vectors": vectors,
            "evaluation": scores,
            "provenance": {
                "moa-train": __version__,
                "model": self.run.model.title,
                "weights": self.trained.found.description,
                "origin": json.loads(self.trained.metadata.get("origin", "[]")),
            },
        }
        return {name: json.dumps(value) for name, value in values.items()}


@contextmanager
def traced() -> Iterator[None]:
    """Convert every error of torch.export to one that names the first line of its cause.

    Raises:
        UserError: the block raised an error.
    """
    try:
        yield
    except Exception as error:  # the exporters raise various errors
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = printable(str(cause).strip().partition("\n")[0])
        raise UserError(
            f"torch cannot export this model ({type(cause).__name__}: {reason}). Change the code of the model, for "
            "example control flow that depends on values of tensors, or use format=safetensors, which exports every "
            "model."
        ) from error


def as_input(images_BCHW: Tensor) -> NDArray[np.uint8]:
    """Return a batch of uint8 images as the input of an exported file: (B, H, W, 3)."""
    images: NDArray[np.uint8] = images_BCHW.permute(0, 2, 3, 1).contiguous().numpy()
    return images


def draw(source: Source, count: int, seed: int) -> Source:
    """Return ``count`` different images of a source, drawn by seed, in their order; all images if it has fewer."""
    if count >= len(source):
        return source
    rows = np.random.default_rng(seed).choice(len(source), count, replace=False)
    return source.subset(np.sort(rows), source.title)


def name_of(source: Source, index: int) -> str:
    """Return the name of an image, relative to its split."""
    return source.name(index) if source.files is None else bytes(source.files[index]).decode(errors="replace")


def png(image_HWC: NDArray[np.uint8]) -> str:
    """Return an image as a PNG file in base64."""
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
