import os
from pathlib import Path

import pytest
import torch

from moa_train.runtime.device import available_cores, peak_memory, pick_device, set_threads
from moa_train.runtime.errors import UserError

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_cpu_can_always_be_had():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", ""])
def test_unknown_names_are_answered_with_the_options(name):
    with pytest.raises(UserError, match="Options: auto, cpu, cuda, cuda:0"):
        pick_device(name)


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_an_error(name):
    with pytest.raises(UserError, match=r"sees no CUDA device\. Options: auto, cpu"):
        pick_device(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_process_takes_its_own_gpu():
    count = torch.cuda.device_count()
    assert pick_device("cuda", count - 1, count) == torch.device("cuda", count - 1)
    if count > 1:
        with pytest.raises(UserError, match=f"--nproc-per-node {count}"):
            pick_device("cuda", 0, count + 1)
    with pytest.raises(UserError, match="on one GPU"):
        pick_device("cuda:0", 0, 2)


@pytest.mark.parametrize(
    ("visible", "local_rank", "expected"), [(1, 0, "cuda:0"), (1, 5, "cuda:0"), (8, 5, "cuda:5"), (2, 1, None)]
)
def test_a_process_with_one_visible_gpu_takes_it(monkeypatch, visible, local_rank, expected):
    """As with srun --gpus-per-task=1, here for 8 processes on a machine; the GPUs are played."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if expected is None:
        with pytest.raises(UserError, match="--nproc-per-node 2"):
            pick_device("cuda", local_rank, 8)
    else:
        assert pick_device("cuda", local_rank, 8) == torch.device(expected)


def test_cores_are_those_this_process_may_use():
    everything = os.sched_getaffinity(0)
    assert 1 <= available_cores() <= len(everything)
    os.sched_setaffinity(0, {min(everything)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, everything)


@pytest.mark.parametrize(
    ("threads", "environ", "processes", "expected"),
    [
        (3, {"OMP_NUM_THREADS": "1"}, 1, 3),  # asked for
        (0, {"OMP_NUM_THREADS": "2"}, 2, 2),  # the user's own wish
        (0, {"OMP_NUM_THREADS": "1"}, 1, 1),
        (0, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1, 1),
        (0, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 2, max(1, available_cores() // 2)),  # torchrun's
        (0, {}, 1, available_cores()),
        (0, {}, 1000, 1),
    ],
)
@pytest.mark.usefixtures("_threads")
def test_threads_are_shared_among_the_processes(monkeypatch, threads, environ, processes, expected):
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert set_threads(threads, processes) == expected == torch.get_num_threads()


def test_negative_threads_are_an_error():
    with pytest.raises(UserError, match="threads=-1"):
        set_threads(-1)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to compare with")
def test_peak_memory_is_at_least_what_is_resident():
    tensor = torch.ones(2**23)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert resident > tensor.numel() * 4
    assert peak_memory(torch.device("cpu")) > 0.95 * resident  # the kernel counts pages in batches
    assert peak_memory(torch.device("cpu")) < 2**40
