"""Which workers are there and how busy each is. A pure object: time is an argument, in seconds."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.errors import FormatError, NotFound, Overloaded, Unavailable

KEY_SERVICE: Final = "key-service"
LIFETIME: Final = 6.0  # seconds that a heartbeat lasts
MAX_WORKERS: Final = 4096
MAX_POOLS: Final = 1024
_POOL: Final = re.compile(r"[0-9a-f]{64}|key-service")
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """An enclave that answers ``/ohttp``, as its launcher registered it.

    Attributes:
        id: Unique among all workers; letters, digits, dot, dash and underscore.
        pool: Pool id, 64 hexadecimal digits as in the ``cloister-pool`` field, or `KEY_SERVICE`.
        socket: Path of its Unix socket.
    """

    id: str
    pool: str
    socket: Path

    def __post_init__(self) -> None:
        if _ID.fullmatch(self.id) is None:
            raise FormatError("not a worker id", code="gateway.worker", claim="id")
        if _POOL.fullmatch(self.pool) is None:
            raise FormatError("not a pool id", code="gateway.worker", claim="pool", expected="64 hex digits")
        if not self.socket.is_absolute() or len(bytes(self.socket)) > 107:
            expected = "an absolute path of at most 107 B"
            raise FormatError(
                "not a path of a socket", code="gateway.worker", claim="socket", expected=expected
            )


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """A registered worker and its state.

    Attributes:
        worker: As registered.
        seen: Time of the last heartbeat.
        in_flight: Requests that it is answering.
        chosen: Number of the choice that last took it; breaks ties in turn.
        suspect: Whether a connection failed since the last heartbeat.
    """

    worker: Worker
    seen: float
    in_flight: int = 0
    chosen: int = 0
    suspect: bool = False


class Registry:
    """Workers by id, for as long as their heartbeats last."""

    def __init__(self, *, lifetime: float = LIFETIME) -> None:
        self._lifetime = lifetime
        self._entries: dict[str, Entry] = {}
        self._pools: set[str] = {KEY_SERVICE}  # every pool that ever had a worker
        self._choices = 0

    def register(self, worker: Worker, now: float) -> None:
        """Add a worker, or take its heartbeat. Another pool or socket under the same id replaces it.

        Raises:
            Overloaded: there are `MAX_WORKERS` or `MAX_POOLS` already.
        """
        entry = self._entries.get(worker.id)
        if entry is not None and entry.worker == worker:
            entry.seen, entry.suspect = now, False
            return
        full = entry is None and len(self._entries) >= MAX_WORKERS
        if full or (worker.pool not in self._pools and len(self._pools) >= MAX_POOLS):
            raise Overloaded("too many workers or pools", code="gateway.full")
        self._pools.add(worker.pool)
        self._entries[worker.id] = Entry(worker=worker, seen=now)

    def remove(self, worker_id: str) -> None:
        """Forget a worker; its requests in progress go on.

        Raises:
            NotFound: there is none with this id.
        """
        if self._entries.pop(worker_id, None) is None:
            raise NotFound("no such worker", code="gateway.no-worker")

    def expire(self, now: float) -> list[Worker]:
        """Forget and return the workers whose heartbeat is over."""
        gone = [each.worker for each in self._entries.values() if not self._alive(each, now)]
        for worker in gone:
            del self._entries[worker.id]
        return gone

    def choose(self, pool: str, now: float, *, tried: frozenset[str] = frozenset()) -> Entry:
        """The live worker of a pool with the fewest requests in flight.

        Args:
            pool: As in the ``cloister-pool`` field.
            now: Current time.
            tried: Ids of workers that did not take this request.

        Raises:
            NotFound: code ``gateway.no-pool``; no worker of this pool was ever here.
            Unavailable: code ``gateway.no-worker``; none is here now.
        """
        if pool not in self._pools:
            raise NotFound("no such pool", code="gateway.no-pool")
        entry, least = None, (True, sys.maxsize, 0)
        for each in self._entries.values():
            if each.worker.pool == pool and each.seen > now - self._lifetime and each.worker.id not in tried:
                load = (each.suspect, each.in_flight, each.chosen)
                if load < least:
                    entry, least = each, load
        if entry is None:
            raise Unavailable("no worker of this pool is up", code="gateway.no-worker")
        self._choices += 1
        entry.chosen = self._choices
        return entry

    def knows(self, pool: str) -> bool:
        """Whether a worker of this pool was ever here."""
        return pool in self._pools

    def workers(self, now: float) -> list[Entry]:
        """Live workers, by id."""
        live = (each for each in self._entries.values() if self._alive(each, now))
        return sorted(live, key=lambda each: each.worker.id)

    def _alive(self, entry: Entry, now: float) -> bool:
        return now - entry.seen < self._lifetime
