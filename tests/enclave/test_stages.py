"""The ladder: what an answer paid for it carries, and what the host learns when."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

from cloister.client.client import parse_reuse, parse_stages
from cloister.core.protocol.stages import ANSWERING, BOUNDS, Figures
from cloister.enclave.worker import stages as module
from cloister.enclave.worker.stages import MANY, Ladder, Times, Waits, process_started

STEPS = {"started": 10.0, "began": 11.0, "challenged": 11.5, "attested": 13.0, "released": 17.0}
USUAL = {"decrypt", "queue", "run", "encode", "enclave"}


def times(**changes: Any) -> Times:
    given = {"decrypt": 0.001, "queue": 0.002, "run": 0.004, "encode": 0.008, "enclave": 0.016, "batch": 1}
    return Times(**{**given, **changes})


def test_the_first_answer_is_cold_and_carries_the_start():
    ladder = Ladder(STEPS)
    field = ladder.answered(Waits(open=0.5, build=0.25), times())
    assert parse_reuse(field) == "cold"
    found = parse_stages(field)
    assert found.keys() == USUAL | {"launch", "attest", "release", "open", "build"}
    assert [found[name] for name in ("launch", "attest", "release", "open", "build")] == [
        1000, 2000, 4000, 500, 250
    ]  # fmt: skip
    assert ladder.answered(Waits(), times()).startswith(b"decrypt;dur=1.000, queue;dur=2.000, run;dur=4.000")


def test_a_cold_answer_that_waited_for_newer_keys_too():
    assert parse_stages(Ladder(STEPS).answered(Waits(release=0.5), times()))["release"] == 4500


@pytest.mark.parametrize(
    ("waits", "paid"),
    [
        (Waits(release=1.0), {"release"}),
        (Waits(open=1.0, build=1.0), {"open", "build"}),
        (Waits(wait=1.0), {"wait"}),
    ],
)
def test_a_warm_answer_carries_what_it_waited_for(waits, paid):
    ladder = Ladder(STEPS)
    ladder.answered(Waits(), times())
    field = ladder.answered(waits, times())
    assert (parse_reuse(field), parse_stages(field).keys()) == ("warm", USUAL | paid)


def test_a_hot_answer_carries_none_of_it():
    ladder = Ladder(STEPS)
    ladder.answered(Waits(open=1.0), times())
    field = ladder.answered(Waits(), times(batch=3))
    assert (parse_reuse(field), parse_stages(field).keys()) == ("hot", USUAL)
    assert field.endswith(b"batch;desc=3")


def test_a_system_that_does_not_say_when_the_process_started():
    steps = {name: value for name, value in STEPS.items() if name != "started"}
    assert parse_stages(Ladder(steps).answered(Waits(), times()))["launch"] == 0


def told(ladder: Ladder) -> dict[str, int]:
    data = json.loads(bytes(ladder.answer().body))
    return {name: sum(each.counts) for name, each in Figures.from_data(data).stages.items()}


def test_the_host_learns_of_starts_and_loads_at_once_and_of_answers_many_at_a_time():
    steps: dict[str, float] = {}
    ladder = Ladder(steps)
    assert told(ladder) == {}
    steps.update(STEPS)
    start = {"launch": 1, "attest": 1, "release": 1}
    assert told(ladder) == start
    ladder.answered(Waits(open=1.0, build=1.0, wait=1.0), times())
    ladder.encrypted(0.001)
    assert told(ladder) == {**start, "open": 1, "build": 1}
    for count in range(2, MANY):
        ladder.answered(Waits(), times(run=count))
        ladder.encrypted(0.001)
        assert not told(ladder).keys() & set(ANSWERING)
    ladder.answered(Waits(), times())
    ladder.encrypted(0.001)
    many = dict.fromkeys(ANSWERING, MANY)
    assert told(ladder) == {**start, "open": 1, "build": 1, **many}
    ladder.answered(Waits(), times())
    ladder.encrypted(0.001)
    assert told(ladder) == {**start, "open": 1, "build": 1, **many}


def test_what_the_host_learns_names_no_model_and_no_user():
    ladder = Ladder(STEPS)
    for _ in range(MANY):
        ladder.answered(Waits(), times())
    data = ladder.figures().to_data()
    assert data.keys() == {"age_s", "stages"}
    assert {len(each) for each in data["stages"].values()} == {len(BOUNDS) + 2}


def test_this_process_was_started_a_while_ago():
    started = process_started()
    assert started is not None
    assert 0 < time.monotonic() - started < 3600


ODD = ["", "1 (a) S", "1 (a b) S " + "x " * 30, f"1 (a) S {'0 ' * 18} {2**60} 0"]


@pytest.mark.parametrize("text", ODD)
def test_a_system_that_says_something_else(monkeypatch, tmp_path, text):
    path = tmp_path / "stat"
    path.write_text(text)
    monkeypatch.setattr(module, "Path", lambda name: path)
    assert process_started() is None
    os.unlink(path)
    assert process_started() is None
