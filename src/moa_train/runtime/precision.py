"""The number format of a training step: bf16, fp16 with loss scaling, or fp32, and what fp32 products may round to."""

import logging
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
    """Whether the hardware itself multiplies bf16: CUDA from sm_80, CPUs with AVX512-BF16, AMX or ARM's BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0)) and torch.version.cuda is not None
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, probe, bool)() for probe in probes):
        return True
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer versions of torch only
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "bf16", "sve_bf16"))


@dataclass(frozen=True)
class Precision:
    """A resolved precision: ``name`` is bf16, fp16 or fp32. ``scaler`` does nothing unless it is fp16."""

    name: str
    device: torch.device
    scaler: torch.amp.GradScaler

    @classmethod
    def resolve(cls, name: str, device: torch.device) -> Self:
        """Choose for ``auto`` (bf16 where the hardware has it, else fp16 on a GPU, else fp32) and check a wish.

        Raises UserError for what the device cannot do, with what it can.
        """
        cuda, bf16 = device.type == "cuda", has_bf16(device)
        if name == "auto":
            name = "bf16" if bf16 else "fp16" if cuda else "fp32"
        if name == "fp16" and not cuda:
            raise UserError("precision=fp16 needs a GPU; on a CPU the options are auto, bf16 and fp32.")
        if name == "bf16" and not bf16:
            if cuda:
                raise UserError(
                    "precision=bf16 needs a GPU of compute capability 8.0 or more, which "
                    f"{torch.cuda.get_device_name(device)} has not. Options: auto, fp16, fp32."
                )
            log.warning("precision=bf16: this CPU has no instructions for bf16; fp32 would be faster.")
        return cls(name, device, torch.amp.GradScaler(device.type, enabled=name == "fp16"))

    @property
    def dtype(self) -> torch.dtype:
        """The format that matrix products are computed in."""
        return _DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for the forward pass; parameters stay fp32."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Run the forward pass of an evaluation in this precision; fp32 means fp32, without TF32.

        So the counts hardly depend on how images are batched: what remains is the order of sums, some 1e-7.
        """
        matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        if self.name == "fp32":
            set_fp32_products("ieee")
        try:
            with self.autocast():
                yield
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                torch.set_float32_matmul_precision(matmul)
                torch.backends.cudnn.allow_tf32 = convolutions


def set_fp32_products(name: str) -> None:
    """Let fp32 matrix products and convolutions round to TF32 where there is it (``tf32``), or not (``ieee``).

    By torch's older switches, because they set the newer ones (``fp32_precision``) too. Not so the other way round:
    after the newer ones, reading an older one is an error, and torch.compile does that as late as torch 2.15.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch 2.9 recommends the newer ones
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = name == "tf32"
