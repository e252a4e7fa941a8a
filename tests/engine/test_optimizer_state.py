from pathlib import Path

import pytest
import torch
from torch import nn

from moa_train.engine.optimizer_state import pack_optimizers, unpack_optimizers
from moa_train.engine.tensorfile import CheckpointError, read_tensors, write_tensors
from moa_train.runtime.errors import UserError


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4)]
    return nn.Sequential(*layers).to(dtype).to(memory_format=torch.channels_last)


def adamw(model, **more):
    decayed = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    rest = [(name, p) for name, p in model.named_parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "lr_scale": 1.0}, {"params": rest, "weight_decay": 0.0, "lr_scale": 0.5}]
    return [torch.optim.AdamW(groups, lr=0.01, **more)]


def muon(model):
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon([model[3].weight], lr=0.01), torch.optim.AdamW(rest, lr=0.01)]


class Counting(torch.optim.SGD):
    """Keeps a Python number in its state, as many optimizers of other libraries do."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            parameter.grad.mul_(state["step"])
        return super().step(closure)


MAKERS = {
    "numbers in the state": lambda model: [Counting(model.parameters(), lr=0.001, momentum=0.9)],
    "only numbers in the state": lambda model: [Counting(model.parameters(), lr=0.001)],
    "adamw, fused": lambda model: adamw(model, fused=True),
    "adamw, foreach": lambda model: adamw(model, foreach=True, amsgrad=True),
    "nadamw": lambda model: [torch.optim.NAdam(model.parameters(), decoupled_weight_decay=True)],
    "sgd": lambda model: [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)],
    "sgd, no momentum": lambda model: [torch.optim.SGD(model.parameters(), lr=0.01)],
    "adafactor": lambda model: [torch.optim.Adafactor(model.parameters())],
    "muon and adamw": muon,
}


def train(model, optimizers, steps):
    for step in steps:
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        model(images.to(next(model.parameters()).dtype)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def through_a_file(tensors, path: Path):
    write_tensors(path, tensors)
    return read_tensors(path)[0]


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_optimizer_continues_bit_for_bit(tmp_path, name):
    whole = network()
    optimizers = MAKERS[name](whole)
    train(whole, optimizers, range(3))
    weights = {key: value.clone() for key, value in whole.state_dict().items()}
    tensors, packed = pack_optimizers(optimizers, whole.named_parameters())
    tensors = through_a_file(tensors, tmp_path / "optimizer.safetensors")
    train(whole, optimizers, range(3, 6))

    resumed = network()
    resumed.load_state_dict(weights)
    fresh = MAKERS[name](resumed)
    unpack_optimizers(fresh, resumed.named_parameters(), tensors, packed)
    train(resumed, fresh, range(3, 6))
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())
    for before, after in zip(optimizers, fresh, strict=True):
        for old, new in zip(before.state.values(), after.state.values(), strict=True):
            for key, value in old.items():
                if value is not None:
                    value, restored = torch.as_tensor(value), torch.as_tensor(new[key])
                    assert torch.equal(value, restored)
                    assert (value.dtype, value.stride()) == (restored.dtype, restored.stride())


def test_state_keeps_its_own_dtype(tmp_path):
    model = network(torch.bfloat16)
    (optimizer,) = MAKERS["sgd"](model)
    train(model, [optimizer], range(1))
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].float() + 1e-6
    tensors, packed = pack_optimizers([optimizer], model.named_parameters())
    fresh = MAKERS["sgd"](model)
    unpack_optimizers(fresh, model.named_parameters(), through_a_file(tensors, tmp_path / "o.safetensors"), packed)
    assert {state["momentum_buffer"].dtype for state in fresh[0].state.values()} == {torch.float32}


def test_state_is_matched_by_name_and_copied():
    model = network()
    optimizers = adamw(model)
    train(model, optimizers, range(1))
    tensors, packed = pack_optimizers(optimizers, model.named_parameters())
    assert {"step|0.weight", "exp_avg|3.bias", "exp_avg_sq|1.weight"} <= set(tensors)
    assert packed[0]["class"] == "AdamW"
    assert packed[0]["groups"][1]["params"] == ["1.weight", "1.bias", "3.bias"]
    fresh = adamw(model)
    unpack_optimizers(fresh, model.named_parameters(), dict(reversed(tensors.items())), packed)
    before = tensors["exp_avg|0.weight"].clone()
    train(model, fresh, range(1, 2))
    assert torch.equal(tensors["exp_avg|0.weight"], before)


def test_hyperparameters_are_restored_except_for_those_to_keep():
    model = network()
    optimizers = adamw(model)
    train(model, optimizers, range(1))
    tensors, packed = pack_optimizers(optimizers, model.named_parameters())
    for keep in ((), ("lr", "betas")):
        fresh = [torch.optim.AdamW(adamw(model)[0].param_groups, lr=0.5, betas=(0.8, 0.9))]
        for group in fresh[0].param_groups:
            group |= {"lr": 0.5, "betas": (0.8, 0.9)}
        unpack_optimizers(fresh, model.named_parameters(), tensors, packed, keep)
        group = fresh[0].param_groups[0]
        assert (group["lr"], group["betas"]) == ((0.5, (0.8, 0.9)) if keep else (0.01, (0.9, 0.999)))


def trained() -> tuple[nn.Module, dict, list]:
    model = network()
    optimizers = adamw(model)
    train(model, optimizers, range(1))
    return model, *pack_optimizers(optimizers, model.named_parameters())


def refused(model, optimizers, tensors, packed) -> str:
    with pytest.raises(CheckpointError) as caught:
        unpack_optimizers(optimizers, model.named_parameters(), tensors, packed)
    assert not any(optimizer.state for optimizer in optimizers)  # nothing was changed
    return str(caught.value)


def test_missing_and_unexpected_state_is_listed():
    model, tensors, packed = trained()
    del tensors["exp_avg|1.bias"]
    tensors["exp_avg|9.weight"] = torch.zeros(1)
    message = refused(model, adamw(model), tensors, packed)
    assert "missing exp_avg|1.bias" in message
    assert "unexpected exp_avg|9.weight" in message


def test_a_different_optimizer_or_different_parameters_are_named():
    model, tensors, packed = trained()
    assert "AdamW in the checkpoint, SGD now" in refused(model, MAKERS["sgd"](model), tensors, packed)
    assert "AdamW in the checkpoint, Muon and AdamW now" in refused(model, muon(model), tensors, packed)
    one_group = [torch.optim.AdamW(model.parameters())]
    assert "in different groups" in refused(model, one_group, tensors, packed)
    model[3].bias.requires_grad_(False)
    groups = adamw(model)[0].param_groups
    frozen = [torch.optim.AdamW([{**groups[0]}, {**groups[1], "params": groups[1]["params"][:2]}])]
    assert "AdamW: 3.bias is only in the checkpoint" in refused(model, frozen, tensors, packed)


def test_parameters_that_never_had_a_gradient_have_no_state():
    model = network()
    (optimizer,) = adamw(model)
    model[3](torch.ones(1, 8 * 36)).sum().backward()
    optimizer.step()
    tensors, packed = pack_optimizers([optimizer], model.named_parameters())
    assert {name.partition("|")[2] for name in tensors} == {"3.weight", "3.bias"}
    fresh = adamw(model)
    unpack_optimizers(fresh, model.named_parameters(), tensors, packed)
    assert len(fresh[0].state) == 2


def test_the_list_of_problems_is_cut():
    model, _, packed = trained()
    message = refused(model, adamw(model), {}, packed)
    assert "and 7 more" in message
    assert len(message.splitlines()) <= 10


def test_state_that_is_neither_tensor_nor_number_is_an_error_that_names_it():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.state[model[0].weight] = {"history": [1, 2]}
    with pytest.raises(UserError, match="SGD cannot be saved: history must be tensors or numbers"):
        pack_optimizers([optimizer], model.named_parameters())
