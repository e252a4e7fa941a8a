"""Models: the MOA-Transformer in both forms, baselines, and what is known about them before they run."""

from moa_train.model.registry import check_model, create_model

__all__ = ["check_model", "create_model"]
