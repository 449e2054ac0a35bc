"""Time inside an enclave: the host's clock is a hint that never runs backwards (DESIGN, 4.7)."""

from __future__ import annotations

import time
from collections.abc import Callable


class HintedClock:
    """Unix seconds by the host, never before the latest time already relied on.

    Args:
        source: Where the hint comes from.
        floor: The earliest time it may show, for example the newest entry's of the log.
    """

    def __init__(self, source: Callable[[], float] = time.time, floor: int = 0) -> None:
        self._source = source
        self._floor = floor

    def now(self) -> int:
        """Whole seconds; at least what any earlier call gave."""
        self._floor = max(self._floor, int(self._source()))
        return self._floor

    def raise_floor(self, floor: int) -> None:
        """Never show a time before this one."""
        self._floor = max(self._floor, floor)
