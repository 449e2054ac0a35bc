"""Who runs next: a bounded queue in which users take turns, deadlines, batches, strict models' sequence.

- **Places.** A request takes a place when it is authorized and keeps it until it is answered. Where all are
  taken, a user who holds fewer than another gets the newest one of that other's which isn't running yet.
- **Leaving.** Where the connection of a request is lost, it leaves the queue and gives its place back at
  once. One that runs goes on to its end, and what comes of it is dropped.
- **Turns.** Each user's requests wait in a line, and lines take turns, over all models: one request of each.
- **Threads.** A thread that has finished takes the next requests by itself, so the event loop isn't between
  two runs. Each takes one request, or a batch of what waits already (`batching`); nothing waits for company.
- **Strict models.** One request of such a model is in the lines or running at once. The others wait beside
  them, where users take turns too, until the first has been answered and what it left has been wiped.

Every step takes constant time, but for the timer of a deadline. User ids stay in here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from queue import SimpleQueue
from typing import Final

from cloister.enclave.worker import batching
from cloister.enclave.worker.batching import wipe_arrays
from cloister.enclave.worker.isolation import cpu_seconds
from cloister.enclave.worker.jobs import Call, Job, Lane, Outcome, Place, Places, State, Turns
from cloister.enclave.worker.runs import Runs, too_late
from cloister.errors import DeadlineExceeded, Overloaded
from cloister.net.body import Body

MAX_LANES: Final = 4096  # models that are remembered, with what is known of their batches
logger: Final = logging.getLogger(__name__)


class Scheduler:
    """Runs models in threads, which it owns: a context manager. `enter` and `run` belong to the event loop.

    Args:
        threads: How many; they are started when they are needed.
        queue: Requests that may have a place at once.
        processor: Seconds of processor time of the thread that asks: what others take doesn't count.
    """

    def __init__(self, *, threads: int, queue: int, processor: Callable[[], float] = cpu_seconds) -> None:
        self._wanted = threads
        self._threads: list[threading.Thread] = []
        self._wake: SimpleQueue[bool] = SimpleQueue()  # an executor's futures would cost more than all else
        self._places = Places(queue)
        self._lock = threading.Lock()  # over all that follows, profiles, and the states of jobs
        self._runs = Runs(self._lock, settle=self._settle, processor=processor)
        self._ready = Turns()
        self._lanes: OrderedDict[Hashable, Lane] = OrderedDict()
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

    def enter(self, user: bytes, body: Body | None = None) -> Place:
        """Take a place for one request of this user.

        Args:
            user: Who asks.
            body: The request's; when it is abandoned, `leave` is called.

        Raises:
            Overloaded: none is free, and no other user holds more than this one would.
            CancelledError: nobody waits for the answer.
        """
        if body is not None and body.abandoned:
            raise asyncio.CancelledError
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
                job = rival.job
                if job is not None:
                    _refuse(job, _revoked())
            else:
                places.keep(rival)
        place = Place(self._leave, user)
        places.add(place)
        if body is not None:
            body.when_abandoned(partial(self.leave, place))
        return place

    def leave(self, place: Place) -> None:
        """Nobody waits for the answer any more: give the place back, unless the request runs already."""
        if not place.revoked and self._withdraw(place):
            place.abandoned = True
            if place.job is not None:
                place.job.future.cancel()

    async def run(self, place: Place, call: Call) -> Outcome:
        """Run a call in a thread when it is its turn; once for each place.

        Raises:
            Overloaded: its place went to another user before it ran.
            DeadlineExceeded: it didn't begin in time, and never runs. Raised when the time is over.
            InvalidRequest: the model fails on this input.
            CancelledError: nobody waits for the answer, and it didn't run.
        """
        if place.abandoned:
            raise asyncio.CancelledError
        if place.revoked:
            raise _revoked()
        loop = asyncio.get_running_loop()
        job = Job(place.user, call, self._lane(call), loop.create_future())
        if job.queued > call.deadline:
            raise too_late()
        place.job = job
        job.find_group()
        with self._lock:
            begin = self._put(job)
        if begin:
            self._begin()
        if call.deadline < math.inf and job.state is State.QUEUED:
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
        if not place.revoked:
            self._places.remove(place)
        job, place.job = place.job, None
        if job is None:
            return
        self._unqueue(job)
        if job.lane.strict and job.state is State.DONE:
            # In this round of the loop its answer is sealed, in the next one its buffers are wiped.
            loop = job.future.get_loop()
            loop.call_soon(loop.call_soon, self._advance, job)

    def _withdraw(self, place: Place) -> bool:
        """Take a place back, unless its request runs already."""
        if place.job is not None and not self._unqueue(place.job):
            return False
        place.revoked = True
        self._places.remove(place)
        return True

    def _expire(self, job: Job) -> None:
        if self._unqueue(job):
            _refuse(job, too_late())

    def _unqueue(self, job: Job) -> bool:
        """Take a job out of the queue, if it is still there."""
        if job.timer is not None:
            job.timer.cancel()
        with self._lock:
            if job.state is not State.QUEUED:
                return False
            assert job.line is not None
            job.line.remove(job)
            self._ungroup(job)
            job.state = State.DONE
            job.lane.jobs -= 1
        return True

    def _advance(self, job: Job) -> None:
        """A strict model's request is gone: the next user's turn, before that user's other requests."""
        lane = job.lane
        with self._lock:
            if lane.current is not job:
                return
            lane.current = lane.waiting.pop() if lane.waiting else None
            begin = lane.current is not None and self._make_ready(lane.current, first=True)
        if begin:
            self._begin()

    def _settle(self, jobs: list[Job]) -> None:
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

    def _lane(self, call: Call) -> Lane:
        strict = call.options.isolation == "strict"
        name = (call.name, strict)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(call.model, strict=strict)
            if len(self._lanes) > MAX_LANES:
                oldest, other = next(iter(self._lanes.items()))
                if not other.jobs:
                    del self._lanes[oldest]
        self._lanes.move_to_end(name)
        return lane

    def _put(self, job: Job) -> bool:
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

    def _make_ready(self, job: Job, *, first: bool = False) -> bool:
        self._ready.put(job, first=first)
        if self._active >= self._wanted:
            return False
        self._active += 1
        return True

    def _take(self) -> list[Job]:
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
            job.state = State.RUNNING
        return jobs

    def _ungroup(self, job: Job) -> None:
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
                self._runs.run(jobs)
            except Exception as error:  # such as no memory for a batch: its requests must be answered
                self._runs.fail(jobs, error)
            del jobs  # a thread that waits keeps nothing of the last request


def _refuse(job: Job, error: Overloaded | DeadlineExceeded) -> None:
    if not job.future.done():  # it was cancelled in this round of the loop
        job.future.set_exception(error)


def _revoked() -> Overloaded:
    return Overloaded(
        "the worker's queue is full, and another user's request took this one's place",
        claim="queue",
        expected="fewer requests of one user where others wait",
        actual="the most of all",
    )
