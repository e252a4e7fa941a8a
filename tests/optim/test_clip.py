import numpy as np
import pytest
import torch
from torch import nn

from moa_train.optim.clip import clip_gradients
from moa_train.schema import OptimConfig


def parameters_with_gradients(scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((7, 5), (11,), (), (2, 3, 3))]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return [*parameters, nn.Parameter(torch.zeros(3))]  # the last one has none


def flat_gradients(parameters: list[nn.Parameter]) -> np.ndarray:
    return np.concatenate([p.grad.double().flatten().numpy() for p in parameters if p.grad is not None])


def test_norm_scales_all_gradients_together() -> None:
    parameters = parameters_with_gradients()
    before = flat_gradients(parameters)
    norm = clip_gradients(parameters, OptimConfig(clip="norm", clip_value=0.5))
    assert norm.ndim == 0
    assert float(norm) == pytest.approx(np.linalg.norm(before), rel=1e-6)
    assert flat_gradients(parameters) == pytest.approx(before * 0.5 / np.linalg.norm(before), rel=1e-5, abs=1e-9)


def test_small_gradients_are_unchanged() -> None:
    parameters = parameters_with_gradients(1e-3)
    before = flat_gradients(parameters)
    clip_gradients(parameters, OptimConfig(clip="norm", clip_value=0.5))
    assert np.array_equal(flat_gradients(parameters), before)


@pytest.mark.parametrize(("mode", "limit"), [("value", 0.1), ("none", 0.1)])
def test_value_and_none(mode: str, limit: float) -> None:
    parameters = parameters_with_gradients()
    before = flat_gradients(parameters)
    norm = clip_gradients(parameters, OptimConfig(clip=mode, clip_value=limit))
    assert float(norm) == pytest.approx(np.linalg.norm(before), rel=1e-6)
    expected = np.clip(before, -np.float32(limit), np.float32(limit)) if mode == "value" else before
    assert np.array_equal(flat_gradients(parameters), expected)


def test_a_non_finite_norm_is_returned() -> None:
    parameters = parameters_with_gradients()
    parameters[1].grad[3] = torch.inf
    assert torch.isinf(clip_gradients(parameters, OptimConfig(clip="norm", clip_value=1.0)))
    parameters[1].grad[3] = torch.nan
    assert torch.isnan(clip_gradients(parameters, OptimConfig(clip="norm", clip_value=1.0)))


def test_without_gradients_the_norm_is_zero() -> None:
    assert float(clip_gradients([nn.Parameter(torch.zeros(3))], OptimConfig(clip="norm"))) == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_does_not_wait_for_the_device() -> None:
    parameters = [nn.Parameter(torch.zeros(4, 4, device="cuda")) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    clip_gradients(parameters, OptimConfig(clip="norm", clip_value=0.1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = clip_gradients(parameters, OptimConfig(clip="norm", clip_value=0.1))
        clip_gradients(parameters, OptimConfig(clip="value", clip_value=0.1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.is_cuda
