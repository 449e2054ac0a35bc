"""Secrets and identities: nothing shows them, signatures serve one purpose, users don't link."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.core.identity import SigningKey, derive_user_key, thumbprint, verify_signature
from cloister.core.secret import Secret
from cloister.errors import FormatError, Tampered

SEED = bytes(range(100, 132))


@pytest.fixture
def secret():
    return Secret(SEED)


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r}".format, "%s".__mod__, ascii])
def test_a_secret_is_not_shown(secret, show):
    assert show(secret) == "<Secret, 32 B>"


def test_a_secret_in_a_container_or_a_log_is_not_shown(secret, caplog):
    with caplog.at_level(logging.INFO):
        logging.getLogger("test").info("%s %r", [secret], {"k": secret})
    assert "defg" not in caplog.text
    assert SEED.hex() not in caplog.text


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_secret_is_never_pickled(secret, protocol):
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(secret, protocol)


def test_a_secret_is_not_copied_or_hashed(secret):
    with pytest.raises(TypeError):
        copy.copy(secret)
    with pytest.raises(TypeError):
        copy.deepcopy([secret])
    with pytest.raises(TypeError, match="not hashable"):
        hash(secret)


def test_comparison(secret):
    assert secret == Secret(bytearray(SEED))
    assert secret != Secret(SEED[:-1])
    assert secret != Secret(bytes(32))
    assert secret != SEED


def test_wiping_overwrites_ours_and_nobody_elses():
    source = bytearray(SEED)
    secret = Secret(source)
    shown = secret.reveal()
    secret.wipe()
    assert secret == Secret(bytes(32))
    assert (bytes(source), shown, len(secret)) == (SEED, SEED, 32)


# -- identities ----------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_seed_or_public_key_of_another_length(size):
    with pytest.raises(FormatError):
        SigningKey(Secret(bytes(size)))
    with pytest.raises(FormatError):
        thumbprint(bytes(size))


def test_a_signing_key_shows_its_thumbprint_only():
    key = SigningKey(Secret(SEED))
    assert repr(key) == f"<SigningKey {key.thumbprint.hex()[:16]}>"


def tampered(public: bytes, purpose: str, value: object, signature: bytes) -> None:
    with pytest.raises(Tampered) as caught:
        verify_signature(public, purpose, value, signature)
    assert caught.value.code == "tampered.signature"


def test_a_signature_serves_one_purpose_value_and_key():
    key, other = SigningKey(Secret(SEED)), SigningKey.generate()
    signature = key.sign("request", [1, b"x"])
    verify_signature(key.public, "request", [1, b"x"], signature)
    tampered(key.public, "statement", [1, b"x"], signature)
    tampered(key.public, "request", [1, b"y"], signature)
    tampered(key.public, "request", [True, b"x"], signature)
    tampered(other.public, "request", [1, b"x"], signature)


@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65)])
def test_no_signature(signature):
    tampered(SigningKey(Secret(SEED)).public, "request", 1, signature)


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(32), b"\xff" * 32, bytes(33)])
def test_no_public_key(public):
    """Zeros are a point of low order: a signature that holds for it must not be found here by luck."""
    tampered(public, "request", 1, SigningKey(Secret(SEED)).sign("request", 1))


@given(st.integers(0, 511))
def test_each_bit_of_a_signature_counts(bit):
    key = SigningKey(Secret(SEED))
    altered = bytearray(key.sign("request", 1))
    altered[bit // 8] ^= 1 << bit % 8
    tampered(key.public, "request", 1, bytes(altered))


def test_a_user_has_another_key_at_each_owner():
    secret = Secret(SEED)
    keys = {derive_user_key(secret, owner * 32).public for owner in (b"a", b"b", b"c")}
    assert len(keys) == 3
    assert derive_user_key(secret, b"a" * 32).public in keys
    assert derive_user_key(Secret(bytes(32)), b"a" * 32).public not in keys
