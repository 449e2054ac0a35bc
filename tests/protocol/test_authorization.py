"""A user's signature: taken to anything else than its own request, it is worth nothing."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.core.encoding import encode
from cloister.core.protocol.authorization import MAX_FIELD, RequestAuthorization, RequestContext
from cloister.core.protocol.limits import CLOCK_SKEW, MAX_REQUEST_LIFETIME
from cloister.errors import AccessRefused, BindingRefused, FormatError
from support.realm import NOW, owner_key

USER, STRANGER = owner_key("user"), owner_key("stranger")
CONTEXT = RequestContext(service=b"s" * 32, pool=b"p" * 32, epoch=3, model="o/m", enc=b"e" * 32)
SIGNED = RequestAuthorization.sign(USER, CONTEXT, statement=b"t" * 32, request_id=b"r" * 16, expiry=NOW + 60)
NAMES = ["user_key", "statement", "request_id", "expiry", "cross", "outside", "signature"]


def altered(**changes: Any) -> RequestAuthorization:
    return dataclasses.replace(SIGNED, **changes)


def refused(authorization: RequestAuthorization, context: RequestContext = CONTEXT) -> None:
    with pytest.raises(BindingRefused) as caught:
        authorization.verify(context, now=NOW)
    assert caught.value.code == "binding.request"


@pytest.mark.parametrize(
    "change",
    [
        {"service": b"t" * 32},
        {"pool": b"q" * 32},
        {"epoch": 2},
        {"epoch": 4},
        {"model": "o/n"},
        {"model": "p/m"},
        {"enc": b"f" * 32},
        {"enc": b"e" * 33},
    ],
    ids=lambda change: next(iter(change)),
)
def test_taken_to_another(change):
    refused(SIGNED, dataclasses.replace(CONTEXT, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"user_key": STRANGER.public},
        {"statement": b"u" * 32},
        {"request_id": b"s" * 16},
        {"expiry": NOW + 61},
        {"allow_cross_user_batching": True},
        {"allow_outside_stages": True},
        {"signature": bytes(64)},
        {"user_key": bytes(32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_altered(change):
    refused(altered(**change))


def test_consents_are_told_apart():
    options = {"statement": b"t" * 32, "request_id": b"r" * 16, "expiry": NOW + 60}
    made = RequestAuthorization.sign(USER, CONTEXT, allow_cross_user_batching=True, **options)
    made.verify(CONTEXT, now=NOW)
    refused(dataclasses.replace(made, allow_cross_user_batching=False, allow_outside_stages=True))


@pytest.mark.parametrize("expiry", [NOW - 1, 0, -1, NOW + MAX_REQUEST_LIFETIME + CLOCK_SKEW + 1, 1 << 60])
def test_expired_or_valid_for_too_long(expiry):
    made = RequestAuthorization.sign(USER, CONTEXT, statement=b"t" * 32, request_id=b"r" * 16, expiry=expiry)
    with pytest.raises(AccessRefused) as caught:
        made.verify(CONTEXT, now=NOW)
    assert caught.value.code == "access.request-expiry"


@pytest.mark.parametrize("expiry", [NOW, NOW + MAX_REQUEST_LIFETIME + CLOCK_SKEW])
def test_bounds_of_the_expiry(expiry):
    RequestAuthorization.sign(USER, CONTEXT, statement=b"t" * 32, request_id=b"r" * 16, expiry=expiry).verify(
        CONTEXT, now=NOW
    )


@given(st.integers(0, 511))
def test_each_bit_of_the_signature_counts(bit):
    raw = bytearray(SIGNED.signature)
    raw[bit // 8] ^= 1 << bit % 8
    refused(altered(signature=bytes(raw)))


# -- the field -----------------------------------------------------------------


def parse_refused(value: bytes) -> None:
    with pytest.raises(FormatError):
        RequestAuthorization.from_field(value)


def field(*values: Any) -> bytes:
    return base64.urlsafe_b64encode(encode(list(values)))


VALUES = [USER.public, b"t" * 32, b"r" * 16, NOW, False, False, bytes(64)]


@pytest.mark.parametrize("position", range(7), ids=NAMES)
@pytest.mark.parametrize("wrong", [None, 1.5, float("nan"), "x", b"x", [], {}, [b"t" * 32]])
def test_each_value_of_another_kind(position, wrong):
    RequestAuthorization.from_field(field(*VALUES))
    parse_refused(field(*VALUES[:position], wrong, *VALUES[position + 1 :]))


def test_truth_values_and_numbers_are_told_apart():
    parse_refused(field(*VALUES[:3], True, *VALUES[4:]))
    parse_refused(field(*VALUES[:4], 1, *VALUES[5:]))
    parse_refused(field(*VALUES[:5], 0, *VALUES[6:]))


@pytest.mark.parametrize("count", range(7))
def test_missing_values(count):
    parse_refused(field(*VALUES[:count]))


@pytest.mark.parametrize(
    "value",
    [b"", b"!", b"a", b"====", b"A" * (MAX_FIELD + 1), b"\xff", field(*VALUES, 1), SIGNED.to_field()[:-1]],
)
def test_no_authorization(value):
    parse_refused(value)


def test_round_trip():
    back = RequestAuthorization.from_field(SIGNED.to_field())
    assert back == SIGNED
    assert back.user == USER.thumbprint
    assert len(SIGNED.to_field()) < MAX_FIELD
    back.verify(CONTEXT, now=NOW)


@given(st.binary(max_size=100) | st.binary(max_size=100).map(base64.urlsafe_b64encode))
def test_any_bytes_give_our_error(value):
    parse_refused(value)
