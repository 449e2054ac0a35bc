"""Stages: counts in buckets, what was counted since, and forms that are none."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.client.client import parse_batch, parse_reuse, parse_stages
from cloister.core.protocol.stages import BOUNDS, MAX_COUNT, Figures, Histogram, server_timing
from cloister.errors import FormatError


def counted(*seconds: float) -> Histogram:
    made = Histogram()
    for each in seconds:
        made.observe(each)
    return made


def test_buckets():
    made = counted(0.0, BOUNDS[0], BOUNDS[0] * 1.01, BOUNDS[-1], BOUNDS[-1] + 1)
    assert (made.counts[0], made.counts[1], made.counts[-2], made.counts[-1]) == (2, 1, 1, 1)
    assert sum(made.counts) == 5
    assert list(BOUNDS) == sorted(BOUNDS)


def test_what_was_counted_since():
    before, now = counted(0.1, 0.2), counted(0.1, 0.2, 5.0)
    new = now.since(before)
    assert (sum(new.counts), round(new.seconds, 6)) == (1, 5.0)
    assert before.since(now).counts == before.counts  # it began anew


def test_there_and_back():
    figures = Figures(age=3.25, stages={"run": counted(0.001, 0.5), "open": counted(2.0)})
    assert Figures.from_data(json.loads(json.dumps(figures.to_data()))) == figures


RUN = Figures(age=1, stages={"run": counted(0.001)}).to_data()


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"age_s": 1},
        {**RUN, "more": 1},
        {**RUN, "age_s": -1},
        {**RUN, "age_s": math.nan},
        {**RUN, "age_s": math.inf},
        {**RUN, "age_s": "1"},
        {**RUN, "stages": {"model-x": RUN["stages"]["run"]}},
        {**RUN, "stages": {"run": RUN["stages"]["run"][:-1]}},
        {**RUN, "stages": {"run": [*RUN["stages"]["run"], 1]}},
        {**RUN, "stages": {"run": [*RUN["stages"]["run"][:-2], -1, 1.0]}},
        {**RUN, "stages": {"run": [*RUN["stages"]["run"][:-2], True, 1.0]}},
        {**RUN, "stages": {"run": [*RUN["stages"]["run"][:-2], MAX_COUNT + 1, 1.0]}},
        {**RUN, "stages": {"run": [*RUN["stages"]["run"][:-1], math.nan]}},
        {**RUN, "stages": {"run": [*RUN["stages"]["run"][:-1], "1"]}},
        {**RUN, "stages": {"run": {}}},
        {**RUN, "stages": []},
    ],
)
def test_what_is_none(data):
    with pytest.raises(FormatError) as caught:
        Figures.from_data(data)
    assert caught.value.code == "format.stages"


json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=15) | st.dictionaries(st.sampled_from(["age_s", "stages", "run"]), inner)
    ),
    max_leaves=20,
)


@given(json_data)
def test_anything_is_figures_or_refused(data):
    with contextlib.suppress(FormatError):
        assert Figures.from_data(data).age >= 0


def test_the_field_is_read_back():
    field = server_timing([("decrypt", 0.0015), ("run", 0.25)], reuse="warm", batch=4)
    assert field == b"decrypt;dur=1.500, run;dur=250.000, reuse;desc=warm, batch;desc=4"
    assert parse_stages(field) == {"decrypt": 1.5, "run": 250.0}
    assert (parse_reuse(field), parse_batch(field)) == ("warm", 4)


@pytest.mark.parametrize("field", [None, b"", b"reuse;desc=", b"reuse;desc=tepid", b"\xff;desc=hot"])
def test_a_step_that_is_none(field):
    assert parse_reuse(field) == ""
