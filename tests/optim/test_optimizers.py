from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moa_train.interfaces import Classifier
from moa_train.optim.optimizers import Optimizers, create_optimizer
from moa_train.plugins import OPTIMIZERS
from moa_train.runtime.errors import UserError
from moa_train.schema import OptimConfig

LR, DECAY = 1e-2, 0.1


def create(name: str, model: nn.Module, **changes: Any) -> Optimizers:
    return create_optimizer(OptimConfig(name=name, **changes), model, LR)


class Body(Classifier):
    """The kinds of parameters that a Transformer has."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 2, 2)
        self.position_table = nn.Parameter(torch.zeros(4, 8))
        self.norm = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BLC = self.patch_embed(x_BCHW).flatten(2).mT + self.position_table
        x_BLC = x_BLC + self.fc2(self.fc1(self.norm(x_BLC)).relu())
        return self.head(x_BLC.mean(1))

    def no_weight_decay(self) -> set[str]:
        return {"position_table"}


class Convolution(Classifier, nn.Conv2d):
    """A model without matrices."""


def body() -> Body:
    torch.manual_seed(0)
    return Body()


def backward(model: nn.Module, step: int) -> None:
    x_BCHW = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(step))
    nn.functional.cross_entropy(model(x_BCHW), torch.arange(6) % 5).backward()


def train(model: nn.Module, optimizers: list[Any], steps: range = range(5)) -> dict[str, Tensor]:
    for step in steps:
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain(model: Body, *, matrices: bool) -> list[dict[str, Any]]:
    """Group by hand, independently of ``parameter_groups``."""
    named = dict(model.named_parameters())
    body_matrices = ["fc1.weight", "fc2.weight"]
    decay = ["patch_embed.weight", "head.weight", *([] if matrices else body_matrices)]
    rest = [name for name in named if name not in {*decay, *body_matrices}]
    return [
        {"params": [named[n] for n in decay], "weight_decay": DECAY},
        {"params": [named[n] for n in rest], "weight_decay": 0.0},
    ]


def test_adamw_is_that_of_torch() -> None:
    ours, theirs = body(), body()
    optimizer = create("adamw", ours, weight_decay=DECAY, betas=[0.9, 0.98])
    reference = torch.optim.AdamW(plain(theirs, matrices=False), lr=LR, betas=(0.9, 0.98), foreach=False)
    expected = train(theirs, [reference])
    for name, value in train(ours, [optimizer]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_sgd_is_that_of_torch() -> None:
    ours, theirs = body(), body()
    optimizer = create("sgd", ours, weight_decay=DECAY, momentum=0.9)
    reference = torch.optim.SGD(plain(theirs, matrices=False), lr=LR, momentum=0.9, nesterov=True, foreach=False)
    expected = train(theirs, [reference])
    for name, value in train(ours, [optimizer]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_muon_is_that_of_torch_for_matrices_with_adamw_for_the_rest() -> None:
    ours, theirs = body(), body()
    optimizer = create("muon", ours, weight_decay=DECAY, momentum=0.95)
    named = dict(theirs.named_parameters())
    matrices = [named["fc1.weight"], named["fc2.weight"]]
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(plain(theirs, matrices=True), lr=LR, foreach=False)
    expected = train(theirs, [muon, adamw])
    for name, value in train(ours, [optimizer]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert set(optimizer.parts[0].param_groups[0]["param_names"]) == {"fc1.weight", "fc2.weight"}


def test_a_step_of_muon_is_orthogonal_and_as_large_as_adamws() -> None:
    """Without decay a step is -0.2 lr sqrt(max(A, B)) U V^T, whose RMS is 0.2 lr (Liu et al. 2025, section 2.2)."""
    model = body()
    before = model.fc1.weight.detach().clone()
    model.fc1.weight.grad = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    u_16x8, _, v_8x8 = torch.linalg.svd(model.fc1.weight.grad.double(), full_matrices=False)
    create("muon", model, weight_decay=0.0).step()
    update = (model.fc1.weight.detach() - before).double() / (LR * 0.2 * 16**0.5)
    core = -u_16x8.T @ update @ v_8x8.T  # Newton-Schulz stops early: singular values are near 1, not 1
    assert torch.all((core.diagonal() > 0.3) & (core.diagonal() < 1.3))
    assert float((core - core.diagonal().diag()).abs().max()) < 0.05
    assert float((u_16x8 @ core @ v_8x8 + update).abs().max()) < 0.05


@pytest.mark.parametrize("name", OPTIMIZERS.table)
def test_interface(name: str) -> None:
    model = body()
    optimizer = create(name, model, weight_decay=DECAY)
    optimized = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, optimized)) == sorted(map(id, model.parameters()))
    optimizer.param_groups[0]["lr_scale"] = 0.5
    optimizer.set_lr(0.3)
    lrs = [group["lr"] for part in optimizer.parts for group in part.param_groups]
    assert lrs == [0.15] + [0.3] * (len(lrs) - 1)
    backward(model, 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS.table)
def test_an_lr_of_zero_changes_nothing(name: str) -> None:
    model = body()
    optimizer = create(name, model, weight_decay=DECAY)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.set_lr(0.0)
    for parameter_name, value in train(model, [optimizer]).items():
        assert torch.equal(value, before[parameter_name])


@pytest.mark.parametrize("name", OPTIMIZERS.table)
def test_state_by_name_resumes_bit_for_bit(name: str) -> None:
    straight = body()
    expected = train(straight, [create(name, straight)], range(8))
    first = body()
    optimizer = create(name, first)
    train(first, [optimizer], range(4))
    names = {parameter: name for name, parameter in first.named_parameters()}
    by_name = {
        names[parameter]: {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
        for part in optimizer.parts
        for parameter, state in part.state.items()
    }
    second = body()
    second.load_state_dict(first.state_dict())
    resumed = create(name, second)
    for part in resumed.parts:
        for group in part.param_groups:
            for parameter_name, parameter in zip(group["param_names"], group["params"], strict=True):
                part.state[parameter] = by_name[parameter_name]
    for parameter_name, value in train(second, [resumed], range(4, 8)).items():
        assert torch.equal(value, expected[parameter_name])


@pytest.mark.parametrize("name", OPTIMIZERS.table)
def test_every_optimizer_learns(name: str) -> None:
    model = body()
    optimizer = create(name, model, weight_decay=0.0)
    losses = []
    for _ in range(60):
        logits = model(torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
        loss = nn.functional.cross_entropy(logits, torch.arange(6) % 5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS.table)
def test_scaler_skips_all_parts_at_one_infinite_gradient(name: str) -> None:
    model = body()
    optimizer = create(name, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for bad in ("fc1.weight", "head.bias", None):
        scaler.scale(torch.ones(()))  # creates the scale
        backward(model, 0)
        if bad:
            dict(model.named_parameters())[bad].grad.view(-1)[0] = torch.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
        assert bool(changed) == (bad is None)
    assert scaler.get_scale() == 1.0


def test_models_that_an_optimizer_cannot_train() -> None:
    with pytest.raises(UserError, match=r"optim\.name=muon needs hidden matrices"):
        create("muon", Convolution(3, 4, 1))
    with pytest.raises(UserError, match="all of them are frozen"):
        create("adamw", body().requires_grad_(False))
