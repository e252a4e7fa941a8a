"""Derive seeds from keys. Each random stream has a name, so no stream depends on the random numbers drawn before."""

import hashlib
import os
import random

import numpy as np
import torch

from moa_train.runtime.device import KINDS


def key_seed(*parts: int | str) -> int:
    """Hash a name such as ``(seed, "mixup", step, micro)`` to 63 bits, which also fit into an int64 tensor.

    The result is the first 8 bytes (little endian, top bit cleared) of BLAKE2b over the parts. Each part is written as
    its type, its value in decimal or UTF-8, and a zero byte. The result is the same on every machine and version, and
    must not change, because resumes from checkpoints depend on it.
    """
    text = "".join(f"{'i' if isinstance(part, int) else 's'}{part}\0" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def reseed(device: torch.device, *parts: int | str) -> None:
    """Set torch's global generators of the CPU and of ``device`` to the stream that ``parts`` names.

    The call takes about 10 us, so it can be made at every step. torch.manual_seed takes 0.4 ms, because it seeds every
    backend rather than only the two generators that training uses.
    """
    seed = key_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type in KINDS:
        torch.get_device_module(device).manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (on all devices) once at the start."""
    random.seed(key_seed(seed, "python"))
    np.random.seed(key_seed(seed, "numpy") % 2**32)
    torch.manual_seed(key_seed(seed, "torch"))


def set_deterministic(enabled: bool) -> None:
    """Make torch use only bit-reproducible algorithms; an operation that has none then raises an error.

    Call this function before anything runs on a GPU or is compiled, because cuBLAS and torch.compile read their
    settings when they start.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    # Equivalent to torch.use_deterministic_algorithms, which also imports torch's compiler (2.5 seconds).
    torch.set_deterministic_debug_mode("error" if enabled else "default")
    # Filling new tensors with NaN costs memory bandwidth and would only reveal bugs in torch itself.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = not enabled
