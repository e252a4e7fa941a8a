"""Process-wide settings."""

import torch

from moa_train.runtime.cpu import keep_freed_memory
from moa_train.runtime.device import set_threads
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import set_fp32_products
from moa_train.runtime.seed import seed_everything, set_deterministic
from moa_train.schema import RuntimeConfig


def set_up_process(config: RuntimeConfig, distributed: Distributed) -> None:
    """Set the number of threads, memory reuse, the precision of matrix products, determinism and seeds."""
    set_threads(config.threads, distributed.local_world_size)
    if distributed.device.type == "cpu":
        keep_freed_memory()
    # cuDNN's attention has no gradient for the bias, so only evaluation would use it and round differently.
    torch.backends.cuda.enable_cudnn_sdp(False)
    set_fp32_products(config.matmul)
    set_deterministic(config.deterministic)
    seed_everything(config.seed)
