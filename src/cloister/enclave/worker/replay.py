"""What a worker remembers so that it answers a request once: per incarnation, until the request expires."""

from __future__ import annotations

import heapq
from typing import Final

from cloister.errors import Overloaded, Replayed

MAX_REMEMBERED: Final = 2_000_000  # requests whose signatures have not expired


class ReplayGuard:
    """Remembers each request's encapsulated key and each (user, request id)."""

    def __init__(self, capacity: int = MAX_REMEMBERED) -> None:
        self._capacity = capacity
        self._seen: set[bytes] = set()
        self._expiries: list[tuple[int, bytes, bytes]] = []
        self._latest = 0  # the newest time that was named; older requests are forgotten

    def __len__(self) -> int:
        return len(self._expiries)

    def admit(self, *, enc: bytes, user: bytes, request_id: bytes, expiry: int, now: int) -> None:
        """Remember a request until it expires.

        Args:
            enc: The encapsulated key, or its digest.
            user: User id.
            request_id: The request's own id (16 bytes).
            expiry: When its signature expires, Unix seconds.
            now: Unix seconds; never runs backwards.

        Raises:
            Replayed: it expired before another was admitted, so that a copy could have been forgotten.
            Replayed: its encapsulation, or its user's request id, was seen before.
            Overloaded: too many requests are remembered.
        """
        self._latest = max(self._latest, now)
        if expiry < self._latest:
            raise Replayed(
                "the request expired while it waited",
                code="replayed.expired",
                claim="request expiry",
                expected=f"{self._latest} or later",
                actual=expiry,
                hint="Send it again as a new request",
            )
        while self._expiries and self._expiries[0][0] < now:
            _, *seen = heapq.heappop(self._expiries)
            self._seen.difference_update(seen)
        named = user[:16] + request_id
        if enc in self._seen or named in self._seen:
            raise Replayed(
                "the request was answered before",
                code="replayed.request",
                claim="request",
                expected="one not seen before",
                actual="a copy",
                hint="Send it again as a new request",
            )
        if len(self._expiries) >= self._capacity:
            raise Overloaded(
                claim="requests in memory", expected=f"at most {self._capacity}", actual=len(self._expiries)
            )
        self._seen.update((enc, named))
        heapq.heappush(self._expiries, (expiry, enc, named))
