"""What processes on a CPU lose time with, beside computing: waiting for each other, and fetching memory anew.

Nothing here imports torch, since one of them has to come before it.
"""

import ctypes
import os
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # malloc.h
_MOST = 32 << 20  # bytes; the largest threshold that glibc takes


def let_idle_threads_sleep() -> None:
    """Ask OpenMP's threads to sleep while they wait for each other, unless the user has chosen; before torch comes.

    Otherwise they spin. On a core that somebody else needs, too, that is time which the others lack: a training on
    two cores beside another process became three times as fast by this (docs/PERFORMANCE.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_freed_memory() -> bool:
    """Let the allocator keep the memory of freed tensors (up to 32 MiB each); tell whether it could be asked to.

    By default glibc returns blocks of this size to the kernel, which fills each page with zeros when it is next used.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all(
        mallopt(*option) for option in ((_MMAP_THRESHOLD, _MOST), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2 * _MOST))
    )
