import pytest
import torch

from moa_train.engine.loss import soft_cross_entropy


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e-6])
def test_it_is_the_sum_of_torchs_cross_entropy_with_distributions(scale):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 11, generator=generator, dtype=torch.float64) * scale).requires_grad_()
    targets = torch.randn(7, 11, generator=generator, dtype=torch.float64).mul(3).softmax(dim=1)
    found = soft_cross_entropy(logits, targets)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, logits.detach().softmax(1) - targets, rtol=1e-10, atol=1e-14)


def test_parts_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    targets = torch.nn.functional.one_hot(torch.arange(10) % 4)
    parts = sum(soft_cross_entropy(logits[i : i + 3], targets[i : i + 3]) for i in range(0, 10, 3))
    torch.testing.assert_close(parts, soft_cross_entropy(logits, targets), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_summed_in_float32(dtype):
    logits = torch.randn(512, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.nn.functional.one_hot(torch.arange(512) % 100, 100)
    found = soft_cross_entropy(logits, targets)
    assert found.dtype == torch.float32
    expected = soft_cross_entropy(logits.double(), targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
