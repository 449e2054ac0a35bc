"""Whether a batch pays, what may be joined, and how results are compared."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from cloister.enclave.worker.batching import (
    GAIN,
    KEEP,
    MAX_ROWS,
    MAX_WAIT,
    NEAR,
    PAIRS,
    TRIALS,
    WAIT,
    Profile,
    batch_key,
    differ,
    join,
    part,
    same,
    wipe_arrays,
)

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@dataclass
class Machine:
    """A thread that runs what waits, on a clock of its own, and a profile that learns from it.

    Args:
        cost: Rows of a batch -> seconds that it runs on an idle machine.
        noise: Spread of single runs, as a part of what they take.
        slow: How much slower the machine is at a time.
        clients: That ask at once, each one row at a time.
        eager: Whether all of them wait already when a thread is free; else a random part.
    """

    cost: Callable[[int], float]
    noise: float = 0.0
    slow: Callable[[float], float] = lambda now: 1.0
    clients: int = 16
    eager: bool = True
    seed: int = 1
    now: float = 0.0
    rows: int = 0
    batches: int = 0
    profile: Profile = field(default_factory=Profile)
    changes: list[int] = field(default_factory=lambda: [1])  # what was settled, one after the other

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def run(self, runs: int) -> Machine:
        for _ in range(runs):
            waiting = self.clients if self.eager else int(self.random.integers(1, self.clients + 1))
            rows = min(self.profile.limit, waiting)
            spread = float(np.exp(self.random.normal(0, self.noise))) if self.noise else 1.0
            if self.noise and self.random.random() < 0.02:
                spread *= 5  # something else ran meanwhile, and took the caches
            seconds = self.cost(rows) * self.slow(self.now) * spread
            self.profile.record(rows, seconds)
            self.now += seconds
            self.rows += rows
            self.batches += rows > 1
            if self.profile.settled != self.changes[-1]:
                self.changes.append(self.profile.settled)
        return self


def table(rows: dict[int, float]) -> Callable[[int], float]:
    """Seconds of a run, from those of one row in batches of so many."""
    return lambda count: count * rows[1 << (count - 1).bit_length()]


def test_alone_first():
    profile = Profile()
    for _ in range(NEAR):
        assert profile.limit == 1
        profile.record(1, 1e-3)
    assert profile.limit == 2
    profile.record(2, 2e-3)
    assert profile.limit == 1
    profile.record(1, 1e-3)
    assert profile.limit == 2


@pytest.mark.parametrize(
    ("cost", "limit"),
    [
        ({1: 10e-6, 2: 9e-6, 4: 4e-6, 8: 2e-6, 16: 1e-6, 32: 0.8e-6, 64: 0.7e-6}, 64),
        (
            {1: 10e-6, 2: 11e-6, 4: 4e-6, 8: 4.1e-6, 16: 4.2e-6, 32: 4.2e-6, 64: 4.2e-6},
            4,
        ),  # one useless step is no reason to stop
        ({1: 1e-3, 2: 1.1e-3, 4: 1.07e-3}, 1),  # as MobileNetV1 on the machine of docs/benchmarks.md
        (
            {1: 1e-3, 2: 0.95e-3, 4: 0.94e-3, 8: 0.93e-3, 16: 0.92e-3, 32: 0.93e-3, 64: 0.93e-3},
            1,
        ),  # too little
        ({1: 20e-3, 2: 5e-3, 4: 4e-3, 8: 3.9e-3, 16: 3.8e-3}, 16),
        ({1: 60e-3}, 1),  # two would run for longer than is allowed
    ],
)
def test_it_is_used_where_it_pays(cost, limit):
    machine = Machine(table(cost), clients=64).run(10 * WAIT)
    assert machine.profile.settled == limit
    assert machine.changes == ([1] if limit == 1 else [1, limit])
    assert GAIN < KEEP < 1


DAY_NIGHT = {
    "a steady machine": lambda now: 1.0,
    "a machine that is slower every other second": lambda now: 1.0 + 0.8 * (int(now) % 2),
    "a machine that gets slower and faster": lambda now: 1.0 + 0.5 * math.sin(now / 3),
}


@pytest.mark.parametrize("slow", DAY_NIGHT.values(), ids=DAY_NIGHT)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.05, 0.25])
def test_noise_never_turns_on_what_costs(slow, seed, noise):
    """Rows of MobileNetV1 cost a few percent more together than alone."""
    for row in (1.0, 1.04):
        cost = functools.partial(batch_of, fixed=0.0, row=row * 3e-3)
        machine = Machine(cost, noise=noise, slow=slow, seed=seed, eager=False).run(20_000)
        assert machine.changes == [1]
        assert machine.batches < 20_000 * 0.05


@pytest.mark.parametrize("slow", DAY_NIGHT.values(), ids=DAY_NIGHT)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.05, 0.25])
def test_noise_never_turns_off_what_pays(slow, seed, noise):
    """A run has a price of its own, as where all weights are read for one row."""
    cost = functools.partial(batch_of, fixed=1e-3, row=1e-4)
    machine = Machine(cost, noise=noise, slow=slow, seed=seed).run(20_000)
    assert machine.profile.settled >= 8
    assert 1 not in machine.changes[1:]
    assert len(machine.changes) <= 4  # it may still find a better size
    assert machine.rows > 20_000 * 6


def batch_of(rows: int, *, fixed: float, row: float) -> float:
    return fixed + row * rows


def test_looks_become_rare_and_are_bounded():
    machine = Machine(functools.partial(batch_of, fixed=0.0, row=1e-3)).run(8 * MAX_WAIT)
    before = machine.batches
    machine.run(2 * MAX_WAIT)
    assert 0 < machine.batches - before <= 3 * 2 * PAIRS


def test_a_model_that_changes_is_noticed():
    """Such as when other inputs come: what paid for one row in each request may not pay for large ones."""
    machine = Machine(functools.partial(batch_of, fixed=1e-3, row=1e-4)).run(5_000)
    assert machine.profile.settled >= 8
    machine.cost = functools.partial(batch_of, fixed=0.0, row=1e-3)
    machine.run(2 * MAX_WAIT)
    assert machine.profile.settled == 1
    machine.cost = functools.partial(batch_of, fixed=1e-3, row=1e-4)
    machine.run(3 * MAX_WAIT)
    assert machine.profile.settled >= 8


def test_sizes_that_never_come_together_end_a_look():
    machine = Machine(functools.partial(batch_of, fixed=1e-3, row=1e-4), clients=3).run(5_000)
    assert machine.profile.settled == 4
    assert not machine.profile._looking or machine.profile._batches > 0


def test_without_company_nothing_is_decided():
    profile = Profile()
    for _ in range(10_000):
        profile.record(1, 1e-3)
    assert (profile.settled, profile.limit) == (1, 2)


def test_a_clock_that_stands_still():
    machine = Machine(lambda rows: 0.0).run(1_000)
    assert machine.profile.settled == 1


def test_slow_runs_of_the_first_moment_do_not_count_for_long():
    """Other work made the first requests slow; later looks find that nothing is gained."""
    machine = Machine(
        functools.partial(batch_of, fixed=0.0, row=1e-3), slow=lambda now: 3.0 if now < 0.02 else 1.0
    ).run(5_000)
    assert machine.profile.settled == 1


def test_refused_for_good():
    profile = Profile()
    profile.refuse()
    for _ in range(4 * WAIT):
        profile.record(1, 1e-3)
        assert profile.limit == 1


def test_a_model_is_on_trial_until_its_results_agreed():
    profile = Machine(table({2**n: 1e-6 / 2**n for n in range(7)}), clients=64).run(1_000).profile
    assert profile.settled == MAX_ROWS
    for _ in range(TRIALS):
        assert profile.on_trial(8)
        profile.agree()
    assert not profile.on_trial(8)
    assert Profile().on_trial(2)


def test_keys():
    key, rows = batch_key({"a": X, "b": X[:, :2]}, ("y",)) or (None, 0)
    assert rows == 2
    assert batch_key({"b": X[:1, :2], "a": X[:1]}, ("y",)) == (key, 1)
    for other in (
        batch_key({"a": X, "b": X}, ("y",)),
        batch_key({"a": X, "b": X[:, :2]}, ()),
        batch_key({"a": X, "c": X[:, :2]}, ("y",)),
    ):
        assert other is not None
        assert other[0] != key


@pytest.mark.parametrize(
    "inputs",
    [{"a": X, "b": X[:1]}, {"a": X[:0]}, {}, {"a": np.zeros((MAX_ROWS, 1))}],
    ids=["different rows", "no rows", "no inputs", "a batch of its own"],
)
def test_what_runs_alone(inputs):
    assert batch_key(inputs, ()) is None


def test_joined_and_parted():
    text = np.array([[b"a"], [b"bc"]], dtype=object)
    requests = [{"x": X, "t": text}, {"x": X[:1] + 1, "t": text[:1]}]
    joined = join(requests)
    assert joined["x"].shape == (3, 4)
    parts = part(joined, [2, 1])
    assert parts is not None
    for got, request in zip(parts, requests, strict=True):
        assert all(np.array_equal(got[name], request[name]) for name in request)
    assert not np.shares_memory(joined["x"], X)
    assert part({"y": X}, [1]) is None
    assert part({"y": X, "z": X[:1]}, [1, 1]) is None
    assert part({"y": np.float32(1) * np.ones(())}, [1, 1]) is None


def test_differ():
    assert differ([{"x": X}, {"x": X + 1}])
    assert differ([{"x": X}, {"x": X[:1]}])
    assert not differ([{"x": X}, {"x": X.copy()}])


@pytest.mark.parametrize(
    ("other", "agrees"),
    [
        (X, True),
        (X * np.float32(1 + 1e-6), True),
        (X + np.float32(1e-6), True),
        (X * np.float32(1.01), False),
        (X[::-1], False),
        (X[:1], False),
        (X.astype(np.float64), False),
        (np.where(X == 3, np.nan, X).astype(np.float32), False),
    ],
)
def test_same(other, agrees):
    assert same({"y": X}, {"y": other}) is agrees


def test_same_of_other_kinds():
    odd = np.array([np.nan, np.inf, -np.inf, 1], np.float16)
    assert same({"y": odd}, {"y": odd.copy()})
    assert not same({"y": odd}, {"y": odd[::-1]})
    labels = np.array([1, 2, 3])
    assert same({"y": labels}, {"y": labels.copy()})
    assert not same({"y": labels}, {"y": labels + 1})
    text = np.array(["a", "b"], dtype=object)
    assert same({"y": text}, {"y": text.copy()})
    assert not same({"y": text}, {"y": text[::-1]})
    assert not same({"y": X}, {"z": X})


def test_wiping():
    arrays = {
        "f": X.copy(),
        "h": np.ones((2, 3), np.float16)[:, ::2],
        "b": np.ones(3, np.bool_),
        "t": np.array([b"a"], dtype=object),
        "n": np.ones(()),
        "e": np.ones((0, 3)),
    }
    frozen = np.frombuffer(b"abc", np.uint8)
    wipe_arrays({**arrays, "frozen": frozen})
    assert not any(array.astype(bool).any() for array in arrays.values())
    assert bytes(frozen) == b"abc"
