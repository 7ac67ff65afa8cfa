"""How this process gets its memory from the system."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST = 2**30


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of up to 1 GB. Those over 32 MB it would give back, and the next one would be
    paid for page by page: 11% of a ViT-L's time on a CPU. Nothing happens with another C library."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        mallopt(parameter, MOST)
