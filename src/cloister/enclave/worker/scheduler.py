"""Who runs next: a bounded queue in which users take turns, deadlines, batches, strict models' sequence.

- **Places.** A request takes a place when it is authorized and keeps it until it is answered. Where all are
  taken, a user who holds fewer than another gets the newest one of that other's which isn't running yet.
- **Turns.** Each user's requests wait in a line, and lines take turns, over all models: one request of each.
- **Threads.** A thread that has finished takes the next requests by itself, so the event loop isn't between
  two runs. Each takes one request, or a batch of what waits already (`batching`); nothing waits for company.
- **Strict models.** One request of such a model is in the lines or running at once. The others wait beside
  them, where users take turns too, until the first has been answered and what it left has been wiped.

Every step takes constant time, but for the timer of a deadline. User ids stay in here.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Final

from cloister.core.oip import Array
from cloister.core.protocol.statement import ServingOptions
from cloister.enclave.worker import batching
from cloister.enclave.worker.batching import Model, Profile, wipe_arrays
from cloister.errors import DeadlineExceeded, Overloaded

MAX_LANES: Final = 4096  # models that are remembered, with what is known of their batches
logger: Final = logging.getLogger(__name__)


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
    """

    name: Hashable
    model: Model
    options: ServingOptions
    inputs: dict[str, Array] = field(repr=False)
    outputs: tuple[str, ...] = ()
    deadline: float = math.inf
    shareable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a call: its outputs, seconds in the queue and of the run, and requests in its batch."""

    outputs: dict[str, Array] = field(repr=False)
    queue_seconds: float
    run_seconds: float
    batch: int


class _State(enum.Enum):
    QUEUED = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()


class _Job:
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

    def __init__(self, user: bytes, call: Call, lane: _Lane, future: asyncio.Future[Outcome]) -> None:
        self.user = user
        self.call = call
        self.lane = lane
        self.future = future
        self.state = _State.QUEUED
        self.queued = self.started = self.ended = time.monotonic()
        self.line: _Turns | None = None
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


class _Turns:
    """Jobs by user; users take turns."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: OrderedDict[bytes, OrderedDict[_Job, None]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._lines)

    def put(self, job: _Job, *, first: bool = False) -> None:
        """Queue a job, behind or before its user's others."""
        line = self._lines.get(job.user)
        if line is None:
            line = self._lines[job.user] = OrderedDict()
        line[job] = None
        if first:
            line.move_to_end(job, last=False)
        job.line = self

    def pop(self) -> _Job:
        """The first job of the user whose turn it is."""
        user, line = next(iter(self._lines.items()))
        job, _ = line.popitem(last=False)
        if line:
            self._lines.move_to_end(user)
        else:
            del self._lines[user]
        return job

    def remove(self, job: _Job) -> None:
        """Take out a job that is in here."""
        line = self._lines[job.user]
        del line[job]
        if not line:
            del self._lines[job.user]


class _Lane:
    """What belongs to one model: for a strict one whose turn it is, else what may share a batch."""

    __slots__ = ("batchable", "current", "groups", "jobs", "profile", "strict", "waiting")

    def __init__(self, model: Model, *, strict: bool) -> None:
        self.strict = strict
        self.batchable = not strict and batching.can_batch(model)
        self.profile = Profile()
        self.groups: dict[batching.Key, OrderedDict[_Job, None]] = {}
        self.waiting = _Turns()
        self.current: _Job | None = None
        self.jobs = 0  # that wait or run


class Place:
    """A request's place in the worker, from its authorization to its answer; a context manager."""

    __slots__ = ("_job", "_revoked", "_scheduler", "user")

    def __init__(self, scheduler: Scheduler, user: bytes) -> None:
        self._scheduler = scheduler
        self.user: Final = user
        self._job: _Job | None = None
        self._revoked = False

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scheduler._leave(self)


class _Places:
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


class Scheduler:
    """Runs models in threads, which it owns: a context manager. `enter` and `run` belong to the event loop.

    Args:
        threads: How many; they are started when they are needed.
        queue: Requests that may have a place at once.
    """

    def __init__(self, *, threads: int, queue: int) -> None:
        self._wanted = threads
        self._threads: list[threading.Thread] = []
        self._wake: SimpleQueue[bool] = SimpleQueue()  # an executor's futures would cost more than all else
        self._places = _Places(queue)
        self._lock = threading.Lock()  # over all that follows, profiles, and the states of jobs
        self._ready = _Turns()
        self._lanes: OrderedDict[Hashable, _Lane] = OrderedDict()
        self._active = 0  # threads that run jobs, or look for one

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, when they have run what they run. Nothing may be asked for any more."""
        for _ in self._threads:
            self._wake.put(False)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    @property
    def inside(self) -> int:
        """Places that are taken."""
        return self._places.taken

    def enter(self, user: bytes) -> Place:
        """Take a place for one request of this user.

        Raises:
            Overloaded: none is free, and no other user holds more than this one would.
        """
        places = self._places
        while places.taken >= places.capacity:
            if (rival := places.rival(user)) is None:
                raise Overloaded(
                    "the worker's queue is full",
                    claim="queue",
                    expected=f"at most {places.capacity}",
                    actual=places.taken,
                )
            if self._withdraw(rival):
                places.remove(rival)
            else:
                places.keep(rival)
        place = Place(self, user)
        places.add(place)
        return place

    async def run(self, place: Place, call: Call) -> Outcome:
        """Run a call in a thread when it is its turn; once for each place.

        Raises:
            Overloaded: its place went to another user before it ran.
            DeadlineExceeded: it didn't begin in time, and never runs. Raised when the time is over.
            InvalidRequest: the model fails on this input.
        """
        if place._revoked:
            raise _revoked()
        loop = asyncio.get_running_loop()
        job = _Job(place.user, call, self._lane(call), loop.create_future())
        if job.queued > call.deadline:
            raise _too_late()
        place._job = job
        job.find_group()
        with self._lock:
            begin = self._put(job)
        if begin:
            self._begin()
        if call.deadline < math.inf and job.state is _State.QUEUED:
            job.timer = loop.call_later(call.deadline - job.queued, self._expire, job)
        try:
            return await job.future
        finally:
            del job  # an error's traceback holds this frame; nothing shall hold the request in a circle

    def _begin(self) -> None:
        """Let a thread look for work."""
        if len(self._threads) < self._wanted:
            thread = threading.Thread(target=self._loop, name=f"run-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._wake.put(True)

    # -- leaving; on the event loop --------------------------------------------

    def _leave(self, place: Place) -> None:
        """A request is answered, refused or cancelled."""
        if not place._revoked:
            self._places.remove(place)
        job, place._job = place._job, None
        if job is None:
            return
        self._unqueue(job)
        if job.lane.strict and job.state is _State.DONE:
            # In this round of the loop its answer is sealed, in the next one its buffers are wiped.
            loop = job.future.get_loop()
            loop.call_soon(loop.call_soon, self._advance, job)

    def _withdraw(self, place: Place) -> bool:
        """Take a place back, unless its request runs already."""
        job = place._job
        if job is not None:
            if not self._unqueue(job):
                return False
            _refuse(job, _revoked())
        place._revoked = True
        return True

    def _expire(self, job: _Job) -> None:
        if self._unqueue(job):
            _refuse(job, _too_late())

    def _unqueue(self, job: _Job) -> bool:
        """Take a job out of the queue, if it is still there."""
        if job.timer is not None:
            job.timer.cancel()
        with self._lock:
            if job.state is not _State.QUEUED:
                return False
            assert job.line is not None
            job.line.remove(job)
            self._ungroup(job)
            job.state = _State.DONE
            job.lane.jobs -= 1
        return True

    def _advance(self, job: _Job) -> None:
        """A strict model's request is gone: the next user's turn, before that user's other requests."""
        lane = job.lane
        with self._lock:
            if lane.current is not job:
                return
            lane.current = lane.waiting.pop() if lane.waiting else None
            begin = lane.current is not None and self._make_ready(lane.current, first=True)
        if begin:
            self._begin()

    def _settle(self, jobs: list[_Job]) -> None:
        """Hand out what came of jobs that ran."""
        for job in jobs:
            if job.timer is not None:
                job.timer.cancel()
            if job.future.done():  # cancelled while it ran
                wipe_arrays(job.outputs)
                if job.lane.strict:
                    self._advance(job)
            elif job.error is not None:
                job.future.set_exception(job.error.with_traceback(None))
            else:
                outcome = Outcome(
                    outputs=job.outputs,
                    queue_seconds=job.started - job.queued,
                    run_seconds=job.ended - job.started,
                    batch=job.batch,
                )
                job.future.set_result(outcome)
        with self._lock:
            jobs[0].lane.jobs -= len(jobs)

    # -- the queue; under the lock, but for `_lane` ----------------------------

    def _lane(self, call: Call) -> _Lane:
        strict = call.options.isolation == "strict"
        name = (call.name, strict)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _Lane(call.model, strict=strict)
            if len(self._lanes) > MAX_LANES:
                oldest, other = next(iter(self._lanes.items()))
                if not other.jobs:
                    del self._lanes[oldest]
        self._lanes.move_to_end(name)
        return lane

    def _put(self, job: _Job) -> bool:
        """Queue a job; says whether another thread shall look for work."""
        lane = job.lane
        lane.jobs += 1
        if lane.strict:
            if lane.current is not None:
                lane.waiting.put(job)
                return False
            lane.current = job
        if job.group is not None:
            lane.groups.setdefault(job.group, OrderedDict())[job] = None
        return self._make_ready(job)

    def _make_ready(self, job: _Job, *, first: bool = False) -> bool:
        self._ready.put(job, first=first)
        if self._active >= self._wanted:
            return False
        self._active += 1
        return True

    def _take(self) -> list[_Job]:
        """The next job, and those that join it; empty where nothing is ready."""
        if not self._ready:
            return []
        first = self._ready.pop()
        jobs, rows, size = [first], first.rows, first.size
        self._ungroup(first)
        limit = first.lane.profile.limit
        group = None if first.group is None else first.lane.groups.get(first.group)
        while group and rows < limit:
            job = next(iter(group))
            rows, size = rows + job.rows, size + job.size
            if rows > limit or size > batching.MAX_BATCH:
                break
            self._ready.remove(job)
            self._ungroup(job)
            jobs.append(job)
        for job in jobs:
            job.state = _State.RUNNING
        return jobs

    def _ungroup(self, job: _Job) -> None:
        if job.group is not None:
            group = job.lane.groups[job.group]
            del group[job]
            if not group:
                del job.lane.groups[job.group]

    # -- in a thread -----------------------------------------------------------

    def _loop(self) -> None:
        while self._wake.get():
            self._work()

    def _work(self) -> None:
        """Run jobs until nothing is ready."""
        while True:
            with self._lock:
                jobs = self._take()
                if not jobs:
                    self._active -= 1
                    return
            try:
                self._run(jobs)
            except Exception as error:  # such as no memory for a batch: its requests must be answered
                self._fail(jobs, error)
            del jobs  # a thread that waits keeps nothing of the last request

    def _run(self, jobs: list[_Job]) -> None:
        if len(jobs) == 1:
            self._run_alone(jobs[0])
        elif self._lane_on_trial(jobs):
            self._try(jobs)
        else:
            self._run_batch(jobs)

    def _lane_on_trial(self, jobs: list[_Job]) -> bool:
        return jobs[0].lane.profile.on_trial(sum(job.rows for job in jobs))

    def _run_alone(self, job: _Job) -> None:
        self._execute(job)
        self._deliver([job])

    def _execute(self, job: _Job) -> None:
        call = job.call
        job.started = time.monotonic()
        if job.started > call.deadline:
            job.error = _too_late()
            return
        began = time.thread_time() if job.group is not None else 0.0
        try:
            job.outputs = call.model.run(call.inputs, call.outputs)
        except Exception as error:
            job.error = error
        else:
            if job.group is not None:
                self._learn(job.lane, job.rows, began)
        job.ended = time.monotonic()

    def _learn(self, lane: _Lane, rows: int, began: float) -> None:
        seconds = time.thread_time() - began  # of this thread: others that compete for a core don't count
        with self._lock:
            lane.profile.record(rows, seconds)

    def _run_batch(self, jobs: list[_Job]) -> None:
        """Run a batch; where it fails, each request alone."""
        jobs = self._in_time(jobs)
        if not jobs:
            return
        lane, call = jobs[0].lane, jobs[0].call
        rows = [job.rows for job in jobs]
        began, started = time.thread_time(), time.monotonic()
        joined = batching.join([job.call.inputs for job in jobs])
        try:
            parts = batching.part(call.model.run(joined, call.outputs), rows)
        except Exception:
            parts = None
        finally:
            wipe_arrays(joined)
        if parts is None:
            self._run_each(jobs)
            return
        self._learn(lane, sum(rows), began)
        ended = time.monotonic()
        for job, outputs in zip(jobs, parts, strict=True):
            job.started, job.ended, job.outputs, job.batch = started, ended, outputs, len(jobs)
        self._deliver(jobs)

    def _in_time(self, jobs: list[_Job]) -> list[_Job]:
        """Those whose deadline hasn't passed; the others are told."""
        now = time.monotonic()
        in_time = [job for job in jobs if job.call.deadline >= now]
        for job in set(jobs).difference(in_time):
            self._fail([job], _too_late())
        return in_time

    def _run_each(self, jobs: list[_Job]) -> None:
        """After a batch that failed. Where none of its requests fails alone, the model can't be batched."""
        for job in jobs:
            self._run_alone(job)
        if all(job.error is None for job in jobs):
            self._refuse_batches(jobs[0].lane)

    def _try(self, jobs: list[_Job]) -> None:
        """Answer each request alone, then compare with the batch (`batching`)."""
        requests = [job.call.inputs for job in jobs]
        if not batching.differ(requests):
            for job in jobs:
                self._run_alone(job)
            return
        joined = batching.join(requests)  # requests are wiped when they are answered
        alone: list[dict[str, Array]] = []
        try:
            for job in jobs:
                self._execute(job)
                alone.append({name: array.copy() for name, array in job.outputs.items()})
                self._deliver([job])
            if all(job.error is None for job in jobs):
                self._compare(jobs, joined, alone)
        finally:
            for arrays in (joined, *alone):
                wipe_arrays(arrays)

    def _compare(self, jobs: list[_Job], joined: dict[str, Array], alone: list[dict[str, Array]]) -> None:
        lane, call, rows = jobs[0].lane, jobs[0].call, [job.rows for job in jobs]
        began = time.thread_time()
        try:
            outputs = call.model.run(joined, call.outputs)
        except Exception:
            self._refuse_batches(lane)
            return
        self._learn(lane, sum(rows), began)
        parts = batching.part(outputs, rows)
        if parts is None or not all(map(batching.same, alone, parts)):
            self._refuse_batches(lane)
        else:
            with self._lock:
                lane.profile.agree()
        wipe_arrays(outputs)

    def _refuse_batches(self, lane: _Lane) -> None:
        with self._lock:
            lane.profile.refuse()
        logger.warning("a model's rows depend on each other: it is not batched")

    def _fail(self, jobs: list[_Job], error: Exception) -> None:
        if left := [job for job in jobs if job.state is _State.RUNNING]:
            for job in left:
                job.error = job.error or error
            self._deliver(left)

    def _deliver(self, jobs: list[_Job]) -> None:
        for job in jobs:
            job.state = _State.DONE
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            jobs[0].future.get_loop().call_soon_threadsafe(self._settle, jobs)


def _refuse(job: _Job, error: Overloaded | DeadlineExceeded) -> None:
    if not job.future.done():  # it was cancelled in this round of the loop
        job.future.set_exception(error)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded(
        "no thread was free before the request's deadline",
        claim="deadline",
        expected="a free thread before it",
        actual="none",
    )


def _revoked() -> Overloaded:
    return Overloaded(
        "the worker's queue is full, and another user's request took this one's place",
        claim="queue",
        expected="fewer requests of one user where others wait",
        actual="the most of all",
    )
