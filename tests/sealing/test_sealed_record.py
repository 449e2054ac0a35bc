"""Sealed records: each part of the place a record belongs to is refused when it is another."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from hypothesis import given
from hypothesis import strategies as st

from cloister.core.sealing import open_record, seal_record
from cloister.core.sealing.records import MAX_RECORD, MAX_VERSION, OVERHEAD
from cloister.core.secret import Secret
from cloister.errors import Tampered, UsageError

KEY = Secret(b"r" * 32)
PLACE = {"service": b"s" * 32, "table": "models", "record_key": b"o/m", "version": 3}


@pytest.mark.parametrize(
    "change",
    [
        {"service": b"t" * 32},
        {"service": "s" * 32},
        {"table": "model"},
        {"record_key": b"o/n"},
        {"record_key": "o/m"},
        {"version": 2},
        {"version": 4},
        {"table": "modelso", "record_key": b"/m"},
    ],
    ids=str,
)
def test_record_of_another_place(change):
    sealed = seal_record(KEY, **PLACE, plaintext=b"state")
    with pytest.raises(Tampered) as caught:
        open_record(KEY, **{**PLACE, **change}, sealed=sealed)
    assert caught.value.code == "sealing.record"


def test_record_under_another_key():
    sealed = seal_record(KEY, **PLACE, plaintext=b"state")
    with pytest.raises(Tampered) as caught:
        open_record(Secret(b"q" * 32), **PLACE, sealed=sealed)
    assert caught.value.code == "sealing.record"


@pytest.mark.parametrize("position", [0, 11, 12, 16, -1])
def test_flipped_bit(position):
    sealed = bytearray(seal_record(KEY, **PLACE, plaintext=b"state"))
    sealed[position] ^= 0x80
    with pytest.raises(Tampered):
        open_record(KEY, **PLACE, sealed=bytes(sealed))


@pytest.mark.parametrize("length", [0, 11, 12, OVERHEAD - 1, OVERHEAD, OVERHEAD + 4])
def test_cut_record(length):
    with pytest.raises(Tampered):
        open_record(KEY, **PLACE, sealed=seal_record(KEY, **PLACE, plaintext=b"state")[:length])


def test_extended_record():
    with pytest.raises(Tampered):
        open_record(KEY, **PLACE, sealed=seal_record(KEY, **PLACE, plaintext=b"state") + b"\0")


def test_record_that_is_too_long():
    with pytest.raises(UsageError) as caught:
        seal_record(KEY, **PLACE, plaintext=bytes(MAX_RECORD + 1))
    assert caught.value.code == "sealing.record-size"
    with pytest.raises(Tampered):
        open_record(KEY, **PLACE, sealed=bytes(OVERHEAD + MAX_RECORD + 1))


@pytest.mark.parametrize("version", [-1, MAX_VERSION + 1, True, 1.0, None])
def test_version_out_of_bounds(version):
    with pytest.raises(UsageError) as caught:
        seal_record(KEY, **{**PLACE, "version": version}, plaintext=b"")
    assert caught.value.code == "sealing.record-version"


def test_name_that_is_no_text():
    with pytest.raises(UsageError) as caught:
        seal_record(KEY, **{**PLACE, "record_key": "\ud800"}, plaintext=b"")
    assert caught.value.code == "sealing.record-name"


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_key_of_another_length(size):
    for call in (
        lambda key: seal_record(key, **PLACE, plaintext=b""),
        lambda key: open_record(key, **PLACE, sealed=bytes(OVERHEAD)),
    ):
        with pytest.raises(UsageError) as caught:
            call(Secret(bytes(size)))
        assert caught.value.code == "sealing.key-size"


@given(plaintext=st.binary(max_size=300), version=st.integers(0, MAX_VERSION))
def test_round_trip(plaintext, version):
    place = {**PLACE, "version": version}
    sealed = seal_record(KEY, **place, plaintext=plaintext)
    assert len(sealed) == len(plaintext) + OVERHEAD
    assert open_record(KEY, **place, sealed=memoryview(sealed)) == plaintext


def test_same_record_twice_looks_different():
    assert seal_record(KEY, **PLACE, plaintext=b"state") != seal_record(KEY, **PLACE, plaintext=b"state")


@given(st.binary(max_size=100))
def test_any_bytes_are_refused(data):
    with pytest.raises(Tampered):
        open_record(KEY, **PLACE, sealed=data)


def test_cipher_is_that_of_rfc_8452():
    """RFC 8452, appendix C.2 (AEAD_AES_256_GCM_SIV), third vector: the cipher we rely on, not our framing."""
    key = bytes.fromhex("01" + "00" * 31)
    nonce = bytes.fromhex("03" + "00" * 11)
    sealed = AESGCMSIV(key).encrypt(nonce, bytes.fromhex("010000000000000000000000"), None)
    assert sealed.hex() == "9aab2aeb3faa0a34aea8e2b18ca50da9ae6559e48fd10f6e5c9ca17e"
