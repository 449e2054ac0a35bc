"""What a thread does with the requests that it took: each alone, or all as a batch, and who is told what.

A batch that isn't trusted yet is a trial: each request is run alone and answered with that, and then the
batch is compared with them (`batching`). Whatever fails, every request gets an answer.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from cloister.core.oip import Array
from cloister.enclave.worker import batching
from cloister.enclave.worker.batching import wipe_arrays
from cloister.enclave.worker.jobs import Call, Job, Lane, State
from cloister.errors import CloisterError, DeadlineExceeded, Unavailable

logger: Final = logging.getLogger(__name__)


class Runs:
    """Runs jobs that were taken from the queue, in whatever thread calls.

    Args:
        lock: Over profiles.
        settle: Hands out what came of jobs; is called in the loop of their futures.
        processor: Seconds of processor time of the thread that asks.
    """

    def __init__(
        self, lock: threading.Lock, *, settle: Callable[[list[Job]], None], processor: Callable[[], float]
    ) -> None:
        self._lock = lock
        self._settle = settle
        self._processor = processor

    def run(self, jobs: list[Job]) -> None:
        """Run them, and have them answered."""
        if len(jobs) == 1:
            self._run_alone(jobs[0])
        elif self._lane_on_trial(jobs):
            self._try(jobs)
        else:
            self._run_batch(jobs)

    def _lane_on_trial(self, jobs: list[Job]) -> bool:
        return jobs[0].lane.profile.on_trial(sum(job.rows for job in jobs))

    def _run_alone(self, job: Job) -> None:
        self._execute(job)
        self._deliver([job])

    def _execute(self, job: Job) -> None:
        call = job.call
        job.started = time.monotonic()
        if (refusal := _refusal(call, job.started)) is not None:
            job.error = refusal
            return
        began = self._processor() if job.group is not None else 0.0
        try:
            job.outputs = call.model.run(call.inputs, call.outputs)
        except Exception as error:
            job.error = error
        else:
            if job.group is not None:
                self._learn(job.lane, job.rows, began)
        job.ended = time.monotonic()

    def _learn(self, lane: Lane, rows: int, began: float) -> None:
        seconds = self._processor() - began
        with self._lock:
            lane.profile.record(rows, seconds)

    def _run_batch(self, jobs: list[Job]) -> None:
        """Run a batch; where it fails, each request alone."""
        jobs = self._admitted(jobs)
        if not jobs:
            return
        lane, call = jobs[0].lane, jobs[0].call
        rows = [job.rows for job in jobs]
        began, started = self._processor(), time.monotonic()
        joined = batching.join([job.call.inputs for job in jobs])
        try:
            parts = batching.part(call.model.run(joined, call.outputs), rows)
        except Unavailable:  # no memory for a batch, or its child process ended: says nothing about batches
            for job in jobs:
                self._run_alone(job)
            return
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

    def _admitted(self, jobs: list[Job]) -> list[Job]:
        """Those that may still run; the others are told."""
        now, admitted = time.monotonic(), []
        for job in jobs:
            if (refusal := _refusal(job.call, now)) is None:
                admitted.append(job)
            else:
                self.fail([job], refusal)
        return admitted

    def _run_each(self, jobs: list[Job]) -> None:
        """After a batch that failed. Where none of its requests fails alone, the model can't be batched."""
        for job in jobs:
            self._run_alone(job)
        if all(job.error is None for job in jobs):
            self._refuse_batches(jobs[0].lane)

    def _try(self, jobs: list[Job]) -> None:
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

    def _compare(self, jobs: list[Job], joined: dict[str, Array], alone: list[dict[str, Array]]) -> None:
        lane, call, rows = jobs[0].lane, jobs[0].call, [job.rows for job in jobs]
        began = self._processor()
        try:
            outputs = call.model.run(joined, call.outputs)
        except Unavailable:
            return  # its child process ended, which says nothing about batches
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

    def _refuse_batches(self, lane: Lane) -> None:
        with self._lock:
            lane.profile.refuse()
        logger.warning("a model's rows depend on each other: it is not batched")

    def fail(self, jobs: list[Job], error: Exception) -> None:
        """Answer those that aren't yet with an error."""
        if left := [job for job in jobs if job.state is State.RUNNING]:
            for job in left:
                job.error = job.error or error
            self._deliver(left)

    def _deliver(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.state = State.DONE
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            jobs[0].future.get_loop().call_soon_threadsafe(self._settle, jobs)


def _refusal(call: Call, now: float) -> CloisterError | None:
    """Why a call may not begin any more: its deadline passed, or what allowed it ended."""
    if now > call.deadline:
        return too_late()
    try:
        call.admit()
    except CloisterError as error:
        return error
    return None


def too_late() -> DeadlineExceeded:
    """The error of a request whose deadline passed."""
    return DeadlineExceeded(
        "no thread was free before the request's deadline",
        claim="deadline",
        expected="a free thread before it",
        actual="none",
    )
