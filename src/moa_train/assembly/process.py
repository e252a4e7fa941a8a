"""Process-wide settings."""

import torch

from moa_train.runtime.cpu import keep_freed_memory
from moa_train.runtime.device import set_threads
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import set_fp32_products
from moa_train.runtime.seed import seed_everything, set_deterministic
from moa_train.runtime.threads import AdaptiveThreads
from moa_train.schema import RuntimeConfig, thread_count


def set_up_process(config: RuntimeConfig, distributed: Distributed) -> None:
    """Set the number of threads, memory reuse, the precision of matrix products, determinism and seeds."""
    set_threads(thread_count(config.threads), distributed.local_world_size)
    if distributed.device.type == "cpu":
        keep_freed_memory()
    # cuDNN's attention has no gradient for the bias, so only evaluation would use it and round differently.
    torch.backends.cuda.enable_cudnn_sdp(False)
    set_fp32_products(config.matmul)
    set_deterministic(config.deterministic)
    seed_everything(config.seed)


def adaptive_threads(config: RuntimeConfig, distributed: Distributed) -> AdaptiveThreads:
    """Return the number of threads of a training or evaluation, which follows the load unless it is fixed.

    The ranks of a training use as many threads as rank 0, because they wait for each other.
    """
    most = torch.get_num_threads()
    free = thread_count(config.threads) is None and not config.deterministic and distributed.device.type == "cpu"
    free = free and min(distributed.gather_objects(most)) > 1
    if distributed.world_size == 1:
        return AdaptiveThreads(most, free)
    return AdaptiveThreads(most, free, lambda threads: min(most, int(distributed.broadcast_object(threads))))
