"""How the C library treats the memory that torch gives back on the CPU."""

import ctypes
import os

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1  # bytes: an int


def keep_freed_memory() -> bool:
    """Let the process keep what it has freed, for its next tensors; whether that could be said.

    glibc gives large blocks back to the system at once and asks for them again, and each 4 KB of them costs a page
    fault when they are first written. A network frees and takes the same megabytes in every layer: its commands are up
    to a third faster without. Where the environment sets malloc's thresholds, or the C library is another one, nothing
    is changed.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function, or no such library
        return False
    return all([mallopt(_M_MMAP_THRESHOLD, 1 << 30), mallopt(_M_TRIM_THRESHOLD, _MOST)])
