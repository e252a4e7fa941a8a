"""Compiled block by block: few graphs, no breaks, and the numbers of the model that is not compiled."""

import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor

from moa_train.model.compiling import compile_model, compiles
from moa_train.model.registry import create_model
from moa_train.schema import MoaConfig, ModelConfig

# Dynamo looks at it and hides the warning, which as an error can't be hidden.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

needs_compiler = pytest.mark.skipif(
    not shutil.which(inductor.cpp.cxx[1]) or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="needs a C++ compiler and Python.h",
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def build(**changes: Any) -> nn.Module:
    moa = MoaConfig(reduction=4, drop_path=0.3)
    settings = {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "heads": [2, 2], "window": 4, "drop_path": 0.3}
    config = ModelConfig(name="moa", moa=moa, **{**settings, **changes})
    torch.manual_seed(1)
    return create_model(config, image_size=(16, 16), num_classes=5).train()


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], images: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    call(images).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def close(own: list[Tensor], other: list[Tensor]) -> None:
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_of_a_stage_share_one_graph_whatever_their_rates(checkpointing):
    model, counter = build(checkpointing=checkpointing), CompileCounterWithBackend("eager")
    assert compile_model(model, "blocks", backend=counter, fullgraph=True) is model  # fullgraph: a break raises
    for _ in range(2):
        model(torch.randn(3, 3, 16, 16)).sum().backward()
    assert counter.frame_count == 5  # patches, blocks of two stages, MOA, merging


@pytest.mark.parametrize(
    ("options", "checkpointing"),
    [
        ({"backend": "aot_eager"}, False),
        pytest.param({}, True, marks=needs_compiler),
        pytest.param({"purpose": "reduce-overhead"}, False, marks=needs_compiler),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_eager_model(options, checkpointing):
    """Without chance: compiled code draws other random numbers."""
    plain, model, images = (
        build(drop_path=0.0),
        build(drop_path=0.0, checkpointing=checkpointing),
        torch.randn(3, 3, 16, 16),
    )
    for module in (plain, model):
        for part in module.modules():
            if hasattr(part, "rate"):
                part.rate = 0.0
                part.keep.fill_(1.0)
    compile_model(model, "blocks", **options)
    for _ in range(2):
        torch.compiler.cudagraph_mark_step_begin()
        close(gradients(model, model, images), gradients(plain, plain, images))


def test_under_ddp_ranks_synchronize_at_the_last_micro_batch_only():
    plain, model, images = build(drop_path=0.0), build(drop_path=0.0), torch.randn(2, 3, 3, 16, 16)
    for module in (*plain.modules(), *model.modules()):
        if hasattr(module, "rate"):
            module.rate = 0.0
            module.keep.fill_(1.0)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(compile_model(model, "blocks", backend="eager"))
        with wrapped.no_sync():
            wrapped(images[0]).square().sum().backward()
        wrapped(images[1]).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for batch in images:
        plain(batch).square().sum().backward()
    close([parameter.grad for parameter in model.parameters()], [parameter.grad for parameter in plain.parameters()])


def test_stochastic_depth_works_in_compiled_blocks():
    model, images = build(drop_path=0.9), torch.randn(64, 3, 16, 16)
    compile_model(model, "blocks", backend="eager")
    torch.manual_seed(0)
    with torch.no_grad():
        out = [model(images) for _ in range(2)]
        model.eval()
        assert not torch.equal(*out)
        assert torch.equal(model(images), model(images))


def test_evaluation_is_not_compiled():
    model, counter = build().eval(), CompileCounterWithBackend("eager")
    compile_model(model, "blocks", backend=counter)
    model(torch.randn(1, 3, 16, 16))
    assert counter.frame_count == 0


def test_a_model_without_blocks_is_compiled_as_a_whole():
    model, counter = nn.Sequential(nn.Linear(2, 2), nn.GELU()), CompileCounterWithBackend("eager")
    compiled = compile_model(model, "blocks", backend=counter)
    compiled(torch.ones(1, 2))
    assert compiled is not model
    assert counter.frame_count == 1


@needs_compiler
def test_whether_it_compiles_here(monkeypatch):
    assert compiles(torch.device("cpu"))
    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    assert not compiles(torch.device("cpu"))
