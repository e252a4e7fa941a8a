"""Choose the precision of a training step: bf16, fp16 with loss scaling, or fp32 with or without TF32."""

import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch

from moa_train.runtime.errors import UserError

log = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def has_bf16(device: torch.device) -> bool:
    """Return whether the hardware supports bf16 products.

    These are NVIDIA's GPUs from sm_80, AMD's, CPUs with AVX512-BF16, AMX or Arm BF16, and other devices that do not
    refuse a product.
    """
    if device.type == "cuda":
        if torch.version.cuda is None:  # torch for AMD
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        one = torch.ones(1, 1, device=device)
        try:
            return (one.bfloat16() @ one.bfloat16()).dtype == torch.bfloat16
        except (RuntimeError, TypeError):
            return False
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # also if ATEN_CPU_CAPABILITY makes a better CPU look like it
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, probe, bool)() for probe in probes):
        return True
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer versions of torch only
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "bf16", "sve_bf16"))


@dataclass(frozen=True)
class Precision:
    """Hold a resolved precision: ``name`` is bf16, fp16 or fp32. ``scaler`` is active only for fp16."""

    name: str
    device: torch.device
    scaler: torch.amp.GradScaler

    @classmethod
    def resolve(cls, name: str, device: torch.device) -> Self:
        """Resolve ``auto``, or check that the device supports the given precision.

        ``auto`` selects bf16 if the hardware supports it, and otherwise fp16 with CUDA and fp32 elsewhere.

        Raises:
            UserError: the device does not support the precision. The message lists those that it supports.
        """
        cuda, bf16 = device.type == "cuda", has_bf16(device)
        if name == "auto":
            name = "bf16" if bf16 else "fp16" if cuda else "fp32"
        if name == "fp16" and not cuda:
            raise UserError("precision=fp16 requires a GPU and CUDA. Elsewhere, the options are auto, bf16 and fp32.")
        if name == "bf16" and not bf16:
            if cuda:
                raise UserError(
                    "precision=bf16 requires a GPU of compute capability 8.0 or higher; "
                    f"{torch.cuda.get_device_name(device)} does not support it. Options: auto, fp16, fp32."
                )
            if device.type != "cpu":
                raise UserError(f"precision=bf16: {device.type} does not support it here. Options: auto, fp32.")
            log.warning("precision=bf16: This CPU has no bf16 instructions, so fp32 would be faster.")
        return cls(name, device, torch.amp.GradScaler(device.type, enabled=name == "fp16"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which matrix products are computed."""
        return _DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for the forward pass. The parameters stay in fp32."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Run the forward pass of an evaluation in this precision. fp32 never uses TF32 here.

        The counts therefore hardly depend on how images are batched. Only the order of summation differs, with
        relative differences of about 1e-7.
        """
        with _without_tf32() if self.name == "fp32" else nullcontext(), self.autocast():
            yield


_lock = threading.Lock()
_before: list[tuple[str, bool]] = []
"""The TF32 settings at the start of each running fp32 evaluation; evaluations may run in several threads."""


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Disable TF32 until the last of the evaluations ends, because the switches belong to the whole process."""
    with _lock:
        _before.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        set_fp32_products("ieee")
    try:
        yield
    finally:
        with _lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            matmul, convolutions = _before.pop()
            if not _before:
                torch.set_float32_matmul_precision(matmul)
                torch.backends.cudnn.allow_tf32 = convolutions


def set_fp32_products(name: str) -> None:
    """Allow TF32 for fp32 matrix products and convolutions on hardware that supports it (``tf32``), or not (``ieee``).

    This function uses torch's older settings, which also set the newer ones (``fp32_precision``). The reverse does not
    work: once a newer setting was used, reading an older one raises, and torch.compile still reads one in torch 2.15.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch 2.9 recommends the newer settings
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = name == "tf32"
