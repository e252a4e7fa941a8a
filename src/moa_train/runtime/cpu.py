"""Reduce two overheads of processes on a CPU: threads that wait for each other, and repeated memory allocation.

This module does not import torch, because `wait_briefly` must be called before torch is imported.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def wait_briefly() -> None:
    """Let OpenMP threads sleep after a short wait for each other. Call this function before importing torch.

    By default, libgomp's threads spin for milliseconds and occupy cores that other processes may need. With this
    setting, a small model on two cores trained 1.3 times as fast when another process was running, and 3% slower on
    an otherwise idle machine (docs/PERFORMANCE.md). A value of OMP_WAIT_POLICY or GOMP_SPINCOUNT set by the user is
    kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def keep_freed_memory() -> bool:
    """Let the allocator keep the memory of freed tensors, and return whether the allocator supports this.

    By default, glibc returns large blocks to the kernel, which fills each page with zeros when it is next used. With
    this setting, the process keeps its peak memory, as torch's allocator does on a GPU.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    no_mmap, no_trimming, coarsely = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)
    return all(mallopt(*option) for option in (no_mmap, no_trimming, coarsely))
