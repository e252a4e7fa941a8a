"""Tensors without memory, compared with real tensors."""

import contextlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moa_train.model.registry import create_model
from moa_train.model.summary import PeakMemory, TrainingCost, training_cost
from moa_train.model.without_memory import RULES, WithoutMemory

aten = torch.ops.aten


def real_cost(config, *, image_size, num_classes, batch_size, dtype):
    """Return what `training_cost` estimates, counted in a real training step."""
    config = replace(config, drop_path=0.0, moa=replace(config.moa, drop_path=0.0))
    with PeakMemory() as memory:
        model = create_model(config, image_size=image_size, num_classes=num_classes)
        memory.peak = memory.now  # without temporary tensors of the initialization
        images, labels = torch.empty(batch_size, 3, *image_size), torch.empty(batch_size, dtype=torch.int64).fill_(0)
        memory.operations = memory.moved = 0
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
    weights = sum(parameter.numel() for parameter in model.parameters())
    return TrainingCost(memory.peak + 8 * weights, memory.operations, memory.moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_costs_what_a_real_one_costs(small_config, variant, checkpointing, dtype):
    dropout = 0.0 if variant == "resnet" else 0.1
    config, geometry = small_config(variant, checkpointing=checkpointing, dropout=dropout)
    arguments = {**geometry, "batch_size": 3, "dtype": dtype}
    assert training_cost(config, **arguments) == real_cost(config, **arguments)


SOURCE = torch.arange(2.0 * 6 * 4 * 8).view(2, 6, 4, 8)
LAYOUTS = {
    "contiguous": SOURCE,
    "permuted": SOURCE.permute(0, 3, 1, 2),
    "sliced": SOURCE[:, 1:4],
    "expanded": SOURCE[:, :1].expand(2, 6, 4, 8),
    "half": SOURCE.bfloat16(),
    "integers": SOURCE.long(),
}
ONE, MATRIX, ROWS, BATCH = torch.ones(8), torch.ones(3, 5), torch.ones(5, 8), torch.ones(2, 5, 8)
EXAMPLES = {
    aten.zeros.default: lambda x: ([2, 3],),
    aten.ones.default: lambda x: ([2, 3],),
    aten.arange.default: lambda x: (5,),
    aten.new_zeros.default: lambda x: (x, [2, 3]),
    aten.new_empty_strided.default: lambda x: (x, [2, 3], [1, 2]),
    aten._unsafe_view.default: lambda x: (x.contiguous(), [2, -1]),
    aten.mul.Scalar: lambda x: (x, 0.5),
    aten.div.Scalar: lambda x: (x, 2),
    aten.eq.Scalar: lambda x: (x, 2),
    aten.gelu_backward.default: lambda x: (x, x),
    aten._softmax.default: lambda x: (x, -1, False),
    aten._safe_softmax.default: lambda x: (x, -1),
    aten._log_softmax.default: lambda x: (x, -1, False),
    aten._softmax_backward_data.default: lambda x: (x, x, -1, x.dtype),
    aten._log_softmax_backward_data.default: lambda x: (x, x, -1, x.dtype),
    aten.native_layer_norm.default: lambda x: (x, [x.shape[-1]], *[torch.ones(x.shape[-1])] * 2, 1e-5),
    aten.native_layer_norm_backward.default: lambda x: (
        x.contiguous(),
        x,
        [x.shape[-1]],
        *[torch.ones(*x.shape[:-1], 1)] * 2,
        *[torch.ones(x.shape[-1])] * 2,
        [True] * 3,
    ),
    aten.mm.default: lambda x: (MATRIX, ROWS),
    aten.bmm.default: lambda x: (BATCH, BATCH.mT),
    aten.addmm.default: lambda x: (ONE, MATRIX, ROWS),
    aten.sum.dim_IntList: lambda x: (x, [1, -1]),
    aten.mean.dim: lambda x: (x, [1, 2], True),
    aten.cat.default: lambda x: ([x, x], -2),
    aten.constant_pad_nd.default: lambda x: (x, [1, 2, 0, 3]),
    aten.index_select.default: lambda x: (x, 1, torch.tensor([0, 2, 1, 0])),
    aten.index_add.default: lambda x: (x, 1, torch.tensor([0, 2]), x[:, :2]),
    aten.slice_backward.default: lambda x: (x, [2, 9, *x.shape[2:]], 1, 0, x.shape[1], 1),
    aten.unfold_backward.default: lambda x: (MATRIX.view(3, 1, 5), [3, 5], 1, 5, 5),
    aten.nll_loss_forward.default: lambda x: (MATRIX, torch.tensor([0, 1, 2]), None, 1, -100),
    aten.nll_loss_backward.default: lambda x: (
        torch.ones([]),
        MATRIX,
        torch.tensor([0, 1, 2]),
        None,
        1,
        -100,
        torch.ones([]),
    ),
}
PAIRS = {
    "with itself": lambda x: x,
    "with a number": lambda x: 3,
    "with a row": lambda x: torch.ones(x.shape[-1]),
    "with a column": lambda x: torch.ones(x.shape[-2], 1, dtype=torch.bfloat16),
    "with a permuted one": lambda x: torch.ones(x.shape[::-1]).permute(3, 2, 1, 0),
    "with a larger one": lambda x: torch.ones(5, *x.shape),
}
BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)


def examples():
    for rule in RULES:
        if rule in BINARY:
            for pair, other in PAIRS.items():
                yield pytest.param(rule, lambda x, other=other: (x, other(x)), id=f"{rule} {pair}")
        else:
            yield pytest.param(rule, EXAMPLES.get(rule, lambda x: (x,)), id=f"{rule}")
    yield pytest.param(aten.index_select.default, lambda x: (x, -1, torch.tensor([0, 1])), id="index_select, last")

    def without_weights(x):
        statistics = torch.ones(*x.shape[:-1], 1, dtype=x.dtype)
        return x.contiguous(), x, [x.shape[-1]], statistics, statistics, None, None, [True, False, False]

    yield pytest.param(
        aten.native_layer_norm_backward.default, without_weights, id="layer norm without weights, backward"
    )
    plain = aten.native_layer_norm.default
    yield pytest.param(plain, lambda x: (x, [x.shape[-1]], None, None, 1e-5), id="layer norm without weights")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("operation", "arguments"), list(examples()))
def test_a_rule_applies_only_where_it_gives_the_geometry_of_the_real_result(operation, arguments, layout):
    given = arguments(LAYOUTS[layout])
    try:
        expected = operation(*given)
    except RuntimeError:  # no such operation on integers
        assert layout == "integers"
        return
    on_meta = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), given
    )
    found = RULES[operation](*on_meta)
    if found is None:
        assert layout not in ("contiguous", "half") or operation in BINARY
        return
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for one, other in pairs:
        assert (one is None) == (other is None)
        assert one is None or (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


class Unusual(nn.Module):
    """Uses constants, tensors created in the forward pass, results written into arguments, and in-place views."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, images):
        x = images.flatten(1)[:, :12].clone()
        assert x.t_().unsqueeze_(0).shape == (1, 12, len(images))
        x = x[0].t() * torch.tensor(0.5) + torch.zeros(len(images), 1, device=x.device)
        written = torch.empty_like(x)
        assert torch.add(x, 1, out=written) is written
        written.clamp_(min=0)[:, 0] = 1
        assert written.device == x.device == images.device
        return self.head(x + written.double().to("cpu").float() * self.scale.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unusual_code_of_a_user_costs_the_same(dtype):
    costs = []
    for without in (WithoutMemory("cpu"), contextlib.nullcontext()):
        with torch.device("meta" if isinstance(without, WithoutMemory) else "cpu"):
            model = Unusual()
        with without, PeakMemory() as memory:
            if isinstance(without, WithoutMemory):
                without.hollow(model)
            images = torch.empty(4, 3, 8, 8)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = model(images)
            logits.float().sum().backward()
        costs.append((memory.operations, memory.moved))
        assert memory.now > 0
        assert model.head.weight.grad.shape == (5, 12)
    assert costs[0] == costs[1]


def test_constants_keep_their_values():
    with WithoutMemory("cpu"):
        constant = torch.tensor([1.0, 2.0])
        assert constant.sum().item() == 3
        assert (torch.empty(2) * constant).shape == (2,)


def test_a_tensor_without_memory_is_useless_outside_of_the_mode():
    with WithoutMemory("cpu"):
        x = torch.empty(10**15)  # 4 PB
        assert (x + 1).shape == x.shape
    with pytest.raises(AssertionError, match=r"add.*outside of WithoutMemory"):
        x + 1


def test_describing_a_model_does_not_import_what_only_the_compiler_needs():
    """These modules take as long as importing torch."""
    code = """
import sys
import torch
from moa_train.model.summary import summarize, training_cost
from moa_train.schema import ModelConfig
for image_size in ((224, 224), (200, 232)):
    summarize(ModelConfig(), image_size=image_size, num_classes=10)
    for dtype in (torch.float32, torch.bfloat16):
        training_cost(ModelConfig(), image_size=image_size, num_classes=10, batch_size=8, dtype=dtype)
assert not {"torch._dynamo", "sympy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
