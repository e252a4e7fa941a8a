"""Choose the device and the number of threads of a process, and measure its memory."""

import contextlib
import math
import os
import resource
import sys
from pathlib import Path

import torch

from moa_train.runtime.errors import UserError

KINDS = ("cuda", "xpu", "mps")
"""Kinds of accelerators: GPUs of NVIDIA and AMD, of Intel, and of Apple."""


def pick_device(name: str = "auto", local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda``, ``xpu``, ``mps`` or ``cuda:1`` to a device, and make it current.

    ``auto`` selects an accelerator if one is visible, and otherwise the CPU. If several processes run on a machine,
    each uses the GPU of its local rank, or its only visible GPU, as with ``srun --gpus-per-task=1``. `Distributed`
    checks that no two processes share a GPU.

    Raises:
        UserError: the device does not exist.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Set before the allocator is first used. Expandable segments avoid fragmentation when tensor sizes vary.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    found = torch.accelerator.current_accelerator(check_available=True)
    seen = found.type if found is not None and found.type in KINDS else None
    if name == "auto":
        name = seen or "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind not in KINDS or (index and not index.isdigit()):
        raise UserError(f"device={name} is not known. Options: auto, cpu, cuda, cuda:0, cuda:1, ..., xpu, mps.")
    count = torch.accelerator.device_count() if kind == seen else 0
    if count == 0:
        raise UserError(
            f"device={name}, but torch {torch.__version__} sees no {kind.upper()} device. "
            f"Options: auto, cpu{f', {seen}' if seen else ''}."
        )
    if kind == "mps":
        if local_world_size > 1:
            raise UserError(f"device=mps supports one process, and {local_world_size} were started. Use device=cpu.")
        return torch.device("mps")
    if index and local_world_size > 1:
        raise UserError(
            f"device={name} would put all {local_world_size} processes on one GPU. Use device={kind}, which gives each "
            "process its own GPU (CUDA_VISIBLE_DEVICES selects which)."
        )
    number = int(index) if index else 0 if count == 1 else local_rank
    if number >= count or 1 < count < local_world_size:
        raise UserError(
            f"device={name} with {local_world_size} process(es) on this machine requires GPU "
            f"{max(number, local_world_size - 1)}, but the machine has {count} GPU(s), numbered 0 to {count - 1}. "
            f"Use --nproc-per-node {count} or device=cpu."
        )
    device = torch.device(kind, number)
    torch.accelerator.set_device_index(number)
    return device


def has_float64(device: torch.device) -> bool:
    """Return whether a device has float64. Apple's GPUs do not, and neither do many of Intel's."""
    return device.type in ("cpu", "cuda")


def copies_overlap(device: torch.device) -> bool:
    """Return whether copies to a device may overlap with work of the host. On Intel's and Apple's, this is untested."""
    return device.type not in ("xpu", "mps")


def available_cores() -> int:
    """Return the number of cores that this process may use, according to its CPU affinity and any container quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(cpu_quota() or cores)))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the number of cores that control groups (versions 1 and 2) allow this process, or None without a limit.

    The limits of all groups that contain this process apply. In a container, its own group is usually the root.
    """
    limits = []
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            for base in [root / name for name in ("cpu", "cpu,cpuacct")] if controllers else [root, root / "unified"]:
                group = base / path.strip("/")
                limits += [_quota_of(folder) for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return min((limit for limit in limits if limit is not None), default=None)


def _quota_of(group: Path) -> float | None:
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # the file is missing, or the quota is "max"
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            if quota > 0:
                return quota / period
    return None


def set_threads(threads: int | None = None, local_world_size: int = 1) -> int:
    """Set and return the number of threads that torch uses in this process; None selects it automatically.

    The automatic value is OMP_NUM_THREADS if it is set, and otherwise an equal share of the cores for each process on
    this machine. torchrun sets OMP_NUM_THREADS to 1 if the user has not set it; that value is ignored.
    """
    if threads is None:
        wish = os.environ.get("OMP_NUM_THREADS", "")
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and local_world_size > 1 and wish == "1"
        if wish.isdigit() and int(wish) > 0 and not by_torchrun:
            threads = int(wish)
        else:
            threads = max(1, available_cores() // local_world_size)
    torch.set_num_threads(threads)
    return threads


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from host memory to ``device``, on most devices without waiting for the copy.

    A copy to a GPU starts from pinned memory, because a copy from pageable memory can block the host until earlier
    work on the GPU is done.
    """
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=copies_overlap(device))


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a GPU with its own memory, else of this process (resident)."""
    if device.type in ("cuda", "xpu"):
        return int(torch.accelerator.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
