"""What a process can do for its own secrets where the machine lets it: no core dumps, no swapping."""

from __future__ import annotations

import ctypes
import ctypes.util
import resource
from typing import Final

_PR_SET_DUMPABLE: Final = 4
_MCL_CURRENT_AND_FUTURE: Final = 3
_MCL_ONFAULT: Final = 4


def harden() -> dict[str, bool]:
    """Make this process non-dumpable and lock its memory; says which of them the machine granted."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    granted = {"non-dumpable": libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0}
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = limit == resource.RLIM_INFINITY
    granted["locked memory"] = unlimited and libc.mlockall(_MCL_CURRENT_AND_FUTURE | _MCL_ONFAULT) == 0
    return granted
