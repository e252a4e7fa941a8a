"""Models: the MOA-Transformer in both forms, baselines, and what is known about them before they run."""

from moa_train.model.published import published_fields, read_published, write_published
from moa_train.model.registry import check_model, create_model
from moa_train.model.weights import Loaded, load_weights

__all__ = [
    "Loaded",
    "check_model",
    "create_model",
    "load_weights",
    "published_fields",
    "read_published",
    "write_published",
]
