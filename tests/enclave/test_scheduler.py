"""The scheduler: turns, places, deadlines, cancellation, batches and strict models, without any enclave."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cloister.core.oip import Array
from cloister.core.protocol.statement import ServingOptions
from cloister.enclave.worker import jobs
from cloister.enclave.worker import scheduler as module
from cloister.enclave.worker.batching import TRIALS
from cloister.enclave.worker.jobs import Call, Outcome
from cloister.enclave.worker.scheduler import Scheduler
from cloister.enclave.worker.specs import TensorSpec
from cloister.errors import CloisterError, DeadlineExceeded, InvalidRequest, LeaseExpired, Overloaded
from cloister.net.body import Body

pytestmark = pytest.mark.asyncio
STRICT = ServingOptions(isolation="strict")
SAME, CROSS = ServingOptions(batching="same-user"), ServingOptions(batching="cross-user")


def free(name: str) -> TensorSpec:
    return TensorSpec(name=name, datatype="FP32", shape=(-1, 4))


@dataclass
class FakeModel:
    """Doubles its input. It notes the batches that it runs, and waits where a test holds it."""

    inputs: dict[str, TensorSpec] = field(default_factory=lambda: {"x": free("x")})
    outputs: tuple[TensorSpec, ...] = (free("y"),)
    work: Callable[[Array], Array] = lambda x: x * 2
    gate: threading.Event = field(default_factory=threading.Event)
    ran: list[Array] = field(default_factory=list)
    running: int = 0
    most: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.gate.set()
        self.lock = threading.Lock()

    def run(self, inputs: dict[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.ran.append(inputs["x"].copy())
        try:
            assert self.gate.wait(10)
            time.sleep(self.seconds)
            return {"y": self.work(inputs["x"])}
        finally:
            with self.lock:
                self.running -= 1

    @property
    def marks(self) -> list[int]:
        """The first number of each run, in order."""
        return [int(x[0, 0]) for x in self.ran]


class Bench:
    """A scheduler, and short ways to ask it."""

    def __init__(self, *, threads: int = 1, queue: int = 64, **options: Any) -> None:
        self.scheduler = Scheduler(threads=threads, queue=queue, **options)
        self.model = FakeModel()

    async def ask(
        self,
        mark: float,
        user: str = "u",
        *,
        rows: int = 1,
        x: Array | None = None,
        name: str = "model",
        model: FakeModel | None = None,
        body: Body | None = None,
        **options: Any,
    ) -> Outcome:
        x = np.full((rows, 4), mark, np.float32) if x is None else x
        call = self.call(mark, **{"name": name, "model": model or self.model, "inputs": {"x": x}, **options})
        with self.scheduler.enter(user.encode(), body) as place:
            return await self.scheduler.run(place, call)

    def call(self, mark: float, **options: Any) -> Call:
        x = np.full((1, 4), mark, np.float32)
        given = {"name": "model", "model": self.model, "options": ServingOptions(), "inputs": {"x": x}}
        return Call(**{**given, **options})

    def start(self, *given: Any, **options: Any) -> asyncio.Task[Outcome]:
        return asyncio.ensure_future(self.ask(*given, **options))

    async def hold(self, **options: Any) -> asyncio.Task[Outcome]:
        """Occupy the one thread, so that what follows is queued."""
        self.model.gate.clear()
        task = self.start(-1, "holder", **options)
        await until(lambda: self.model.running == 1)
        return task

    def empty(self) -> bool:
        """Nothing is left of any request."""
        lanes = self.scheduler._lanes.values()
        places = self.scheduler._places
        return (
            not self.scheduler._ready
            and all(not lane.groups and not lane.waiting and not lane.jobs for lane in lanes)
            and all(lane.current is None for lane in lanes)
            and (places.taken, places._most) == (0, 0)
            and not (places._counts or places._users or places._yielding)
        )


async def until(held: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not held():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.fixture
def bench_of() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for bench in made:
        bench.model.gate.set()
        bench.scheduler.close()


@pytest.fixture
def bench(bench_of: Callable[..., Bench]) -> Bench:
    return bench_of()


async def settled(bench: Bench, *tasks: asyncio.Task[Outcome]) -> list[Outcome | BaseException]:
    """What became of these, once the model is let go; nothing of them is left."""
    bench.model.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await until(bench.empty)
    return results


def code(result: Outcome | BaseException) -> str:
    return result.code if isinstance(result, CloisterError) else "ok"


# -- turns ---------------------------------------------------------------------


async def test_a_lone_request(bench):
    outcome = await bench.ask(3)
    assert (outcome.outputs["y"] == 6).all()
    assert outcome.batch == 1
    assert outcome.queue_seconds >= 0 <= outcome.run_seconds
    await until(bench.empty)


async def test_users_take_turns(bench):
    held = await bench.hold()
    crowd = [bench.start(mark, "many") for mark in range(64 - 4)]
    await asyncio.sleep(0)
    others = [bench.start(100, "one"), bench.start(200, "two"), bench.start(101, "one")]
    await asyncio.sleep(0)
    await settled(bench, held, *crowd, *others)
    assert bench.model.marks[:7] == [-1, 0, 100, 200, 1, 101, 2]
    assert bench.model.marks[7:] == list(range(3, 60))


async def test_turns_go_over_all_models(bench):
    held = await bench.hold()
    names = [bench.start(mark, "many", name=f"model-{mark}") for mark in range(5)]
    await asyncio.sleep(0)
    tasks = [*names, bench.start(100, "one")]
    await asyncio.sleep(0)
    await settled(bench, held, *tasks)
    assert bench.model.marks == [-1, 0, 100, 1, 2, 3, 4]


async def test_no_more_threads_than_there_are(bench_of):
    bench = bench_of(threads=3)
    bench.model.seconds = 0.002
    results = await settled(bench, *[bench.start(mark, f"u{mark % 4}") for mark in range(40)])
    assert [float(each.outputs["y"][0, 0]) for each in results] == [2.0 * mark for mark in range(40)]
    assert bench.model.most == 3


# -- places --------------------------------------------------------------------


async def test_a_full_queue_refuses_whoever_holds_the_most(bench_of):
    bench = bench_of(queue=4)
    held = await bench.hold()
    tasks = [bench.start(mark, "many") for mark in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await bench.ask(9, "many")
    assert (caught.value.expected, caught.value.actual) == ("at most 4", "4")
    results = await settled(bench, held, *tasks)
    assert list(map(code, results)) == ["ok"] * 4
    assert 9 not in bench.model.marks


async def test_one_user_can_not_keep_the_others_out(bench_of):
    """The newest requests of whoever holds the most make room, until all hold as many."""
    bench = bench_of(queue=6)
    held = await bench.hold()
    many = [bench.start(mark, "many") for mark in range(5)]
    await asyncio.sleep(0)
    others = [bench.start(10 + mark, f"user-{mark}") for mark in range(2)]
    await asyncio.sleep(0)
    more = bench.start(20, "user-0")
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await bench.ask(30, "user-0")  # it would hold three, and many hold two
    results = await settled(bench, held, *many, *others, more)
    assert list(map(code, results)) == ["ok"] * 3 + ["overloaded"] * 3 + ["ok"] * 3
    assert sorted(bench.model.marks) == [-1, 0, 1, 10, 11, 20]


async def test_a_running_request_keeps_its_place(bench_of):
    bench = bench_of(queue=2)
    bench.model.gate.clear()
    many = [bench.start(mark, "many") for mark in range(2)]
    await until(lambda: bench.model.running == 1)
    one = bench.start(5, "one")
    await asyncio.sleep(0)
    assert (
        code((await asyncio.wait_for(asyncio.gather(many[1], return_exceptions=True), 5))[0]) == "overloaded"
    )
    results = await settled(bench, *many, one)
    assert list(map(code, results)) == ["ok", "overloaded", "ok"]


async def test_nobody_is_pushed_out_of_a_thread(bench_of):
    bench = bench_of(queue=2, threads=2)
    bench.model.gate.clear()
    many = [bench.start(mark, "many") for mark in range(2)]
    await until(lambda: bench.model.running == 2)
    with pytest.raises(Overloaded):
        await bench.ask(5, "one")
    assert list(map(code, await settled(bench, *many))) == ["ok", "ok"]


async def test_a_place_taken_back_before_it_came_to_the_queue(bench_of):
    """Such as while its model loads."""
    bench = bench_of(queue=2)
    with bench.scheduler.enter(b"many"), bench.scheduler.enter(b"many") as newest:
        assert code((await asyncio.gather(bench.ask(1, "one"), return_exceptions=True))[0]) == "ok"
        call = Call(name="m", model=bench.model, options=SAME, inputs={"x": np.ones((1, 4), np.float32)})
        with pytest.raises(Overloaded):
            await bench.scheduler.run(newest, call)
    assert bench.model.marks == [1]
    await until(bench.empty)


async def test_random_comings_and_goings_leave_nothing_behind(bench_of):
    bench = bench_of(queue=6, threads=2)
    random = np.random.default_rng(4)
    tasks = []
    for mark in range(600):
        options = (ServingOptions(), SAME, CROSS, STRICT)[random.integers(4)]
        now, patience = time.monotonic(), float(random.choice([0.0005, 0.005, math.inf]))
        tasks.append(
            bench.start(
                mark,
                f"user-{random.integers(5)}",
                rows=int(random.integers(1, 4)),
                options=options,
                name=str(random.integers(2)),
                shareable=bool(random.integers(2)),
                deadline=now + patience,
            )
        )
        if random.random() < 0.2:
            tasks[random.integers(len(tasks))].cancel()
        if random.random() < 0.3:
            await asyncio.sleep(0.001)
    results = await settled(bench, *tasks)
    kinds = {type(each).__name__ for each in results}
    assert kinds == {"Outcome", "Overloaded", "DeadlineExceeded", "CancelledError"}
    for mark, result in enumerate(results):
        if isinstance(result, Outcome):
            assert (result.outputs["y"] == 2 * mark).all()


# -- deadlines and cancellation ------------------------------------------------


async def test_a_deadline_is_answered_when_it_passes(bench):
    held = await bench.hold()
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await bench.ask(1, deadline=began + 0.03)
    assert 0.03 <= time.monotonic() - began < 3
    assert bench.model.running == 1  # the thread is still taken
    await settled(bench, held)
    assert bench.model.marks == [-1]


@pytest.mark.parametrize("options", [ServingOptions(), SAME, STRICT])
async def test_what_allowed_a_request_may_end_while_it_waits(bench, options):
    holder, allowed = await bench.hold(options=options), [True]

    def admit() -> None:
        if not allowed[0]:
            raise LeaseExpired(claim="lease")

    waiting = [bench.start(mark, options=options, admit=admit) for mark in (1, 2, 3)]
    await until(lambda: sum(lane.jobs for lane in bench.scheduler._lanes.values()) == 4)
    allowed[0] = False
    bench.model.gate.set()
    results = await settled(bench, *waiting)
    assert list(map(code, results)) == ["lease-expired"] * 3
    await holder
    assert bench.model.marks == [-1], "none of them ran"
    await until(bench.empty)


async def test_a_deadline_that_passed_before_the_queue(bench):
    with pytest.raises(DeadlineExceeded):
        await bench.ask(1, deadline=time.monotonic() - 0.001)
    assert bench.model.ran == []
    await until(bench.empty)


@pytest.mark.parametrize("options", [ServingOptions(), SAME, STRICT], ids=["shared", "batches", "strict"])
async def test_a_late_request_never_runs_though_no_timer_fires(bench, monkeypatch, options):
    held = await bench.hold()
    monkeypatch.setattr(Scheduler, "_expire", lambda self, job: None)
    late = [bench.start(mark, options=options, deadline=time.monotonic() + 0.02) for mark in (1, 2)]
    await asyncio.sleep(0.05)
    results = await settled(bench, held, *late)
    assert list(map(code, results)) == ["ok", "deadline", "deadline"]
    assert bench.model.marks == [-1]


async def test_a_cancelled_request_leaves_the_queue(bench):
    held = await bench.hold()
    tasks = [bench.start(mark) for mark in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    assert bench.scheduler.inside == 3
    await settled(bench, held, *tasks)
    assert bench.model.marks == [-1, 0, 2]


@pytest.mark.parametrize("then", ["withdrawn", "expired"])
async def test_a_request_is_cancelled_and_refused_in_the_same_round(bench_of, then):
    bench = bench_of(queue=3)
    held = await bench.hold()
    tasks = [bench.start(mark, "many", deadline=time.monotonic() + 60) for mark in range(2)]
    await asyncio.sleep(0)
    place = next(reversed(bench.scheduler._places._yielding[b"many"]))
    tasks[1].cancel()
    if then == "withdrawn":
        bench.scheduler.enter(b"one").__exit__(None, None, None)
    else:
        bench.scheduler._expire(place.job)
    results = await settled(bench, held, *tasks)
    assert [type(each).__name__ for each in results] == ["Outcome", "Outcome", "CancelledError"]


async def test_a_request_cancelled_while_it_runs(bench):
    held = await bench.hold()
    following = bench.start(1)
    await asyncio.sleep(0)
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    assert bench.scheduler.inside == 1
    (result,) = await settled(bench, following)
    assert (result.outputs["y"] == 2).all()


async def test_who_went_away_leaves_the_queue(bench):
    held = await bench.hold()
    bodies = [Body.of(b"") for _ in range(4)]
    tasks = [bench.start(mark, body=body) for mark, body in enumerate(bodies)]
    await asyncio.sleep(0)
    bodies[1].fail()
    bodies[2].fail()
    assert bench.scheduler.inside == 3  # at once
    bodies[2].fail()
    assert [bodies[mark].abandoned for mark in range(4)] == [False, True, True, False]
    results = await settled(bench, held, *tasks)
    assert [type(each).__name__ for each in results[1:]] == [
        "Outcome", "CancelledError", "CancelledError", "Outcome"
    ]  # fmt: skip
    assert bench.model.marks == [-1, 0, 3]


async def test_who_goes_away_while_it_runs_keeps_the_place_until_it_ends(bench):
    body = Body.of(b"")
    x = np.full((1, 4), 7, np.float32)
    bench.model.gate.clear()
    task = bench.start(7, x=x, body=body)
    await until(lambda: bench.model.running == 1)
    body.fail()
    await asyncio.sleep(0.01)
    assert bench.scheduler.inside == 1
    assert not task.done()
    (result,) = await settled(bench, task)
    assert (result.outputs["y"] == 14).all()  # its inputs were left alone


async def test_who_went_away_before_there_was_a_place(bench):
    body = Body.of(b"")
    body.fail()
    with pytest.raises(asyncio.CancelledError):
        await bench.ask(1, body=body)
    assert bench.empty()
    assert bench.model.ran == []


async def test_who_goes_away_before_the_queue(bench):
    """Such as while the model is loaded."""
    body = Body.of(b"")
    with bench.scheduler.enter(b"u", body) as place:
        body.fail()
        assert bench.scheduler.inside == 0
        with pytest.raises(asyncio.CancelledError):
            await bench.scheduler.run(place, bench.call(1))
    assert bench.empty()


async def test_who_goes_away_after_the_place_was_taken_back(bench_of):
    bench = bench_of(queue=3)
    held = await bench.hold()
    bodies = [Body.of(b"") for _ in range(2)]
    tasks = [bench.start(mark, "many", body=body) for mark, body in enumerate(bodies)]
    await asyncio.sleep(0)
    other = bench.start(9, "one")
    await asyncio.sleep(0)
    bodies[1].fail()
    assert bench.scheduler.inside == 3
    results = await settled(bench, held, other, *tasks)
    assert list(map(code, results)) == ["ok", "ok", "ok", "overloaded"]


async def test_who_goes_away_passes_a_strict_model_s_turn_on(bench):
    held = await bench.hold(name="held")
    bodies = [Body.of(b"") for _ in range(3)]
    tasks = [bench.start(mark, body=body, options=STRICT) for mark, body in enumerate(bodies)]
    await asyncio.sleep(0)
    bodies[0].fail()
    bodies[1].fail()
    results = await settled(bench, held, *tasks)
    assert [type(each).__name__ for each in results[1:]] == ["CancelledError"] * 2 + ["Outcome"]


async def test_what_a_model_raises_is_the_answer_of_its_request_alone(bench):
    def fail(x: Array) -> Array:
        if x[0, 0] == 1:
            raise InvalidRequest(code="request.execution")
        return x

    bench.model.work = fail
    results = await settled(bench, *[bench.start(mark) for mark in range(3)])
    assert list(map(code, results)) == ["ok", "request.execution", "ok"]


async def test_a_failed_request_is_let_go_at_once(bench):
    """An error and its traceback must not keep a request's input alive until the garbage is collected."""

    def fail(x: Array) -> Array:
        raise InvalidRequest(code="request.execution")

    class Traced(np.ndarray):
        pass

    bench.model.work = fail
    gc.disable()
    try:
        x = np.ones((1, 4), np.float32).view(Traced)
        trace = weakref.ref(x)
        with pytest.raises(InvalidRequest):
            await bench.ask(0, x=x)
        del x
        await until(lambda: trace() is None)
    finally:
        gc.enable()


# -- strict models -------------------------------------------------------------


async def test_a_strict_model_runs_one_request_at_a_time(bench_of):
    bench = bench_of(threads=3)
    bench.model.seconds = 0.002
    tasks = [bench.start(mark, f"u{mark % 3}", options=STRICT) for mark in range(20)]
    results = await settled(bench, *tasks)
    assert bench.model.most == 1
    assert [float(each.outputs["y"][0, 0]) for each in results] == [2.0 * mark for mark in range(20)]
    assert {each.batch for each in results} == {1}


async def test_users_of_a_strict_model_take_turns(bench):
    held = await bench.hold(options=STRICT)
    tasks = [bench.start(mark, "many", options=STRICT) for mark in range(10)]
    await asyncio.sleep(0)
    tasks.append(bench.start(100, "one", options=STRICT))
    await asyncio.sleep(0)
    await settled(bench, held, *tasks)
    assert bench.model.marks[:4] == [-1, 0, 100, 1]


async def test_a_strict_model_leaves_the_other_threads_alone(bench_of):
    bench, strict = bench_of(threads=2), FakeModel()
    strict.gate.clear()
    tasks = [bench.start(mark, model=strict, options=STRICT, name="s") for mark in range(5)]
    await until(lambda: strict.running == 1)
    assert (await asyncio.wait_for(bench.ask(7), 5)).outputs["y"][0, 0] == 14
    strict.gate.set()
    await settled(bench, *tasks)


async def test_a_user_s_other_requests_do_not_hold_a_strict_model_up(bench):
    held = await bench.hold()
    bench.model.seconds = 0.005
    tasks = [bench.start(0, "many", options=STRICT, name="s")]
    await asyncio.sleep(0)
    tasks += [bench.start(mark, "many") for mark in range(1, 9)]
    tasks += [bench.start(50, "many", options=STRICT, name="s")]
    tasks += [bench.start(100, "one", options=STRICT, name="s")]
    await asyncio.sleep(0)
    await settled(bench, held, *tasks)
    assert bench.model.marks.index(100) <= 6


async def test_a_strict_model_s_next_request_waits_for_the_answer(bench_of):
    """Until the step ends in which the answer is sealed, and the outputs and the request are wiped."""
    bench = bench_of(threads=2)
    seen: list[int] = []

    async def one() -> None:
        with bench.scheduler.enter(b"u") as place:
            call = Call(
                name="s", model=bench.model, options=STRICT, inputs={"x": np.ones((1, 4), np.float32)}
            )
            await bench.scheduler.run(place, call)
            time.sleep(0.01)  # noqa: ASYNC251  # sealing and wiping; the other thread is free
        seen.append(len(bench.model.ran))

    await asyncio.gather(one(), one(), one())
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("which", ["queued", "running"])
async def test_a_cancelled_strict_request_passes_the_turn_on(bench_of, which):
    bench = bench_of(threads=2)
    held = await bench.hold(options=STRICT)
    queued = [bench.start(mark, options=STRICT) for mark in (1, 2)]
    await asyncio.sleep(0)
    (queued[0] if which == "queued" else held).cancel()
    await asyncio.sleep(0.02)
    assert (bench.model.running, bench.model.marks) == (1, [-1])  # not before the run has ended
    await settled(bench, held, *queued)
    assert bench.model.marks == ([-1, 2] if which == "queued" else [-1, 1, 2])
    assert bench.model.most == 1


async def test_a_strict_request_that_expires_passes_the_turn_on(bench):
    held = await bench.hold()
    first = bench.start(1, options=STRICT, name="s", deadline=time.monotonic() + 0.01)
    second = bench.start(2, options=STRICT, name="s")
    await asyncio.gather(first, return_exceptions=True)
    results = await settled(bench, held, first, second)
    assert list(map(code, results)) == ["ok", "deadline", "ok"]


# -- batches -------------------------------------------------------------------


async def learn(bench: Bench, limit: int = 8, **options: Any) -> None:
    """Make the model's profile say that batches of so many rows pay and have been tried."""
    await bench.ask(0, **options)
    (lane,) = bench.scheduler._lanes.values()
    lane.profile.limit, lane.profile._agreed = limit, TRIALS
    lane.profile._seen = [TRIALS] * len(lane.profile._seen)
    lane.profile._choose = None  # type: ignore[method-assign]
    bench.model.ran.clear()


@pytest.fixture(autouse=True)
def _frozen(monkeypatch):
    """A profile whose `_choose` a test took away keeps its limit."""
    real = jobs.Profile

    class Frozen(real):
        _choose: Any = real._choose

        def record(self, rows: int, seconds: float) -> None:
            if self._choose is not None:
                super().record(rows, seconds)

    monkeypatch.setattr(jobs, "Profile", Frozen)


async def queued(bench: Bench, asked: list[tuple[float, str, dict[str, Any]]], options: Any) -> list[Any]:
    held = await bench.hold(name="held")
    tasks = []
    for mark, user, more in asked:
        tasks.append(bench.start(mark, user, options=options, **more))
    await asyncio.sleep(0)
    return (await settled(bench, held, *tasks))[1:]


async def test_without_the_owner_s_leave_nothing_is_joined(bench):
    await learn(bench, options=ServingOptions())
    asked = [(mark, "u", {"shareable": True}) for mark in range(5)]
    results = await queued(bench, asked, ServingOptions())
    assert {each.batch for each in results} == {1}


async def test_a_user_s_requests_are_joined(bench):
    await learn(bench, options=SAME)
    asked = [(mark, "ab"[mark % 2], {"shareable": True}) for mark in range(8)]
    results = await queued(bench, asked, SAME)
    assert [each.batch for each in results] == [4] * 8
    assert [(each.outputs["y"] == 2 * mark).all() for mark, each in enumerate(results)] == [True] * 8
    assert [set(x[:, 0] % 2) for x in bench.model.ran[1:]] == [{0}, {1}]


async def test_users_who_allow_it_are_joined(bench):
    await learn(bench, options=CROSS)
    asked = [(mark, f"u{mark}", {"shareable": mark != 3}) for mark in range(6)]
    results = await queued(bench, asked, CROSS)
    assert [each.batch for each in results] == [5, 5, 5, 1, 5, 5]
    assert [x.shape[0] for x in bench.model.ran[1:]] == [5, 1]


async def test_who_does_not_allow_it_is_joined_with_their_own(bench):
    await learn(bench, options=CROSS)
    asked = [(mark, "ab"[mark % 2], {"shareable": mark % 2 == 0}) for mark in range(6)]
    asked += [(10, "a", {"shareable": False}), (11, "c", {"shareable": True})]
    results = await queued(bench, asked, CROSS)
    assert [each.batch for each in results] == [4, 3, 4, 3, 4, 3, 1, 4]


async def test_other_shapes_outputs_and_models_are_not_joined(bench):
    await learn(bench, options=SAME)
    bench.model.inputs["x"] = TensorSpec(name="x", datatype="FP32", shape=(-1, -1))
    wide = np.full((1, 5), 1, np.float32)
    asked = [(0, "u", {}), (1, "u", {"x": wide}), (2, "u", {"outputs": ("y",)}), (3, "u", {"name": "other"})]
    results = await queued(bench, asked, SAME)
    assert [each.batch for each in results] == [1, 1, 1, 1]


async def test_no_more_rows_than_pay(bench):
    await learn(bench, limit=4, options=SAME)
    asked = [(mark, "u", {"rows": rows}) for mark, rows in enumerate([1, 2, 1, 3, 2, 9, 1])]
    results = await queued(bench, asked, SAME)
    assert [each.batch for each in results] == [3, 3, 3, 1, 1, 1, 1]
    assert [len(each.outputs["y"]) for each in results] == [1, 2, 1, 3, 2, 9, 1]


async def test_one_bad_input_fails_alone(bench):
    def fail(x: Array) -> Array:
        if (x == 3).any():
            raise InvalidRequest(code="request.execution")
        return x * 2

    await learn(bench, options=CROSS)
    bench.model.work = fail
    results = await queued(bench, [(mark, f"u{mark}", {"shareable": True}) for mark in range(6)], CROSS)
    assert list(map(code, results)) == ["ok"] * 3 + ["request.execution"] + ["ok"] * 2
    assert [(results[mark].outputs["y"] == 2 * mark).all() for mark in (0, 1, 2, 4, 5)] == [True] * 5
    lane = bench.scheduler._lanes["model", False]
    assert lane.profile.offered


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x[:1] * 2,
        lambda x: np.repeat(x * 2, 2, axis=0) if len(x) > 1 else x * 2,
        lambda x: np.float32(2) if len(x) > 1 else x * 2,
    ],
    ids=["fewer rows", "more rows", "a scalar"],
)
async def test_outputs_of_another_length_end_batching_for_good(bench, work):
    await learn(bench, options=SAME)
    bench.model.work = lambda x: np.asarray(work(x))
    asked = [(mark, "u", {}) for mark in range(4)]
    results = await queued(bench, asked, SAME)
    assert [(each.outputs["y"] == 2 * mark).all() for mark, each in enumerate(results)] == [True] * 4
    lane = bench.scheduler._lanes["model", False]
    for _ in range(1000):  # the last answer leaves before the thread has drawn its conclusion
        if not lane.profile.offered:
            break
        await asyncio.sleep(0.001)
    assert (lane.profile.offered, lane.profile.limit) == (False, 1)
    assert {each.batch for each in await queued(bench, asked, SAME)} == {1}


@pytest.mark.parametrize("shape", [(4, 4), (1, 4), ()])
@pytest.mark.parametrize("side", ["input", "output"])
async def test_a_fixed_first_dimension_is_never_joined(bench, shape, side):
    spec = TensorSpec(name="x", datatype="FP32", shape=shape)
    if side == "input":
        bench.model.inputs["z"] = spec
    else:
        bench.model.outputs = (*bench.model.outputs, spec)
    await bench.ask(0, options=SAME)
    (lane,) = bench.scheduler._lanes.values()
    assert not lane.batchable


def mixing(x: Array) -> Array:
    return x * 2 + (x - x.mean(axis=0, keepdims=True))


async def test_rows_that_depend_on_each_other_are_found_before_anybody_is_answered(bench):
    """A free first dimension may be a length: then a batch would mix requests."""
    bench.model.work = mixing
    for start in range(0, 60, 6):
        results = await queued(bench, [(start + each, "u", {}) for each in range(6)], SAME)
        assert [(each.outputs["y"] == 2 * (start + mark)).all() for mark, each in enumerate(results)] == [
            True
        ] * 6
        assert {each.batch for each in results} == {1}
    lane = bench.scheduler._lanes["model", False]
    assert not lane.profile.offered


async def test_copies_prove_nothing(bench):
    """Requests of the same content would hide that rows depend on each other."""
    bench.model.work = mixing
    for _ in range(10):
        await queued(bench, [(5, "u", {}) for _ in range(6)], SAME)
    lane = bench.scheduler._lanes["model", False]
    assert lane.profile.offered
    assert lane.profile._agreed == 0
    results = await queued(bench, [(mark, "u", {}) for mark in range(6)], SAME)
    assert [(each.outputs["y"] == 2 * mark).all() for mark, each in enumerate(results)] == [True] * 6
    assert not lane.profile.offered


async def test_no_memory_for_a_batch_says_nothing_about_batches(bench):
    def only_alone(x: Array) -> Array:
        if len(x) > 1:
            raise Overloaded(claim="memory")
        return x * 2

    await queued(bench, [(mark, "u", {}) for mark in range(6)], SAME)
    lane = bench.scheduler._lanes["model", False]
    lane.profile.limit, lane.profile._agreed, lane.profile._seen = 8, 9, [9] * 7
    bench.model.work = only_alone
    results = await queued(bench, [(mark, "u", {}) for mark in range(6)], SAME)
    assert [(each.outputs["y"] == 2 * mark).all() for mark, each in enumerate(results)] == [True] * 6
    assert max(len(x) for x in bench.model.ran) > 1
    assert lane.profile.offered


async def test_a_trial_answers_before_it_compares(bench):
    """The request's buffer is wiped as soon as it is answered; the trial has its own copies."""
    bench.model.seconds = 0.001
    wiped: list[Array] = []

    async def one(mark: float) -> None:
        x = np.full((1, 4), mark, np.float32)
        outcome = await bench.ask(mark, x=x, options=SAME)
        assert (outcome.outputs["y"] == 2 * mark).all()
        x.fill(0)
        outcome.outputs["y"].fill(0)
        wiped.append(x)

    for start in range(1, 50, 7):
        await asyncio.gather(*(one(start + each) for each in range(7)))
    lane = bench.scheduler._lanes["model", False]
    assert lane.profile.offered
    assert lane.profile._agreed >= TRIALS
    assert len(wiped) == 49


async def test_a_batch_without_memory_answers_its_requests(bench, monkeypatch):
    def no_memory(*given: Any) -> Any:
        raise MemoryError

    await learn(bench, options=SAME)
    monkeypatch.setattr(module.batching, "join", no_memory)
    results = await queued(bench, [(mark, "u", {}) for mark in range(3)], SAME)
    assert [type(each).__name__ for each in results] == ["MemoryError"] * 3
    monkeypatch.undo()
    assert (await bench.ask(1, options=SAME)).outputs["y"][0, 0] == 2


async def test_no_answer_goes_to_another_request(bench_of):
    """Random rows, a thousand requests of eight users, all sorts of options."""
    bench = bench_of(threads=2, queue=2000)
    random = np.random.default_rng(2)
    weights = random.standard_normal((4, 4)).astype(np.float32)
    bench.model.work = lambda x: x @ weights
    batches: list[int] = []

    async def one(number: int) -> None:
        x = random.standard_normal((int(random.integers(1, 6)), 4)).astype(np.float32)
        options = (SAME, CROSS, CROSS)[number % 3]
        outcome = await bench.ask(
            0, f"user-{number % 8}", x=x, options=options, shareable=bool(number % 5), name=str(number % 2)
        )
        np.testing.assert_allclose(outcome.outputs["y"], x @ weights, rtol=1e-5, atol=1e-6)
        outcome.outputs["y"].fill(0)
        x.fill(0)
        batches.append(outcome.batch)

    for start in range(0, 1000, 250):
        await asyncio.gather(*(one(number) for number in range(start, start + 250)))
    assert len(batches) == 1000
    assert max(batches) > 4
    await until(bench.empty)


@dataclass
class Metered(FakeModel):
    """A model whose runs take simulated processor time, with noise."""

    fixed: float = 0.0
    row: float = 1e-3
    now: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.random = np.random.default_rng(3)

    def run(self, inputs: dict[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        spent = self.fixed + self.row * len(inputs["x"])
        self.now += spent * float(np.exp(self.random.normal(0, 0.2)))
        self.ran.append(np.zeros((len(inputs["x"]), 1)))
        return {"y": inputs["x"] * 2}


@pytest.mark.parametrize("pays", [True, False])
async def test_batches_settle_where_they_pay_and_nowhere_else(bench_of, pays):
    """Sixteen clients, each with one request after the other, on an injected clock."""
    model = Metered(fixed=1e-3, row=1e-4) if pays else Metered(row=1.04e-3)
    bench = bench_of(processor=lambda: model.now)
    settled: list[int] = []

    async def client(number: int) -> None:
        for count in range(200):
            outcome = await bench.ask(number + 16 * count, model=model, options=SAME)
            assert (outcome.outputs["y"] == 2 * (number + 16 * count)).all()
            settled.append(bench.scheduler._lanes["model", False].profile.settled)

    await asyncio.gather(*map(client, range(16)))
    rows = [len(x) for x in model.ran[len(model.ran) // 2 :]]
    changes = [one for one, before in zip(settled[1:], settled, strict=False) if one != before]
    if pays:
        assert settled[-1] >= 8
        assert 1 not in changes
        assert np.mean(rows) > 6
    else:
        assert not changes or (len(changes) == 2 and changes[-1] == 1), (
            "noise alone seldom does it, and not for long"
        )
        assert np.mean(rows) < 2, "looks alone"


async def test_lanes_are_bounded(bench, monkeypatch):
    monkeypatch.setattr(module, "MAX_LANES", 10)
    for number in range(30):
        await bench.ask(number, name=str(number))
    assert len(bench.scheduler._lanes) <= 11
