"""Training and evaluation on a device without float64 or bf16: a stand-in whose tensors hold no values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from moa_train.assembly.run import build_run
from moa_train.engine.metrics import Loss
from moa_train.runtime.distributed import Distributed
from moa_train.runtime.precision import has_bf16
from moa_train.runtime.signals import StopSignals

DEVICE = torch.device("meta")


class Accelerator(TorchDispatchMode):
    """Rejects dtypes on the device. What the host reads from the device is zero."""

    def __init__(self, *refused: torch.dtype) -> None:
        super().__init__()
        self.refused, self.operations = refused, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = any(value.device == DEVICE for value in tree_iter((args, kwargs)) if isinstance(value, Tensor))
        if there and func is torch.ops.aten._local_scalar_dense.default:
            return 0.5
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to)
        if there and copies and torch.device("cpu") in (*args[1:2], kwargs.get("device")):
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        result = func(*args, **kwargs)
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.device == DEVICE:
                self.operations += 1
                if value.dtype in self.refused:
                    raise TypeError(f"{func}: the device does not support {value.dtype}")
        return result


@pytest.mark.parametrize("refused", [(torch.float64,), (torch.float64, torch.bfloat16)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_run_works_without_float64_and_bf16(
    tiny: Callable[..., Any], tmp_path: Path, refused: tuple[torch.dtype, ...], optimizer: str
) -> None:
    changes = {"optim.name": optimizer, "augment.randaugment_ops": 2, "augment.erasing": 0.5, "augment.cutmix": 1.0}
    config = tiny({**changes, "schedule.duration": "4 steps", "runtime.deterministic": "false"})
    with Accelerator(*refused) as device:
        run = build_run(config, run_dir=tmp_path, distributed=Distributed(DEVICE), stop=StopSignals())
        run.trainer.fit()
        run.trainer.tracker.close()
    assert run.trainer.state.step == 4
    assert run.trainer.state.best
    assert device.operations > 1000
    assert all(parameter.device == DEVICE for parameter in run.model.parameters())
    if optimizer == "muon" and torch.bfloat16 in refused:
        assert run.choices.values["optim.muon_precision"] == "fp32"


def test_the_stand_in_refuses_what_it_lacks() -> None:
    with Accelerator(torch.float64, torch.bfloat16):
        assert not has_bf16(DEVICE)
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(1, dtype=torch.float64, device=DEVICE)
    with Accelerator(torch.float64):
        assert has_bf16(DEVICE)


def test_the_sum_of_the_loss_is_float64_on_every_device() -> None:
    with Accelerator(torch.float64):
        total = Loss().count(torch.zeros(2, 3, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE))
    assert (total.device.type, total.dtype) == ("cpu", torch.float64)
