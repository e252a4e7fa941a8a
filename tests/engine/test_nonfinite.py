from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moa_train.engine.loss import soft_cross_entropy
from moa_train.engine.nonfinite import GradientGuard, NonFinitePolicy, RollBack
from moa_train.engine.state import TrainState
from moa_train.engine.step import TrainStep
from moa_train.interfaces import Classifier
from moa_train.optim.clip import clip_gradients
from moa_train.optim.ema import AveragedWeights
from moa_train.optim.optimizers import create_optimizer
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision
from moa_train.schema import OptimConfig

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Points:
    step: int
    micro: int
    index: Tensor
    points: Tensor

    @property
    def epoch(self) -> Tensor:
        return torch.zeros_like(self.index)

    def to(self, device: torch.device, non_blocking: bool) -> "Points":
        return self


def batches(start: int, bad: dict[tuple[int, int], float] | None = None) -> Iterator[Points]:
    """Yield two micro-batches of four samples per step; ``bad`` has values to insert, by step and micro-batch."""
    for number in range(2 * start, 1000):
        step, micro = divmod(number, 2)
        x_BC = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        if (step, micro) in (bad or {}):
            x_BC[1, 0] = bad[step, micro]
        yield Points(step, micro, torch.arange(4) + 4 * number, x_BC)


class Network(Classifier):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.body, self.head = body, nn.Linear(8, 3)

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.stem(x_BC)).relu()))


def build(optimizer: str = "adamw", delay: int = 0, body: nn.Module | None = None) -> tuple[TrainStep, TrainState]:
    torch.manual_seed(0)
    config = OptimConfig(name=optimizer, clip="norm", clip_value=1.0)
    model, precision = Network(body or nn.Linear(8, 8)), Precision.resolve("fp32", CPU)
    optimizers, ema = create_optimizer(config, model, 0.01), AveragedWeights(model, 0.9)
    step = TrainStep(
        model,
        optimizers,
        transform=lambda batch, step: (batch.points, nn.functional.one_hot(batch.index % 3, 3).float()),
        loss=soft_cross_entropy,
        clip=partial(clip_gradients, config=config),
        precision=precision,
        ema=ema,
        micro_batches=2,
        batch_size=8,
        seed=0,
        distributed=Distributed(CPU),
    )
    step.guard = GradientGuard(optimizers, precision, delay)
    return step, TrainState(model, optimizers, precision, ema)


def copy(state: TrainState) -> dict[str, Tensor]:
    return {f"{part} {name}": t.clone() for part, named in state.tensors().items() for name, t in named.items()}


@pytest.mark.parametrize("bad_step", [0, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("optimizer", "delay"),
    [("adamw", 0), ("sgd", 0), ("nadamw", 0), ("muon", 0), ("adamw", 2), ("sgd", 2), ("muon", 2)],
)
def test_a_skipped_update_changes_no_tensor_of_the_state(optimizer, delay, value, bad_step):
    """With a delay the host doesn't know about it in time: the kernels themselves skip the update."""
    step, state = build(optimizer, delay)
    stream, seen = batches(0, {(bad_step, 1): value}), []
    for number in range(8):
        before = copy(state)
        grad_norm = step(stream, number)["grad_norm"]
        seen += [(number, caught) for caught in step.guard.caught()]
        after = copy(state)
        changed = any(not t.equal(before.get(name, torch.zeros_like(t))) for name, t in after.items())
        assert bool(grad_norm.isfinite()) == (number != bad_step)
        assert changed == (number != bad_step)
        assert all(tensor.isfinite().all() for tensor in after.values())
    seen += [(8, caught) for caught in step.guard.caught(wait=True)]
    assert [caught for _, caught in seen] == [bad_step]
    assert seen[0][0] - bad_step <= (delay and delay + 1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "nadamw", "muon"])
def test_an_overflow_lowers_the_scale_and_is_reported_only_at_a_scale_of_1(optimizer):
    """The CPU's scaler stands in for that of fp16 on a GPU."""
    step, state = build(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    step.precision = Precision("fp32", CPU, scaler)
    step.guard = GradientGuard(state.optimizer, step.precision)
    stream, scales, before = batches(0, {(number, 0): float("inf") for number in range(3)}), [], copy(state)
    for number in range(5):
        step(stream, number)
        assert list(step.guard.caught()) == ([2] if number == 2 else [])
        scales.append(scaler.get_scale())
        if number < 3:
            assert all(tensor.equal(before[name]) for name, tensor in copy(state).items() if name in before)
    assert scales == [2.0, 1.0, 0.5, 0.5, 1.0]
    assert not copy(state)["model stem.weight"].equal(before["model stem.weight"])


@pytest.mark.parametrize(("optimizer", "delay"), [("adamw", 2), ("sgd", 2), ("muon", 2)])
def test_kernels_that_can_skip_compute_the_same_updates(optimizer, delay):
    """Updates before and after a skipped one are the same whether the host or the kernels skip it."""
    ends = []
    for wait in (0, delay):
        step, state = build(optimizer, wait)
        stream = batches(0, {(4, 0): float("nan")})
        for number in range(8):
            step(stream, number)
        ends.append(copy(state))
    # The decay of the averages depends on the number of updates, which the host learns late with a delay.
    for name in (name for name in ends[0] if not name.startswith("ema")):
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=0, msg=name)


def test_an_infinite_loss_with_a_finite_gradient_is_noticed():
    """With a logit of -inf at the label, the gradient of softmax is finite and the loss is not."""
    step, state = build()
    with torch.no_grad():
        state.model.head.bias[0] = -torch.inf
    before = copy(state)
    metrics = step(batches(0), 0)
    assert not metrics["grad_norm"].isfinite()
    assert list(step.guard.caught()) == [0]
    assert all(before[name].equal(tensor) for name, tensor in copy(state).items() if name.startswith("model"))


class Overflowing(nn.Module):
    def forward(self, x_BC: Tensor) -> Tensor:
        return x_BC * 1e30


class Rooted(nn.Module):
    """Has finite outputs, and an infinite gradient at 0."""

    def forward(self, x_BC: Tensor) -> Tensor:
        return (0 * x_BC).abs().sqrt()


@pytest.mark.parametrize(
    ("where", "body", "value"),
    [
        ("module body.1", nn.Sequential(Overflowing(), Overflowing()), None),
        ("the input", None, float("nan")),
        ("parameter body.bias", "damaged", None),
        ("gradient of norm.bias", Rooted(), None),
        ("None", None, None),
    ],
)
def test_the_first_non_finite_tensor_is_named(where, body, value):
    step, state = build(body=body if body != "damaged" else None)
    if body == "damaged":
        state.model.body.bias.data[3] = torch.nan
    before = copy(state)
    found = step.trace(batches(5, {(5, 1): value} if value else None), 5)
    assert [micro["micro"] for micro in found] == [0, 1]
    assert found[1]["index"] == [44, 45, 46, 47]
    assert str(found[1]["origin"]) == where
    if where == "the input":
        assert found[0]["origin"] is None
        assert 45 in found[1]["bad"]
    assert all(before[name].nan_to_num().equal(tensor.nan_to_num()) for name, tensor in copy(state).items())
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_a_policy_writes_a_report_and_aborts_skips_or_rolls_back(tmp_path: Path):
    alone = Distributed(CPU)

    def policy(name: str, budget: int) -> Callable[..., str]:
        made = NonFinitePolicy(name, budget, 0.5, tmp_path, alone, f"moa-train resume={tmp_path}")
        return partial(made.answer, saved=True, late=False)

    origins = [{"micro": 0, "origin": "module head", "epoch": [0], "index": [7], "bad": [7]}]
    with pytest.raises(
        UserError, match=r"step 12 is not finite: the first such value is in module head, micro-batch 0 \(rank 0\)"
    ):
        policy("abort", 10)(12, origins, 1, 1.0)
    assert '"index": [' in (tmp_path / "nonfinite-step-00000012.json").read_text()
    skip = policy("skip", 1)
    assert "Skipped: number 1 of at most 1" in skip(12, origins, 1, 1.0)
    assert "hardware fault" in skip(12, [], 1, 1.0)
    assert "with the weights of a later step" in skip(12, [], 1, 1.0, late=True)
    with pytest.raises(UserError, match=r"There is no checkpoint yet\. Start again with a lower optim\.lr") as error:
        policy("abort", 10)(12, origins, 1, 1.0, saved=False)
    assert "resume=" not in str(error.value)
    with pytest.raises(UserError, match=r"number 2, which exceeds engine\.nonfinite_budget=1"):
        skip(13, origins, 2, 1.0)
    with pytest.raises(RollBack) as request:
        policy("rollback", 3)(12, origins, 2, 0.5)
    assert (request.value.nonfinite, request.value.lr_factor) == (2, 0.25)
