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
    code: Sequence[str] = (),
) -> "Predictor":
    """Load trained weights, ready to predict: ``moa_train.load("outputs/RUN").predict(["cat.jpg", "dog.jpg"])``.

    Args:
        path: run folder (its best checkpoint), checkpoint folder, folder of a model hub, or .safetensors file.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``xpu`` or ``mps``.
        weights: ``model``, ``ema``, or ``auto``: EMA weights if there are any.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``auto`` (default: that of evaluations in the run).
        code: your own modules that the configuration in the file may import.

    Raises:
        UserError: there are no such weights, they are damaged, or they need code that ``code`` does not allow.
    """
    from moa_train.assembly.predictor import load as load_predictor  # torch is imported only when it is needed

    return load_predictor(path, device=device, weights=weights, precision=precision, code=code)
