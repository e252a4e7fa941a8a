"""The state of a training: what it saves, restores and refuses."""

import pytest
import torch
from torch import nn

from moa_train.engine.checkpoint import CheckpointStore
from moa_train.engine.state import TrainState, check_form
from moa_train.interfaces import Classifier
from moa_train.optim.ema import AveragedWeights
from moa_train.optim.optimizers import create_optimizer
from moa_train.runtime.errors import UserError
from moa_train.runtime.precision import Precision
from moa_train.schema import OptimConfig

CPU = torch.device("cpu")


class Layers(Classifier, nn.Sequential):
    """A model of a few layers."""


def state(*, optimizer: str = "adamw", ema: bool = True, width: int = 3, seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = Layers(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    return TrainState(
        model,
        create_optimizer(OptimConfig(name=optimizer), model, 0.1),
        Precision.resolve("fp32", CPU),
        AveragedWeights(model, 0.9) if ema else None,
    )


def train(state: TrainState, steps: int) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        state.model(torch.randn(5, 4, generator=generator)).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.update()
        state.step += 1
        state.meters.add({"loss": torch.tensor(float(state.step))})


def save(state: TrainState, folder, *, ranks: int = 1) -> CheckpointStore:
    store = CheckpointStore(folder)
    meters = [state.meters.state_dict() for _ in range(ranks)]
    store.save(state.step, state.tensors(), {"train": {**state.scalars(), "meters": meters}})
    return store


@pytest.mark.parametrize("optimizer", ["adamw", "nadamw", "sgd"])
def test_a_restored_state_continues_like_the_original(tmp_path, optimizer):
    one, other = state(optimizer=optimizer), state(optimizer=optimizer, seed=1)
    train(one, 3)
    one.best, one.evaluated_step = {"step": 2, "top1": 50.0}, 2
    other.restore(save(one, tmp_path).at(3))
    assert (other.step, other.best, other.evaluated_step) == (3, one.best, 2)
    for each in (one, other):
        train(each, 3)
    for name, tensors in one.tensors().items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, other.tensors()[name][key]), (name, key)
    assert one.meters.read() == other.meters.read() == {"loss": 3.5}
    assert one.scalars() == other.scalars()


def test_an_additional_rank_gets_the_meters_of_another(tmp_path):
    one, third = state(), state()
    train(one, 2)
    third.restore(save(one, tmp_path, ranks=2).at(2), rank=3)
    assert third.meters.read() == {"loss": 1.5}


@pytest.mark.parametrize(("saved", "now"), [(True, False), (False, True)])
def test_ema_cannot_be_switched_on_or_off(tmp_path, saved, now):
    one = state(ema=saved)
    train(one, 1)
    with pytest.raises(UserError, match="EMA weights") as error:
        state(ema=now).restore(save(one, tmp_path).at(1))
    assert "engine.ema_decay" in str(error.value)


def test_the_lr_follows_the_configuration(tmp_path):
    one, other = state(), state()
    train(one, 1)
    other.optimizer.set_lr(0.025)
    other.restore(save(one, tmp_path).at(1))
    assert {group["lr"] for group in other.optimizer.param_groups} == {0.025}


def test_how_an_optimizer_is_computed_follows_the_device(tmp_path):
    """Fused kernels of one device may not exist on another, and momentum=0 has no Nesterov momentum."""
    one, other = state(optimizer="sgd"), state(optimizer="sgd")
    train(one, 1)
    for group in one.optimizer.param_groups:
        group |= {"foreach": True, "nesterov": False}
    before = [(group["fused"], group["foreach"], group["nesterov"]) for group in other.optimizer.param_groups]
    other.restore(save(one, tmp_path).at(1))
    wished = {"weight_decay": 0.3, "momentum": 0.7}
    other.optimizer.param_groups[0].update(wished)
    other.restore(save(one, tmp_path / "again").at(1))
    assert {key: other.optimizer.param_groups[0][key] for key in wished} == wished
    after = [(group["fused"], group["foreach"], group["nesterov"]) for group in other.optimizer.param_groups]
    assert after == before != [(None, True, False)] * len(before)


def test_weights_of_another_model_are_refused_with_the_differences(tmp_path):
    one = state()
    train(one, 1)
    with pytest.raises(UserError, match=r"do not fit the model of this run:\n.*size mismatch for 0\.weight"):
        state(width=5).restore(save(one, tmp_path).at(1))


@pytest.mark.parametrize("value", [None, "evil", {}])
@pytest.mark.parametrize("key", ["optimizer", "meters"])
def test_a_state_of_the_wrong_type_is_refused(tmp_path, key, value):
    one = state()
    train(one, 1)
    store = save(one, tmp_path)
    store.save(1, one.tensors(), {"train": {**store.at(1).state["train"], key: value}})
    with pytest.raises(UserError, match=r"state\.json cannot be restored|does not fit this run"):
        state().restore(store.at(1))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", []),
        ("classes", {}),
        ("fingerprint", None),
        ("origin", "x"),
        ("train", []),
        ("train.step", 7),
        ("train.step", True),
        ("train.best", None),
        ("train.meters", {}),
        ("train.lr_factor", "1"),
    ],
)
def test_entries_that_are_missing_or_of_the_wrong_type_are_named(tmp_path, key, value):
    one = state()
    train(one, 1)
    store = save(one, tmp_path)
    whole = {"config": {}, "classes": [], "fingerprint": "", "origin": [], **store.at(1).state}
    store.save(1, one.tensors(), whole)
    assert check_form(store.at(1)) == whole
    section, _, name = key.partition(".")
    whole[section] = {**whole[section], name: value} if name else value
    store.save(1, one.tensors(), whole)
    with pytest.raises(UserError, match=rf"state\.json cannot be resumed: {key}"):
        check_form(store.at(1))
