import pytest
import torch
from torch import nn

from moa_train.optim.muon import BatchedMuon, orthogonalize

SHAPES = [(8, 16), (16, 8), (8, 16), (8, 8), (24, 8), (8, 16), (2, 16), (8, 8)]


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.95, 0.1), (0.0, 0.0)])
def test_the_updates_are_those_of_torch(momentum: float, weight_decay: float) -> None:
    ours, theirs = matrices(), matrices()
    settings = {"lr": 1e-2, "momentum": momentum, "weight_decay": weight_decay}
    batched = BatchedMuon(ours, **settings)
    reference = torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        if step == 2:  # one matrix was not used in this step
            ours[0].grad = theirs[0].grad = None
        batched.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        # The last bit of bf16 products may depend on how matrices are batched. A step is 0.2 lr on average.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        buffers = batched.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"]
        assert torch.equal(*buffers)


def test_singular_vectors_are_kept_and_values_become_one() -> None:
    x_NAB = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(x_NAB, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert result.dtype == torch.bfloat16
    u, _, v = torch.linalg.svd(x_NAB.double(), full_matrices=False)
    core = u.mT @ result.double() @ v.mT
    values = core.diagonal(dim1=1, dim2=2)
    assert torch.all((values > 0.3) & (values < 1.3))
    assert float((core - torch.diag_embed(values)).abs().max()) < 0.05
    transposed = orthogonalize(x_NAB.mT.contiguous(), (3.4445, -4.7750, 2.0315), 5, 1e-7)
    torch.testing.assert_close(transposed, result.mT, rtol=0, atol=0.02)


def test_a_gradient_of_zero_changes_nothing() -> None:
    parameters = matrices()
    before = [p.detach().clone() for p in parameters]
    optimizer = BatchedMuon(parameters, lr=1.0, weight_decay=0.0)
    optimizer.step()  # no gradients at all
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(p.detach(), b) for p, b in zip(parameters, before, strict=True))
