"""When the host waits for the device, in a whole run on a simulated device that counts the waits."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moa_train.assembly.run import build_run
from moa_train.engine.loss import soft_cross_entropy
from moa_train.engine.prefetch import Prefetcher
from moa_train.engine.step import TrainStep
from moa_train.interfaces import Batch
from moa_train.model.registry import create_model
from moa_train.optim.clip import clip_gradients
from moa_train.optim.optimizers import create_optimizer
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import Precision
from moa_train.runtime.signals import StopSignals
from moa_train.schema import MoaConfig, ModelConfig, OptimConfig

aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Simulates a GPU with the device ``meta``, from which the host reads zeros, and counts the host's waits.

    The host waits when it reads a number (``item``, ``bool``, ``float``), when it puts numbers or indices of its own
    into a tensor of the device, and in copies in either direction without ``non_blocking``. Operations whose result
    depends on the values, such as indexing with a mask, raise an error on ``meta``.

    Attributes:
        at: number of waits for each value that ``now`` returned.
    """

    def __init__(self, now: Callable[[], int]) -> None:
        super().__init__()
        self.now = now
        self.at: Counter[int] = Counter()
        self.copies = 0
        self.from_numbers = FromNumbers(self.note)

    def __enter__(self) -> Self:
        self.from_numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.from_numbers.__exit__(*error)

    def note(self) -> None:
        self.at[self.now()] += 1

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operation is aten._local_scalar_dense.default and args[0].is_meta:
            self.note()
            return torch.zeros((), dtype=args[0].dtype).item()
        if operation in (aten._to_copy.default, aten.copy_.default):
            return self.copy(operation, args, kwargs)
        if operation in (aten.index.Tensor, aten.index_put_.default) and args[0].is_meta:
            for index in args[1]:
                if index is not None and not index.is_meta:
                    self.note()
        return operation(*args, **kwargs)

    def copy(self, operation: Any, args: Any, kwargs: Any) -> Tensor:
        names = [argument.name for argument in operation._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        if operation is aten.copy_.default:
            source, device = given["src"], given["self"].device
        else:
            source, device = given["self"], torch.device(given.get("device") or given["self"].device)
        if source.device.type == device.type:
            return operation(*args, **kwargs)
        self.copies += 1
        if not given.get("non_blocking", False):
            self.note()
        if device.type == "meta":
            return operation(*args, **kwargs)
        if operation is aten.copy_.default:
            return given["self"].zero_()
        return torch.zeros(source.shape, dtype=given.get("dtype") or source.dtype)


class FromNumbers(TorchFunctionMode):
    """Notices tensors on ``meta`` that are made from numbers of the host, which no dispatch mode sees."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in self.MAKERS and result.is_meta and not any(isinstance(part, Tensor) for part in args[-1:]):
            self.note()
        return result


def forget_found_inf(part: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    vars(part).pop("found_inf", None)


EVERYTHING = {
    "augment.crop": "pad", "augment.flip": 0.5, "augment.randaugment_ops": 2, "augment.randaugment_magnitude": 9,
    "augment.erasing": 0.25, "augment.cutmix": 1.0, "augment.label_smoothing": 0.1, "model.drop_path": 0.5,
    "model.moa.drop_path": 0.5, "engine.micro_batch_size": 16, "tracking.images": 4,
    "tracking.loggers": "[tensorboard]", "tracking.log_every": 4,
    "schedule.duration": "7 steps", "engine.eval_every": "3 steps", "engine.save_every": "3 steps",
}  # fmt: skip


def test_every_kind_of_wait_is_counted():
    here, there, index = torch.ones(3), torch.ones(3, device="meta"), torch.tensor([0, 1])
    ways = [
        lambda: there[0].item(), lambda: bool(there[0] > 0), lambda: float(there[0]), there.tolist, there.cpu,
        lambda: there.to("cpu"), lambda: here.copy_(there), lambda: here.to("meta"), lambda: there.copy_(here),
        lambda: torch.tensor(1.0, device="meta"), lambda: there.new_tensor([1.0]), lambda: there[index],
    ]  # fmt: skip
    for number, way in enumerate(ways):
        with Waits(lambda: 0) as waits:
            way()
        assert waits.at == {0: 1}, number
    for way in (there.nonzero, there.numpy, lambda: there[there > 0], lambda: torch.equal(there, there)):
        with Waits(lambda: 0), pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            way()
    with Waits(lambda: 0) as waits:
        here.to("meta", non_blocking=True).to("cpu", non_blocking=True)
        there.copy_(here, non_blocking=True).add_(1.0)[1:].sum()
        torch.full((2,), 1.0, device="meta").lerp_(torch.zeros(2, device="meta"), 0.5)
    assert not waits.at
    assert waits.copies == 3


@pytest.mark.parametrize(("optimizer", "clip"), [("adamw", "norm"), ("muon", "value"), ("sgd", "none")])
def test_the_host_waits_where_it_needs_numbers_and_nowhere_else(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, clip: str
) -> None:
    for module in ("step", "metrics"):  # ``meta`` stands for a CUDA GPU here
        monkeypatch.setattr(f"moa_train.engine.{module}.has_float64", lambda device: True)
    config = tiny({**EVERYTHING, "optim.name": optimizer, "optim.clip": clip})
    alone = Distributed(torch.device("meta"))
    run = build_run(config, run_dir=tmp_path, distributed=alone, stop=StopSignals())
    run.trainer.train_step.guard.delay = 2  # as on a GPU, where fused kernels skip an update
    for part in run.trainer.state.optimizer.parts:
        if not getattr(part, "_step_supports_amp_scaling", False):  # ``meta`` has no such kernels
            part.register_step_pre_hook(forget_found_inf)
    with Waits(lambda: run.trainer.state.step) as waits:
        run.trainer.fit()
    run.trainer.tracker.close()
    assert waits.copies > 100
    assert +waits.at == {
        0: 3,  # the logged images, their targets, and the first gradient's norm; later norms are read two steps late
        3: 7,  # the evaluation's three sums and three tensors of its mistakes, and the meters for the checkpoint
        4: 1,  # a log row
        6: 7,  # evaluation and checkpoint
        7: 7,  # the last log row, and evaluation
    }


def a_step(device: torch.device) -> tuple[TrainStep, Iterator[Batch]]:
    """Return the step of a MOA-Transformer with every source of randomness, and its batches on the device."""
    config = ModelConfig(
        embed_dim=32, depths=[2, 2], heads=[1, 2], window=4, drop_path=0.5, dropout=0.1, moa=MoaConfig(reduction=8)
    )
    model = create_model(config, image_size=(32, 32), num_classes=10).to(device)
    optim = OptimConfig(name="adamw", clip="norm", clip_value=1.0)
    numbers = torch.arange(8)
    batch = Batch(torch.zeros(8, 3, 32, 32), numbers, numbers, numbers, numbers, 0, 0).to(device)
    batches = (replace(batch, step=step) for step in count())
    step = TrainStep(
        model,
        create_optimizer(optim, model, 1e-3),
        transform=lambda batch, step: (batch.images, batch.images.new_full((8, 10), 0.1)),
        loss=soft_cross_entropy,
        clip=partial(clip_gradients, config=optim),
        precision=Precision("fp32", device, torch.amp.GradScaler(device.type, enabled=False)),
        ema=None,
        micro_batches=1,
        batch_size=8,
        seed=0,
        distributed=Distributed(device),
    )
    return step, batches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_copied_ahead_arrive_whole(no_waits):
    device = torch.device("cuda", torch.cuda.current_device())
    numbers, square = torch.arange(8), torch.randn(4096, 4096, device=device)
    batches = [
        Batch(
            torch.full((8, 3, 224, 224), step, dtype=torch.uint8), numbers, numbers, numbers, numbers, step
        ).pin_memory()
        for step in range(20)
    ]
    sums = torch.zeros(20, dtype=torch.int64, device=device)
    for waits in (nullcontext, no_waits):  # in the first round kernels are loaded
        with waits():
            prefetcher = Prefetcher(iter(batches), device)
            for step, batch in enumerate(prefetcher):
                square @ square
                sums[step].copy_(batch.images.sum())
                prefetcher.ahead()
    assert sums.tolist() == [step * 8 * 3 * 224 * 224 for step in range(20)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_waits_for_nothing_in_a_step_on_a_gpu(no_waits):
    step, batches = a_step(torch.device("cuda", torch.cuda.current_device()))
    for number in range(10):
        # The first gradient's norm is read, and kernels are loaded; later norms are read two steps behind.
        with no_waits() if number > 3 else nullcontext():
            assert step(batches, number)["loss"].is_cuda
