"""What processes on a CPU lose time with, beside computing: waiting for each other, and fetching memory anew.

Nothing here imports torch, since one of them has to come before it.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def wait_briefly() -> None:
    """Let OpenMP's threads sleep when they have waited a moment for each other; call it before torch is imported.

    By default (libgomp) they spin for milliseconds, on a core that somebody else may need, too. Beside another process
    a small model on two cores trained 1.3 times as fast like this, and 3 % slower on a machine of its own
    (docs/PERFORMANCE.md). What the user has chosen stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def keep_freed_memory() -> bool:
    """Let the allocator keep the memory of freed tensors; tell whether it could be asked to.

    By default glibc returns large blocks to the kernel, which fills each page with zeros when it is next used. Now
    a process keeps what it needed at most, as it does on a GPU.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    no_mmap, no_trimming, coarsely = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)
    return all(mallopt(*option) for option in (no_mmap, no_trimming, coarsely))
