import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision, has_bf16

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo to compare with")
def test_bf16_is_detected_if_the_kernel_lists_it():
    words = Path("/proc/cpuinfo").read_text().split()
    assert has_bf16(CPU) == any(flag in words for flag in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))


def test_auto_is_bf16_if_the_hardware_supports_it_and_otherwise_fp32():
    assert Precision.resolve("auto", CPU).name == ("bf16" if has_bf16(CPU) else "fp32")


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_forward_pass_uses_the_precision_and_gradients_are_fp32(name, dtype):
    precision = Precision.resolve(name, CPU)
    layer = torch.nn.Linear(4, 4)
    with precision.autocast():
        output = layer(torch.ones(2, 4))
    assert output.dtype == precision.dtype == dtype
    loss = output.float().sum()
    assert torch.equal(precision.scaler.scale(loss), loss)
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert precision.scaler.state_dict() == {}


def test_an_unsupported_precision_is_rejected_with_the_options():
    with pytest.raises(UserError, match=r"requires a GPU.*auto, bf16 and fp32"):
        Precision.resolve("fp16", CPU)


# Runs in its own process, because torch's switches are global and warnings must be errors before torch is imported.
SWITCHES = """
import torch
from moa_train.runtime.precision import set_fp32_products
for name, expected in (("tf32", True), ("ieee", False), ("tf32", True)):
    set_fp32_products(name)
    old = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32  # what torch.compile reads
    new = torch.backends.cuda.matmul.fp32_precision == "tf32", torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert old == new == (expected, expected), (name, old, new)
    assert torch.get_float32_matmul_precision() == ("high" if expected else "highest")
try:
    set_fp32_products("tf23")
except ValueError as error:
    assert "Did you mean 'tf32'" in str(error)
"""


def test_tf32_is_visible_through_old_and_new_names_without_warnings():
    done = subprocess.run([sys.executable, "-W", "error", "-c", SWITCHES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


EVALUATION = """
import torch
from moa_train.runtime.precision import Precision, set_fp32_products
set_fp32_products("tf32")
switches = lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
for name, expected in (("fp32", ("highest", False)), ("bf16", ("high", True))):
    with Precision.resolve(name, torch.device("cpu")).evaluation():
        assert switches() == expected, (name, switches())
        assert torch.is_autocast_enabled("cpu") == (name == "bf16")
    assert switches() == ("high", True)
first, second = (Precision.resolve("fp32", torch.device("cpu")).evaluation() for _ in range(2))
first.__enter__()
second.__enter__()  # in another thread
first.__exit__(None, None, None)
assert switches() == ("highest", False), "the second one still needs it"
second.__exit__(None, None, None)
assert switches() == ("high", True)
"""


def test_evaluation_in_fp32_does_not_use_tf32():
    done = subprocess.run([sys.executable, "-c", EVALUATION], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_skips_updates_with_infinite_gradients():
    device = torch.device("cuda", 0)
    precision = Precision.resolve("fp16", device)
    weight = torch.nn.Parameter(torch.ones(2, device=device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision.scaler.scale((weight * torch.tensor([float("inf"), 1.0], device=device)).sum()).backward()
    precision.scaler.unscale_(optimizer)
    precision.scaler.step(optimizer)
    precision.scaler.update()
    assert torch.equal(weight, torch.ones_like(weight))


@pytest.mark.parametrize("supported", [True, False])
def test_gpus_of_amd_are_asked_for_bf16(monkeypatch, supported):
    """torch for AMD calls its devices cuda, has no CUDA version, and numbers capabilities in another way."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert has_bf16(torch.device("cuda")) == supported
