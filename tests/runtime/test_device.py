import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moa_train.runtime.device import available_cores, cpu_quota, peak_memory, pick_device, set_threads
from moa_train.runtime.errors import UserError

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_cpu_and_auto_always_work():
    assert pick_device("cpu") == torch.device("cpu")
    kinds = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}
    assert pick_device("auto").type == next((kind for kind, module in kinds.items() if module.is_available()), "cpu")


def simulate(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    """Let torch report accelerators."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("cuda", "auto", "cuda:0"),
        ("xpu", "auto", "xpu:0"),
        ("xpu", "xpu:1", "xpu:1"),
        ("mps", "auto", "mps"),
        ("mps", "cpu", "cpu"),
        ("mtia", "auto", "cpu"),  # a kind that was never tried
    ],
)
def test_auto_selects_the_accelerator_that_torch_reports(monkeypatch, kind, name, expected):
    simulate(monkeypatch, kind, 2)
    assert pick_device(name) == torch.device(expected)


def test_an_accelerator_of_another_kind_is_an_error(monkeypatch):
    simulate(monkeypatch, "mps", 1)
    with pytest.raises(UserError, match=r"device=cuda, but .* sees no CUDA device\. Options: auto, cpu, mps"):
        pick_device("cuda")
    with pytest.raises(UserError, match="device=mps supports one process, and 2 were started"):
        pick_device("mps", 1, 2)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", ""])
def test_unknown_devices_are_rejected_with_the_options(name):
    with pytest.raises(UserError, match="Options: auto, cpu, cuda, cuda:0"):
        pick_device(name)


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_missing_gpu_is_an_error(name):
    with pytest.raises(UserError, match=r"sees no CUDA device\. Options: auto, cpu"):
        pick_device(name)


def allocator(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> tuple[str | None, ...]:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    pick_device("cpu")
    return tuple(os.environ.get(name) for name in names)


def test_segments_are_expandable_unless_the_user_chooses(monkeypatch):
    assert allocator(monkeypatch, {}) == (None, "expandable_segments:True")
    assert allocator(monkeypatch, {"PYTORCH_ALLOC_CONF": "a:1"}) == ("a:1", None)
    assert allocator(monkeypatch, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}) == (None, "a:1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_allocator_reads_that():
    code = (
        "import torch; from moa_train.runtime.device import pick_device; "
        "x = torch.zeros(9, device=pick_device('cuda')); "
        "assert all(segment['is_expandable'] for segment in torch.cuda.memory_snapshot())"
    )
    environ = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environ)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_process_uses_its_own_gpu():
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
def test_a_process_with_one_visible_gpu_uses_it(monkeypatch, visible, local_rank, expected):
    """As with srun --gpus-per-task=1, here for 8 processes on a machine; the GPUs are simulated."""
    simulate(monkeypatch, "cuda", visible)
    if expected is None:
        with pytest.raises(UserError, match="--nproc-per-node 2"):
            pick_device("cuda", local_rank, 8)
    else:
        assert pick_device("cuda", local_rank, 8) == torch.device(expected)


def test_available_cores_respect_the_affinity_of_the_process():
    everything = os.sched_getaffinity(0)
    assert 1 <= available_cores() <= len(everything)
    os.sched_setaffinity(0, {min(everything)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, everything)


def group(root: Path, path: str, **files: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {".": {"cpu__max": "150000 100000"}}, 1.5),  # version 2, in a container
        ("0::/", {".": {"cpu__max": "max 100000"}}, None),
        ("0::/a/b", {"a": {"cpu__max": "200000 100000"}, "a/b": {"cpu__max": "max 100000"}}, 2.0),  # of a parent
        ("0::/a/b", {}, None),
        ("4:cpu,cpuacct:/a\n0::/", {"cpu/a": {"cpu__cfs_quota_us": "50000", "cpu__cfs_period_us": "100000"}}, 0.5),
        ("4:cpu,cpuacct:/x", {"cpu": {"cpu__cfs_quota_us": "300000", "cpu__cfs_period_us": "100000"}}, 3.0),
        ("4:cpu:/a", {"cpu/a": {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}}, None),
        ("4:memory:/a", {"memory/a": {"cpu__cfs_quota_us": "1", "cpu__cfs_period_us": "100000"}}, None),
    ],
)
def test_quotas_of_both_versions_of_control_groups(tmp_path, groups, files, expected):
    (tmp_path / "groups").write_text(groups + "\n")
    for path, contents in files.items():
        group(tmp_path / "fs", path, **contents)
    assert cpu_quota(tmp_path / "fs", tmp_path / "groups") == expected


def test_there_may_be_no_control_groups(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("threads", "environ", "processes", "expected"),
    [
        (3, {"OMP_NUM_THREADS": "1"}, 1, 3),  # given explicitly
        (None, {"OMP_NUM_THREADS": "2"}, 2, 2),  # set by the user
        (None, {"OMP_NUM_THREADS": "1"}, 1, 1),
        (None, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1, 1),
        # set by torchrun
        (None, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 2, max(1, available_cores() // 2)),
        (None, {}, 1, available_cores()),
        (None, {}, 1000, 1),
    ],
)
@pytest.mark.usefixtures("_threads")
def test_threads_are_divided_among_processes(monkeypatch, threads, environ, processes, expected):
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert set_threads(threads, processes) == expected == torch.get_num_threads()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to compare with")
def test_peak_memory_is_at_least_the_resident_memory():
    tensor = torch.ones(2**23)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert resident > tensor.numel() * 4
    assert peak_memory(torch.device("cpu")) > 0.95 * resident  # the kernel counts pages in batches
    assert peak_memory(torch.device("cpu")) < 2**40
