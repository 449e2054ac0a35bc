"""What waits in a worker: calls, the turns that users take, the places that their requests hold."""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from cloister.core.oip import Array
from cloister.core.protocol.statement import ServingOptions
from cloister.enclave.worker import batching
from cloister.enclave.worker.batching import Model, Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One execution that is asked for.

    Attributes:
        name: Of the model: calls of one name share a session, and may share a batch.
        model: What runs.
        options: What the owner's statement says.
        inputs: Checked against the model; views of the request, which must outlive the call.
        outputs: Names of the wanted ones; empty for all.
        deadline: Monotonic seconds by which it must have begun.
        shareable: Whether its user allows a batch with others.
        admit: Raises where it may not run any more; is called when its turn has come, in any thread.
    """

    name: Hashable
    model: Model
    options: ServingOptions
    inputs: dict[str, Array] = field(repr=False)
    outputs: tuple[str, ...] = ()
    deadline: float = math.inf
    shareable: bool = False
    admit: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a call: its outputs, seconds in the queue and of the run, and requests in its batch."""

    outputs: dict[str, Array] = field(repr=False)
    queue_seconds: float
    run_seconds: float
    batch: int


class State(enum.Enum):
    """Where a job stands."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()


class Job:
    """A call in the queue.

    Attributes:
        line: The turns in which it waits.
        group: Which jobs of its lane it may be joined with; None where it runs alone.
        rows: Of its inputs, where it has a group.
        size: Bytes of its inputs.
    """

    __slots__ = (
        "batch", "call", "ended", "error", "future", "group", "lane", "line", "outputs", "queued", "rows",
        "size", "started", "state", "timer", "user",
    )  # fmt: skip

    def __init__(self, user: bytes, call: Call, lane: Lane, future: asyncio.Future[Outcome]) -> None:
        self.user = user
        self.call = call
        self.lane = lane
        self.future = future
        self.state = State.QUEUED
        self.queued = self.started = self.ended = time.monotonic()
        self.line: Turns | None = None
        self.group: batching.Key | None = None
        self.rows = self.size = 0
        self.batch = 1
        self.timer: asyncio.TimerHandle | None = None
        self.outputs: dict[str, Array] = {}
        self.error: Exception | None = None

    def find_group(self) -> None:
        """Work out what it may be joined with."""
        call, scope = self.call, self.user
        if call.options.batching == "none" or not self.lane.batchable:
            return
        if call.options.batching == "cross-user" and call.shareable:
            scope = b""
        if (key := batching.batch_key(call.inputs, call.outputs)) is not None:
            self.group, self.rows = (scope, *key[0]), key[1]
            self.size = sum(array.nbytes for array in call.inputs.values())


class Turns:
    """Jobs by user; users take turns."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: OrderedDict[bytes, OrderedDict[Job, None]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._lines)

    def put(self, job: Job, *, first: bool = False) -> None:
        """Queue a job, behind or before its user's others."""
        line = self._lines.get(job.user)
        if line is None:
            line = self._lines[job.user] = OrderedDict()
        line[job] = None
        if first:
            line.move_to_end(job, last=False)
        job.line = self

    def pop(self) -> Job:
        """The first job of the user whose turn it is."""
        user, line = next(iter(self._lines.items()))
        job, _ = line.popitem(last=False)
        if line:
            self._lines.move_to_end(user)
        else:
            del self._lines[user]
        return job

    def remove(self, job: Job) -> None:
        """Take out a job that is in here."""
        line = self._lines[job.user]
        del line[job]
        if not line:
            del self._lines[job.user]


class Lane:
    """What belongs to one model: for a strict one whose turn it is, else what may share a batch."""

    __slots__ = ("batchable", "current", "groups", "jobs", "profile", "strict", "waiting")

    def __init__(self, model: Model, *, strict: bool) -> None:
        self.strict = strict
        self.batchable = not strict and batching.can_batch(model)
        self.profile = Profile()
        self.groups: dict[batching.Key, OrderedDict[Job, None]] = {}
        self.waiting = Turns()
        self.current: Job | None = None
        self.jobs = 0  # that wait or run


class Place:
    """A request's place in the worker, from its authorization to its answer; a context manager."""

    __slots__ = ("_leave", "abandoned", "job", "revoked", "user")

    def __init__(self, leave: Callable[[Place], None], user: bytes) -> None:
        self._leave = leave
        self.user: Final = user
        self.job: Job | None = None
        self.revoked = False  # taken back: given to another user, or nobody waits any more
        self.abandoned = False  # because nobody waits any more

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(self)


class Places:
    """Who holds how many places, and who holds the most."""

    __slots__ = ("_counts", "_most", "_users", "_yielding", "capacity", "taken")

    def __init__(self, capacity: int) -> None:
        self.capacity: Final = capacity
        self.taken = 0
        self._counts: dict[bytes, int] = {}
        self._users: dict[int, OrderedDict[bytes, None]] = {}  # by how many they hold
        self._most = 0
        self._yielding: dict[bytes, OrderedDict[Place, None]] = {}  # places that can be taken back

    def add(self, place: Place) -> None:
        """Count a place."""
        self._step(place.user, 1)
        self._yielding.setdefault(place.user, OrderedDict())[place] = None

    def remove(self, place: Place) -> None:
        """Count it no more."""
        self._step(place.user, -1)
        self.keep(place)

    def keep(self, place: Place) -> None:
        """It can't be taken back any more."""
        places = self._yielding.get(place.user)
        if places is not None and places.pop(place, place) is None and not places:
            del self._yielding[place.user]

    def rival(self, user: bytes) -> Place | None:
        """The newest place of whoever holds the most, where that is more than ``user`` would hold."""
        if self._most <= self._counts.get(user, 0) + 1:
            return None
        places = self._yielding.get(next(iter(self._users[self._most])))
        return next(reversed(places)) if places else None

    def _step(self, user: bytes, step: int) -> None:
        """Counts change by one, so that the highest one is found without a search."""
        count = self._counts.pop(user, 0)
        if count:
            users = self._users[count]
            del users[user]
            if not users:
                del self._users[count]
        count += step
        if count:
            self._counts[user] = count
            self._users.setdefault(count, OrderedDict())[user] = None
        self._most = max(self._most, count) if step > 0 else self._most - (self._most not in self._users)
        self.taken += step
