"""The service document: each claim altered alone, by somebody who can sign and by somebody who can't."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.core.identity import SigningKey
from cloister.core.ohttp.keyconfig import KeyConfiguration
from cloister.core.protocol.document import (
    ServiceDocument,
    SignedDocument,
    VerifiedDocument,
    attested_keys,
    verify_document,
)
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.limits import CLOCK_SKEW, MAX_DOCUMENT_LIFETIME, MAX_EPOCH
from cloister.errors import (
    AppraisalRefused,
    BindingRefused,
    CloisterError,
    EvidenceRefused,
    FormatError,
    NotFound,
    Rollback,
    Tampered,
)
from support.realm import KEY_SERVICE, NOW, STRANGER, Realm, evidence, kem_key, policy


@pytest.fixture(scope="module")
def document(realm: Realm) -> ServiceDocument:
    return ServiceDocument.from_bytes(realm.signed().text)


@pytest.fixture(scope="module")
def identity(realm: Realm) -> SigningKey:
    return realm.service.log.identity


@pytest.fixture(scope="module")
def other() -> Realm:
    return asyncio.run(Realm.start())


def check(raw: bytes, realm: Realm, **changes: Any) -> VerifiedDocument:
    return verify_document(raw, **{"policy": policy(KEY_SERVICE), "service": realm.id, "now": NOW, **changes})


def refused(
    kind: type[CloisterError], code: str, made: ServiceDocument | bytes, realm: Realm, **changes: Any
) -> None:
    """Refused although the service itself signed it."""
    if isinstance(made, ServiceDocument):
        made = SignedDocument.sign(made, realm.service.log.identity).to_bytes()
    with pytest.raises(kind) as caught:
        check(made, realm, **changes)
    assert caught.value.code == code, str(caught.value)


# -- signature -----------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1 << 30), st.integers(1, 255))
def test_any_altered_byte_is_refused(realm, position, change):
    raw = bytearray(realm.signed().to_bytes())
    raw[position % len(raw)] ^= change
    with pytest.raises((Tampered, BindingRefused, FormatError)):
        check(bytes(raw), realm)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncated(realm, cut):
    with pytest.raises(FormatError):
        check(realm.signed().to_bytes()[:cut], realm)


def test_signed_by_another_key(realm, document):
    made = SignedDocument.sign(document, SigningKey.generate())
    refused(BindingRefused, "binding.service", made.to_bytes(), realm)
    made = dataclasses.replace(made, key=realm.signed().key)
    refused(Tampered, "tampered.signature", made.to_bytes(), realm)


def test_signature_of_another_document(realm, document):
    made = SignedDocument.sign(dataclasses.replace(document, epoch=9), realm.service.log.identity)
    mixed = dataclasses.replace(realm.signed(), signature=made.signature)
    refused(Tampered, "tampered.signature", mixed.to_bytes(), realm)


def test_another_service_than_the_pinned_one(realm, other):
    raw = other.service.documents.raw
    check(raw, other)
    refused(BindingRefused, "binding.service", raw, realm)


def test_a_document_that_speaks_of_another_service(realm, document):
    refused(BindingRefused, "binding.service", dataclasses.replace(document, service=bytes(32)), realm)


# -- time ----------------------------------------------------------------------


def test_expired_and_not_yet_valid(realm, document):
    raw = realm.signed().to_bytes()
    check(raw, realm, now=document.not_after)
    refused(EvidenceRefused, "document.expired", raw, realm, now=document.not_after + 1)
    check(raw, realm, now=document.not_before - CLOCK_SKEW)
    refused(EvidenceRefused, "document.not-yet-valid", raw, realm, now=document.not_before - CLOCK_SKEW - 1)


@pytest.mark.parametrize("lifetime", [0, -5, MAX_DOCUMENT_LIFETIME + 1, 1 << 52])
def test_lifetime_out_of_bounds(realm, document, lifetime):
    made = dataclasses.replace(document, not_before=NOW, not_after=max(NOW + lifetime, 0))
    refused(EvidenceRefused, "document.lifetime", made, realm)


def test_pool_keys_that_never_die(realm, document):
    pool = dataclasses.replace(document.pools[0], not_after=NOW + MAX_EPOCH + CLOCK_SKEW + 1)
    made = dataclasses.replace(document, pools=(pool,))
    refused(EvidenceRefused, "document.epoch", made, realm)


# -- attestation ---------------------------------------------------------------


def test_another_epoch_than_the_attested_one(realm, document):
    refused(BindingRefused, "binding.freshness", dataclasses.replace(document, epoch=2), realm)


def test_keys_that_were_not_attested(realm, document):
    stranger = KeyConfiguration.for_key(7, kem_key(0x20))
    for keys in (
        (*document.keys, stranger),
        document.keys[:1],
        document.keys[::-1],
        (document.keys[0], stranger),
        (stranger,),
    ):
        refused(BindingRefused, "binding.keys", dataclasses.replace(document, keys=keys), realm)


def test_evidence_of_another_service_or_purpose(realm, document, other):
    theirs = ServiceDocument.from_bytes(other.signed().text).attestation
    made = dataclasses.replace(document, attestation=theirs)
    refused(BindingRefused, "binding.service", made, realm)
    release = realm.release_request().attestation
    refused(BindingRefused, "binding.purpose", dataclasses.replace(document, attestation=release), realm)


def test_evidence_that_binds_other_keys(realm, document, identity):
    """Whoever has only the signing key can't attest keys of its own."""
    keys = (KeyConfiguration.for_key(7, kem_key(0x20)),)
    binding = dataclasses.replace(document.attestation.binding, keys=attested_keys(keys, identity.public))
    attestation = dataclasses.replace(document.attestation, binding=binding)
    made = dataclasses.replace(document, keys=keys, attestation=attestation)
    refused(BindingRefused, "binding.report-data", made, realm)


def test_measurement_that_the_policy_does_not_name(realm, document):
    binding = document.attestation.binding
    attestation = dataclasses.replace(document.attestation, evidence=evidence(binding.report_data, STRANGER))
    made = dataclasses.replace(document, attestation=attestation)
    refused(AppraisalRefused, "appraisal.mr_enclave", made, realm)
    raw = realm.signed().to_bytes()
    refused(AppraisalRefused, "appraisal.mr_enclave", raw, realm, policy=policy(STRANGER))
    refused(AppraisalRefused, "appraisal.simulated", raw, realm, policy=policy(KEY_SERVICE, root=None))
    refused(AppraisalRefused, "appraisal.anchor", raw, realm, policy=policy(KEY_SERVICE, root="host"))


# -- the tree head -------------------------------------------------------------


def test_head_of_another_service(realm, document, other):
    made = dataclasses.replace(document, head=other.service.log.head())
    refused(BindingRefused, "binding.service", made, realm)


@pytest.mark.parametrize(
    "change", [{"size": 1}, {"root": bytes(32)}, {"time": NOW + 1}, {"signature": bytes(64)}]
)
def test_altered_head(realm, document, change):
    made = dataclasses.replace(document, head=dataclasses.replace(document.head, **change))
    refused(Tampered, "tampered.signature", made, realm)


def test_a_head_extends_an_older_one_or_is_refused(realm, identity):
    tree = realm.service.log.tree
    head, older = realm.service.log.head(), TreeHead.sign(identity, size=2, root=tree.root(2), time=NOW)
    head.require_extends(None, [])
    head.require_extends(older, tree.consistency_proof(2))
    with pytest.raises(Rollback) as caught:
        older.require_extends(head, [])
    assert caught.value.code == "rollback.head"
    fork = TreeHead.sign(identity, size=2, root=bytes(32), time=NOW)
    for known, proof in ((fork, tree.consistency_proof(2)), (older, []), (older, [bytes(32)])):
        with pytest.raises(Rollback) as caught:
            head.require_extends(known, proof)
        assert caught.value.code == "rollback.fork"


# -- what holds ----------------------------------------------------------------


def test_what_holds(realm, document):
    verified = check(realm.signed().to_bytes(), realm)
    assert verified.document == document
    assert verified.digest == realm.service.documents.digest
    assert verified.not_after == document.not_after <= verified.attested.evidence.not_after
    names = [step.name for step in verified.steps]
    assert names[0] == "service document"
    assert names[-1] == "tree head"
    assert {"validity", "configuration", "binding"} < set(names)
    assert document.pool(realm.pool.id).owner == realm.owner.thumbprint
    with pytest.raises(NotFound):
        document.pool(bytes(32))
    with pytest.raises(NotFound):
        document.pools[0].model("another")
    assert document.pools_of("another") == []
