from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.ohttp import kem, keyconfig
from cloister.core.ohttp.hpke import (
    WIRE_SUITES,
    X25519_HKDF_SHA256_AES256GCM,
    XWING_HKDF_SHA256_AES256GCM,
    generate_private_key,
)
from cloister.core.ohttp.keyconfig import KeyConfiguration, decode_list, encode_list, select
from cloister.errors import FormatError, Refused

from . import vectors

X25519 = KeyConfiguration.for_key(1, generate_private_key(kem.X25519_HKDF_SHA256))
XWING = KeyConfiguration.for_key(2, generate_private_key(kem.XWING))
ENCODED = X25519.to_bytes()


def refused(data: bytes) -> str:
    with pytest.raises(FormatError) as refusal:
        KeyConfiguration.from_bytes(data)
    assert refusal.value.code == "ohttp.keys"
    return refusal.value.claim


# --- refusals


@pytest.mark.parametrize("length", range(len(ENCODED)))
def test_a_truncated_configuration_is_refused(length: int) -> None:
    refused(ENCODED[:length])


def test_trailing_bytes_are_refused() -> None:
    assert refused(ENCODED + b"\x00") == "key configuration"


def test_an_unknown_kem_is_refused() -> None:
    assert refused(b"\x01\x00\x10" + ENCODED[3:]) == "KEM"


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 4 * 64 + 4], ids=str)
def test_a_length_of_symmetric_algorithms_that_is_not_allowed_is_refused(length: int) -> None:
    assert refused(ENCODED[:35] + length.to_bytes(2, "big") + bytes(length)) == "symmetric algorithms"


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"key_id": 256}, "key id"),
        ({"key_id": -1}, "key id"),
        ({"kem_id": 0x0010}, "KEM"),
        ({"public_key": bytes(31)}, "public key"),
        ({"symmetric": ()}, "symmetric algorithms"),
        ({"symmetric": ((1, 2),) * 65}, "symmetric algorithms"),
        ({"symmetric": ((1 << 16, 2),)}, "KDF"),
        ({"symmetric": ((1, 1 << 16),)}, "AEAD"),
    ],
)
def test_a_value_out_of_range_is_refused(change: dict[str, object], claim: str) -> None:
    with pytest.raises(FormatError) as refusal:
        replace(X25519, **change)  # type: ignore[arg-type]
    assert (refusal.value.code, refusal.value.claim) == ("ohttp.keys", claim)


@pytest.mark.parametrize("pair", [(1, 1), (1, 3), (2, 2)], ids=["AES-128-GCM", "ChaCha20", "HKDF-SHA384"])
def test_a_configuration_off_the_wire_list_is_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(Refused) as refusal:
        replace(X25519, symmetric=(pair,)).preferred_suite()
    assert refusal.value.code == "ohttp.suite"
    assert str(X25519_HKDF_SHA256_AES256GCM) in refusal.value.expected
    assert f"{pair[0]:#06x}/{pair[1]:#06x}" in refusal.value.actual


def test_an_empty_list_offers_nothing() -> None:
    with pytest.raises(Refused) as refusal:
        select([])
    assert refusal.value.code == "ohttp.suite"


def test_a_list_that_ends_within_a_configuration_is_refused() -> None:
    data = encode_list([X25519, XWING])
    for length in (1, 2, 20, len(data) - 1):
        with pytest.raises(FormatError):
            decode_list(data[:length])


def test_a_list_beyond_the_limit_is_refused() -> None:
    with pytest.raises(FormatError):
        decode_list(bytes(keyconfig.MAX_LIST + 1))
    with pytest.raises(FormatError):
        encode_list([XWING] * 60)


@given(data=st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: ENCODED[:37] + tail))
@settings(deadline=None)
def test_any_bytes_give_a_value_or_our_error(data: bytes) -> None:
    for parse in (KeyConfiguration.from_bytes, decode_list):
        try:
            value = parse(data)
        except FormatError:
            continue
        if isinstance(value, KeyConfiguration):
            assert value.to_bytes() == data


# --- what it is for


def test_rfc_9458_configuration() -> None:
    configuration = KeyConfiguration.from_bytes(bytes.fromhex(vectors.OHTTP["configuration"]))
    assert configuration.key_id == 1
    assert configuration.kem_id == 0x0020
    assert configuration.symmetric == ((1, 1), (1, 3))
    assert configuration.to_bytes().hex() == vectors.OHTTP["configuration"]


def test_a_list_makes_the_round_trip_in_its_order() -> None:
    assert decode_list(encode_list([X25519, XWING])) == (X25519, XWING)
    assert decode_list(b"") == ()


def test_unknown_kems_in_a_list_are_left_out() -> None:
    unknown = b"\x07\x00\x10" + bytes(65) + b"\x00\x04\x00\x01\x00\x01"
    data = len(unknown).to_bytes(2, "big") + unknown + encode_list([XWING])
    assert decode_list(data) == (XWING,)


@pytest.mark.parametrize("order", [(X25519, XWING), (XWING, X25519)], ids=["last", "first"])
def test_the_post_quantum_hybrid_is_selected_wherever_it_stands(order: tuple[KeyConfiguration, ...]) -> None:
    assert select(order) == (XWING, XWING_HKDF_SHA256_AES256GCM)


def test_a_configuration_is_published_with_the_wire_suites_of_its_kem() -> None:
    assert [c.preferred_suite() for c in (XWING, X25519)] == list(WIRE_SUITES)
    assert X25519.symmetric == ((1, 2),)
