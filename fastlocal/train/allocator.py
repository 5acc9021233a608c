"""Keep glibc from giving each step's memory back to the kernel."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> None:
    """Raise glibc's thresholds for this process; without glibc, do nothing.

    By default every step maps its activations anew and takes thousands of page faults: a LeNet step in bf16
    runs 1.2 to 1.5 times faster with these (measured on 2 cores, batch 64 and 256).
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most it takes
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 << 20)
