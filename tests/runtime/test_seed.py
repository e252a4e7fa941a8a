import random

import numpy as np
import pytest
import torch

from moa_train.runtime.seed import key_seed, reseed, seed_everything, set_deterministic

CPU = torch.device("cpu")


def test_keys_have_not_changed_since_the_first_checkpoints():
    # printf 'i1\0smixup\0i1000\0i3\0' | b2sum -l 64, and so on
    for name, b2sum in (
        ((0,), "68a770529bea7b5f"),
        ((1, "mixup", 1000, 3), "805004b7af2624fa"),
        ((2**40, "ä"), "c9c672f08d7d00d0"),
    ):
        assert key_seed(*name) == int.from_bytes(bytes.fromhex(b2sum), "little") % 2**63


def test_keys_of_different_names_differ():
    names = [(), (0,), ("0",), ("",), (0, 0), (1, 23), (12, 3), (123,), ("1", "23"), ("a", "b"), ("ab",), (-1,), (1,)]
    names += [(7, "model", step, micro) for step in range(100) for micro in range(100)]
    keys = {key_seed(*name) for name in names}
    assert len(keys) == len(names)
    assert all(0 <= key < 2**63 for key in keys)
    ones = np.array([[key >> bit & 1 for bit in range(63)] for key in keys]).mean(axis=0)
    assert abs(ones - 0.5).max() < 0.025  # five standard deviations of 10,000 fair coins


def test_reseed_does_not_depend_on_earlier_draws():
    torch.rand(3)
    reseed(CPU, 5, "model", 17)
    first = torch.rand(4)
    torch.rand(100)
    reseed(CPU, 5, "model", 17)
    assert torch.equal(first, torch.rand(4))
    expected = torch.rand(4, generator=torch.Generator().manual_seed(key_seed(5, "model", 17)))
    assert torch.equal(first, expected)
    reseed(CPU, 5, "model", 18)
    assert not torch.equal(first, torch.rand(4))


def test_seed_everything_covers_all_three_global_generators():
    draws = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        draws.append((random.random(), np.random.random(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


def test_deterministic_mode_can_be_switched(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
    try:
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.nn.functional.max_unpool2d(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.int64), 2)
    finally:
        set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reseed_reaches_the_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    reseed(device, 1, "a")
    first = torch.rand(4, device=device)
    reseed(device, 1, "a")
    assert torch.equal(first, torch.rand(4, device=device))
