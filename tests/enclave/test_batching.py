"""Whether a batch pays, what may be joined, and how results are compared."""

from __future__ import annotations

import numpy as np
import pytest

from cloister.enclave.worker.batching import (
    COMPARE,
    FORGET,
    GAIN,
    MAX_ROWS,
    MAX_SECONDS,
    TRIALS,
    Profile,
    batch_key,
    differ,
    join,
    part,
    same,
    wipe_arrays,
)

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def learned(cost: dict[int, float], runs: int = 60) -> Profile:
    """A profile of a model whose rows cost so many seconds in batches of so many."""
    profile = Profile()
    for _ in range(runs):
        profile.record(1, cost[1])
        if profile.limit > 1:
            profile.record(profile.limit, profile.limit * cost[profile.limit])
    if profile._runs % COMPARE == 0:
        profile.record(1, cost[1])
    return profile


def test_alone_first():
    profile = Profile()
    assert profile.limit == 1
    for _ in range(TRIALS):
        assert profile.limit == 1
        profile.record(1, 1e-3)
    assert profile.limit == 2


@pytest.mark.parametrize(
    ("cost", "limit"),
    [
        ({1: 10e-6, 2: 9e-6, 4: 4e-6, 8: 2e-6, 16: 1e-6, 32: 0.8e-6, 64: 0.7e-6}, 64),
        ({1: 10e-6, 2: 11e-6, 4: 4e-6, 8: 4.1e-6, 16: 4.2e-6}, 4),  # one useless step is no reason to stop
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
    assert learned(cost).limit == limit
    assert GAIN < 1
    assert max(cost) * cost[max(cost)] <= MAX_SECONDS


def test_it_is_tried_again_later():
    profile = learned({1: 1e-3, 2: 1.1e-3, 4: 1.1e-3})
    assert profile.limit == 1
    limits = set()
    for _ in range(FORGET + 1):
        profile.record(1, 1e-3)
        limits.add(profile.limit)
    assert limits == {1, 2}
    assert profile.on_trial(2)


def test_what_was_slow_only_once_is_found_out():
    """Other work made the first requests slow; every so often one runs alone, and tells."""
    profile = Profile()
    for _ in range(TRIALS):
        profile.record(1, 3e-3)
    for _ in range(200):
        profile.record(profile.limit, profile.limit * 1e-3)
    assert profile.limit == 1 or profile._runs % COMPARE == 0
    assert profile._costs[0] == 1e-3


def test_refused_for_good():
    profile = Profile()
    profile.refuse()
    for _ in range(2 * FORGET):
        profile.record(1, 1e-3)
        assert profile.limit == 1


def test_a_model_is_on_trial_until_its_results_agreed():
    profile = learned({2**n: 1e-6 / 2**n for n in range(7)})
    assert profile.limit == MAX_ROWS
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
