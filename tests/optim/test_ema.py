import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from moa_train.optim.ema import AveragedWeights
from moa_train.runtime.errors import UserError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def wander(model: nn.Module, generator: torch.Generator) -> None:
    """Change the weights as an optimizer step would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def test_against_the_closed_form() -> None:
    """average_n = sum over t of w_t x_t, with w_t = (1 - d_t) prod_{s > t} d_s, in float64."""
    model, decay, generator = network(), 0.97, torch.Generator().manual_seed(1)
    ema = AveragedWeights(model, decay)
    history = [model[0].weight.detach().double()]
    for _ in range(400):
        wander(model, generator)
        ema.update()
        history.append(model[0].weight.detach().double())
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(400)]
    weights = torch.ones(401, dtype=torch.float64)
    for t, d in enumerate(decays, 1):
        weights[:t] *= d
        weights[t] *= 1 - d
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    expected = torch.einsum("t,tij->ij", weights, torch.stack(history))
    torch.testing.assert_close(ema.state_dict()["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert ema.updates == 400


def test_applied_uses_the_averages_and_restores_the_weights() -> None:
    model, generator = network(), torch.Generator().manual_seed(1)
    ema = AveragedWeights(model, 0.9)
    for _ in range(3):
        wander(model, generator)
        ema.update()
    own = copy.deepcopy(model.state_dict())
    other = network()
    other.load_state_dict(ema.state_dict())
    addresses = [p.data_ptr() for p in model.parameters()]
    x = torch.randn(5, 4)
    with ema.applied():
        assert torch.equal(model.eval()(x), other.eval()(x))
        assert torch.equal(model[0].weight, ema.state_dict()["0.weight"])
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == addresses  # DDP, compile and the optimizer refer to them

    def fail() -> None:
        with ema.applied():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.parallel.DistributedDataParallel])
def test_wrapped_models_use_the_averages_of_the_bare_one(
    wrap: Callable[[nn.Module], nn.Module], process_group: None
) -> None:
    model = network()
    wrapped = wrap(model)
    ema = AveragedWeights(model, 0.5)
    x = torch.randn(5, 4)
    wrapped.eval()
    before = wrapped(x)
    wander(model, torch.Generator().manual_seed(1))
    moved = wrapped(x)
    with ema.applied():
        assert torch.equal(wrapped(x), before)
    assert torch.equal(wrapped(x), moved)
    assert not torch.equal(before, moved)
    wrapped.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_half_precision_parameters_are_averaged_in_fp32_and_restored_exactly() -> None:
    model, generator = network().bfloat16(), torch.Generator().manual_seed(1)
    ema = AveragedWeights(model, 0.9)
    for _ in range(50):
        wander(model, generator)
        ema.update()
    average = ema.state_dict()["0.weight"].clone()
    own = model[0].weight.detach().clone()
    with ema.applied():
        assert torch.equal(model[0].weight, average.bfloat16())
    assert average.dtype == torch.float32
    assert torch.equal(model[0].weight, own)
    assert torch.equal(ema.state_dict()["0.weight"], average)


def test_buffers_are_those_of_the_model() -> None:
    model = network()
    ema = AveragedWeights(model, 0.9)
    model(torch.randn(16, 4))
    assert torch.equal(ema.state_dict()["1.running_mean"], model[1].running_mean)
    assert int(ema.state_dict()["1.num_batches_tracked"]) == 1


def test_a_resume_continues_bit_for_bit() -> None:
    def run(model: nn.Module, ema: AveragedWeights, steps: range) -> None:
        for step in steps:
            wander(model, torch.Generator().manual_seed(step))
            ema.update()

    straight, straight_ema = (model := network()), AveragedWeights(model, 0.99)
    run(straight, straight_ema, range(20))
    first = network()
    first_ema = AveragedWeights(first, 0.99)
    run(first, first_ema, range(10))
    resumed = network()
    resumed.load_state_dict(first.state_dict())
    resumed_ema = AveragedWeights(resumed, 0.99)
    resumed_ema.load_state_dict(copy.deepcopy(first_ema.state_dict()), first_ema.updates)
    run(resumed, resumed_ema, range(10, 20))
    for name, value in straight_ema.state_dict().items():
        assert torch.equal(value, resumed_ema.state_dict()[name]), name


def test_shared_parameters_stay_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    ema = AveragedWeights(model, 0.9)
    wander(model, torch.Generator().manual_seed(0))
    ema.update()
    state = ema.state_dict()
    assert set(state) == set(model.state_dict())
    assert torch.equal(state["0.weight"], state["1.weight"])
    ema.load_state_dict(copy.deepcopy(state), 1)


def test_averages_of_another_model_are_refused() -> None:
    model = network()
    ema = AveragedWeights(model, 0.9)
    state = dict(ema.state_dict())
    state["9.weight"] = state.pop("0.weight")
    state["2.bias"] = torch.zeros(7)
    with pytest.raises(UserError, match=r"missing \['0.weight'\], unknown \['9.weight'\], other shape \['2.bias'\]"):
        ema.load_state_dict(state, 0)
