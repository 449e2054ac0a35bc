"""Deterministic CBOR: first what is refused, then that one value has one encoding (RFC 8949, 4.2.1)."""

from __future__ import annotations

import math
import struct

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.core.encoding import MAX_DEPTH, MAX_MESSAGE, decode, digest, encode, unpack
from cloister.errors import FormatError

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), (1 << 64) - 1)
    | st.floats()
    | st.binary(max_size=40)
    | st.text(max_size=40),
    lambda items: (
        st.lists(items, max_size=5)
        | st.dictionaries(st.text(max_size=8) | st.binary(max_size=8), items, max_size=5)
    ),
    max_leaves=20,
)


def refused(raw: bytes | str, limit: int = MAX_MESSAGE) -> FormatError:
    with pytest.raises(FormatError) as caught:
        decode(bytes.fromhex(raw) if isinstance(raw, str) else raw, what="thing", limit=limit)
    assert "thing" in str(caught.value)
    return caught.value


def tagged(tag: int) -> bytes:
    for first, size, limit in ((0xD8, 1, 1 << 8), (0xD9, 2, 1 << 16), (0xDA, 4, 1 << 32), (0xDB, 8, 1 << 64)):
        if tag < limit:
            return bytes([0xC0 | tag]) if tag < 24 else bytes([first]) + tag.to_bytes(size, "big")
    raise AssertionError(tag)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("empty", ""),
        ("trailing bytes", "0000"),
        ("truncated array", "8201"),
        ("integer that needs fewer bytes", "1801"),
        ("length that needs fewer bytes", "580141"),
        ("keys out of order", "a2616200616100"),
        ("the same key twice", "a2616100616100"),
        ("indefinite array", "9f01ff"),
        ("indefinite map", "bf616101ff"),
        ("indefinite bytes", "5f4101ff"),
        ("indefinite text", "7f6161ff"),
        ("float that needs fewer bytes", "fb3ff8000000000000"),
        ("NaN with a payload", "f97e01"),
        ("undefined", "f7"),
        ("simple value", "e0"),
        ("text that is not UTF-8", "61ff"),
        ("an integer as a key", "a10102"),
        ("an array as a key", "a1810102"),
        ("reserved additional information", "1c"),
        ("a break alone", "ff"),
    ],
)
def test_refused_encoding(name, raw):
    refused(raw)


@pytest.mark.parametrize(
    "tag", [*range(64), 100, 256, 258, 260, 261, 1004, 43000, 55799, 1 << 32, (1 << 64) - 1]
)
@pytest.mark.parametrize("content", ["00", "40", "60", "80", "a0", "820102", "4201ff"])
def test_no_tag_is_plain_data(tag, content):
    refused(tagged(tag) + bytes.fromhex(content))


def test_a_list_that_holds_itself_is_refused_and_ends():
    refused("d81c81d81d00")


def test_shared_references_do_not_expand():
    """Thirty lists of two references each to the one before would stand for 2**30 items."""
    raw = b"\x81" + tagged(28) + b"\x80"
    for index in range(30):
        raw += tagged(28) + b"\x82" + 2 * (tagged(29) + cbor2.dumps(index))
    refused(b"\x98\x1f" + raw[1:])


def test_a_big_integer_is_no_integer():
    refused(cbor2.dumps(1 << 64))
    refused(cbor2.dumps(-(1 << 64) - 1))


def test_a_big_integer_of_many_digits_gives_our_error():
    refused(encode({"size": 0})[:-1] + cbor2.dumps(1 << 20_000))


def test_too_long_is_refused_before_it_is_decoded():
    error = refused(b"\xff" * 11, limit=10)
    assert (error.claim, error.expected, error.actual) == ("length", "at most 10 B", "11")


def test_a_length_that_is_not_there_allocates_nothing():
    refused("5b7fffffffffffffff")
    refused("9b7fffffffffffffff")


def test_too_deep():
    decode(b"\x81" * (MAX_DEPTH - 2) + b"\x80", what="thing")
    refused(b"\x81" * (MAX_DEPTH + 1) + b"\x80")
    refused(b"\x81" * 100_000)


@given(st.binary(max_size=64))
def test_any_bytes_give_a_value_with_that_encoding_or_our_error(raw):
    try:
        value = decode(raw, what="thing")
    except FormatError:
        return
    assert encode(value) == raw


@given(PLAIN)
def test_round_trip(value):
    raw = encode(value)
    assert encode(decode(raw, what="thing")) == raw
    assert decode(memoryview(raw), what="thing") == decode(bytearray(raw), what="thing") or _has_nan(value)


@given(st.dictionaries(st.text(max_size=6), st.integers(), max_size=6))
def test_order_of_insertion_does_not_matter(value):
    assert digest(value) == digest(dict(reversed(value.items())))


def test_kinds_of_number_are_told_apart():
    assert len({digest(value) for value in (1, 1.0, True, "1", b"1")}) == 5
    assert digest([1, [2]]) != digest([[1], 2])


def test_floats_keep_their_bits():
    for value in (0.0, -0.0, math.inf, 5e-324, 1.1):
        assert struct.pack(">d", decode(encode(value), what="x")) == struct.pack(">d", value)
    assert math.isnan(decode(encode(math.nan), what="x"))


# -- unpack --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "claim"),
    [
        ([], "type"),
        ("text", "type"),
        ({"a": 1}, "fields"),
        ({"a": 1, "b": bytes(2), "c": 0}, "fields"),
        ({"a": 1, b"b": bytes(2)}, "fields"),
        ({"a": True, "b": bytes(2)}, "m.a"),
        ({"a": 1.0, "b": bytes(2)}, "m.a"),
        ({"a": 1, "b": bytes(1)}, "m.b"),
        ({"a": 1, "b": bytes(3)}, "m.b"),
        ({"a": 1, "b": "xx"}, "m.b"),
    ],
)
def test_unpack_refuses(value, claim):
    with pytest.raises(FormatError) as caught:
        unpack(value, "m", a=int, b=2)
    assert caught.value.claim == claim


def test_unpack_takes_the_exact_fields():
    assert unpack({"a": None, "b": b"xy"}, "m", a=(int, type(None)), b=2) == {"a": None, "b": b"xy"}


def _has_nan(value):
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, list):
        return any(map(_has_nan, value))
    return isinstance(value, dict) and any(map(_has_nan, value.values()))
