"""Owner statements: signed by the model's owner, for one service; grants that expire; plain numbers only."""

from __future__ import annotations

import dataclasses
import math

import pytest

from cloister.core.encoding import decode, encode
from cloister.core.protocol.statement import SignedStatement, Statement, model_id, owner_of
from cloister.errors import AccessRefused, FormatError, Tampered, UsageError
from support.realm import KEY_SERVICE, NOW, WORKER, owner_key, policy, statement

SERVICE = b"s" * 32
OWNER, STRANGER = owner_key(), owner_key("stranger")
SAID = statement(SERVICE, grants={b"u" * 32: NOW + 10})
SIGNED = SignedStatement.sign(SAID, OWNER)


def test_only_the_owner_can_sign():
    with pytest.raises(UsageError):
        SignedStatement.sign(SAID, STRANGER)


def test_signed_by_somebody_else_with_a_key_of_their_own():
    text = SAID.to_bytes()
    forged = SignedStatement(text=text, owner_key=STRANGER.public, signature=STRANGER.sign("statement", text))
    with pytest.raises(AccessRefused) as caught:
        forged.open()
    assert caught.value.code == "access.owner"
    assert caught.value.expected == OWNER.thumbprint.hex()


@pytest.mark.parametrize(
    "change",
    [
        {"text": dataclasses.replace(SAID, version=2).to_bytes()},
        {"text": dataclasses.replace(SAID, grants={}).to_bytes()},
        {"text": dataclasses.replace(SAID, service=bytes(32)).to_bytes()},
        {"text": SAID.to_bytes()[:-1]},
        {"owner_key": STRANGER.public},
        {"owner_key": bytes(32)},
        {"signature": bytes(64)},
        {"signature": OWNER.sign("request", SAID.to_bytes())},
        {"signature": OWNER.sign("statement", SAID.to_bytes() + b"x")},
    ],
)
def test_altered(change):
    with pytest.raises(Tampered):
        dataclasses.replace(SIGNED, **change).open()


def test_a_signed_text_that_is_no_statement():
    for text in (b"", b"\x00", encode({"model": SAID.model})):
        with pytest.raises(FormatError):
            SignedStatement(text=text, owner_key=OWNER.public, signature=OWNER.sign("statement", text)).open()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1.5, -0.0, True])
@pytest.mark.parametrize("field", ["max_age", "isv_prod_id", "min_isv_svn", "min_tcb_evaluation"])
@pytest.mark.parametrize("which", ["release_policy", "key_service"])
def test_a_policy_holds_whole_numbers(which, field, wrong):
    data = decode(SAID.to_bytes(), what="statement")
    data[which][field] = wrong
    with pytest.raises(UsageError):
        Statement.from_bytes(encode(data))


@pytest.mark.parametrize("which", ["release_policy", "key_service"])
@pytest.mark.parametrize(
    "change",
    [
        {"mr_enclave": []},
        {"mr_enclave": [bytes(31)]},
        {"mr_enclave": [WORKER, KEY_SERVICE]},  # not sorted
        {"allowed_tcb": ["Revoked"]},
        {"tee": "none"},
        {"any_platform": False},
        {"attributes_mask": bytes(16)},
        {"dangerous_simulated_roots": b"root"},
        {"kind": "cloister/v2/appraisal-policy"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_policy_that_is_none(which, change):
    data = decode(SAID.to_bytes(), what="statement")
    data[which].update(change)
    with pytest.raises(UsageError):
        Statement.from_bytes(encode(data))


def test_grants():
    SAID.require_grant(b"u" * 32, NOW)
    SAID.require_grant(b"u" * 32, NOW + 9)
    for user, now, code in (
        (b"v" * 32, NOW, "access.grant"),
        (b"", NOW, "access.grant"),
        (b"u" * 32, NOW + 10, "access.expired"),
        (b"u" * 32, NOW + 99, "access.expired"),
    ):
        with pytest.raises(AccessRefused) as caught:
            SAID.require_grant(user, now)
        assert caught.value.code == code


@pytest.mark.parametrize("name", ["", ".", "A", "a/b", "a b", "-a", "a" * 129, "ä", "a\n", "..", "a\0"])
def test_a_name_that_is_none(name):
    with pytest.raises(UsageError):
        model_id(OWNER.thumbprint, name)
    with pytest.raises(UsageError):
        owner_of(f"{OWNER.thumbprint.hex()}/{name}")


@pytest.mark.parametrize(
    "model",
    ["", "/", "digits", "xyz/digits", f"{'0' * 62}/m", f"{'0' * 66}/m", f"{'AB' * 32}/m", f" {'0' * 63}/m"],
)
def test_a_model_id_that_is_none(model):
    with pytest.raises(FormatError):
        owner_of(model)


def test_digest_names_every_field():
    other = policy(b"o" * 32)
    changes = [
        {"service": bytes(32)},
        {"model": model_id(OWNER.thumbprint, "other")},
        {"version": 2},
        {"previous": b"p" * 32},
        {"sealed_model": dataclasses.replace(SAID.sealed_model, size=1001)},
        {"release_policy": other},
        {"key_service": other},
        {"plan": bytes(32)},
        {"grants": {}},
        {"options": dataclasses.replace(SAID.options, slo_ms=5)},
    ]
    assert {name for change in changes for name in change} == set(SAID.__slots__)
    digests = {dataclasses.replace(SAID, **change).digest for change in changes}
    assert len(digests) == len(changes)
    assert SAID.digest not in digests


def test_what_holds():
    assert SIGNED.open() == SAID
    assert SAID.owner == OWNER.thumbprint
