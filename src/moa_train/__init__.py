"""Train, evaluate and compare MOA-Transformers (arXiv 2201.12903)."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moa_train.assembly.predictor import Predictor

__version__ = "0.1.0"


def load(
    path: str | PathLike[str],
    *,
    device: str = "auto",
    weights: str = "auto",
    precision: str | None = None,
    code: str | Sequence[str] = (),
    max_pixels: int | None = None,
    max_seconds: float | None = None,
    range: Sequence[float] | None = None,
) -> "Predictor":
    """Load trained weights, ready to predict: ``moa_train.load("outputs/RUN").predict(["cat.jpg", "dog.jpg"])``.

    Args:
        path: run folder (its best checkpoint), checkpoint folder, folder of a model hub, or .safetensors file.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``xpu`` or ``mps``.
        weights: ``model``, ``ema``, or ``auto``: EMA weights if there are any.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``auto`` (default: that of evaluations in the run).
        code: your own module, or several of them, that the configuration in the file may import.
        max_pixels: images with more pixels count as unreadable (default: the run's ``data.max_pixels``).
        max_seconds: longest time, in seconds, to decode an image in `Predictor.batches` (default: the run's
            ``data.max_seconds``).
        range: values of black and white in gray images of more than 8 bits (default: the run's ``data.range``).

    Raises:
        UserError: there are no such weights, they are damaged, they need code that ``code`` does not allow, or another
            argument is wrong.
    """
    from pathlib import Path

    from moa_train.assembly.predictor import Predictor  # torch is imported only when it is needed
    from moa_train.assembly.trained import Trained
    from moa_train.runtime.device import pick_device

    trained = Trained.open(Path(path), weights=weights, code=code)
    return Predictor(
        trained, pick_device(device), precision, max_pixels=max_pixels, max_seconds=max_seconds, range=range
    )
