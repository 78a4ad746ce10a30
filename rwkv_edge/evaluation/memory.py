"""Memory of this process, with the standard library alone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path


def resident_bytes() -> int | None:
    """Bytes of memory that this process has in RAM, mapped weights included.

    On Linux what it has now, without what it has freed. Elsewhere the most that it ever had, so that growth still
    shows; None where even that cannot be asked for (Windows).
    """
    statm = Path("/proc/self/statm")
    if statm.exists():
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes but for macOS
