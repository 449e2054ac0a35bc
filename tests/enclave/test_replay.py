"""The worker's memory of requests: copies are refused until their signatures expire, and it is bounded."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.enclave.worker.replay import ReplayGuard
from cloister.errors import Overloaded, Replayed

FIELDS = {"enc": b"e" * 32, "user": b"u" * 32, "request_id": b"r" * 16, "expiry": 100, "now": 50}


def admit(guard: ReplayGuard, **changes: object) -> None:
    guard.admit(**{**FIELDS, **changes})


def refused(guard: ReplayGuard, **changes: object) -> None:
    with pytest.raises(Replayed) as caught:
        admit(guard, **changes)
    assert caught.value.code == "replayed.request"


def test_a_copy():
    guard = ReplayGuard()
    admit(guard)
    refused(guard)
    refused(guard, now=100)


def test_the_same_encapsulation_with_anything_else():
    guard = ReplayGuard()
    admit(guard)
    refused(guard, user=b"v" * 32, request_id=b"s" * 16, expiry=400)


def test_the_same_request_id_of_the_same_user_in_another_encapsulation():
    guard = ReplayGuard()
    admit(guard)
    refused(guard, enc=b"f" * 32)
    admit(guard, enc=b"f" * 32, user=b"v" * 32)
    admit(guard, enc=b"g" * 32, request_id=b"s" * 16)


def test_forgotten_only_once_the_signature_has_expired():
    guard = ReplayGuard()
    admit(guard)
    refused(guard, now=100)
    admit(guard, now=101, expiry=300)
    assert len(guard) == 1


def test_a_refused_copy_does_not_prolong_or_shorten_the_memory():
    guard = ReplayGuard()
    admit(guard)
    refused(guard, expiry=1000)
    assert len(guard) == 1
    admit(guard, enc=b"f" * 32, request_id=b"s" * 16, now=101, expiry=200)
    assert len(guard) == 1


def test_capacity():
    guard = ReplayGuard(capacity=3)
    for number in range(3):
        admit(guard, enc=bytes([number]) * 32, request_id=bytes([number]) * 16, expiry=100 + number)
    with pytest.raises(Overloaded):
        admit(guard, enc=b"x" * 32, request_id=b"x" * 16)
    refused(guard, enc=bytes(32))  # a copy is a copy, even then
    admit(guard, enc=b"x" * 32, request_id=b"x" * 16, now=101, expiry=200)
    assert len(guard) == 3


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30), st.integers(0, 5)), max_size=60))
def test_against_a_plain_model(steps):
    guard, seen, now = ReplayGuard(), {}, 0
    for name, lifetime, pause in steps:
        now += pause
        enc = bytes([name]) * 32
        alive = enc in seen and seen[enc] >= now
        try:
            guard.admit(enc=enc, user=os.urandom(32), request_id=bytes(16), expiry=now + lifetime, now=now)
        except Replayed:
            assert alive
        else:
            assert not alive
            seen[enc] = now + lifetime


def test_what_waited_until_its_copy_was_forgotten():
    """The host lets a request wait, has its copy answered and forgotten, and then lets it go on."""
    guard = ReplayGuard()
    admit(guard)
    admit(guard, enc=b"f" * 32, request_id=b"s" * 16, now=101, expiry=300)  # forgets the first
    with pytest.raises(Replayed) as caught:
        admit(guard, now=50)  # with the time that it noted before it waited
    assert caught.value.code == "replayed.expired"
