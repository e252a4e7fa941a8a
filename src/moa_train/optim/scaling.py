"""Learning rates for a batch size other than the one that they were tuned for."""

import math

from moa_train.schema import OptimConfig


def scale_lr(lr: float, batch_size: int, config: OptimConfig) -> float:
    """Scale a learning rate for batches of ``config.lr_batch`` samples to batches of ``batch_size`` samples.

    ``lr_scaling=linear`` multiplies by batch_size / lr_batch (Goyal et al. 2017, the published recipe), ``sqrt`` by
    its square root (usual for Adam; Malladi et al. 2022), ``none`` by 1. ``batch_size`` counts all ranks and
    accumulated micro-batches. The peak, the start of the warmup and the final learning rate are all scaled.
    """
    ratio = batch_size / config.lr_batch
    return lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[config.lr_scaling]


def explain_lr(batch_size: int, config: OptimConfig) -> str:
    """Describe in one line how the peak learning rate was scaled: ``0.0009 x 128/512 (linear) = 0.000225``."""
    lr = scale_lr(config.lr, batch_size, config)
    if config.lr_scaling == "none":
        return f"{lr:.4g} (not scaled to the batch size of {batch_size})"
    ratio = f"{batch_size}/{config.lr_batch}"
    factor = ratio if config.lr_scaling == "linear" else f"sqrt({ratio})"
    return f"{config.lr:.4g} x {factor} ({config.lr_scaling}) = {lr:.4g}"
