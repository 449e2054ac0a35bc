"""Key release: what is sealed for one exchange opens in no other; certificates are for one worker."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from cloister.core.identity import SigningKey
from cloister.core.ohttp import hpke
from cloister.core.protocol.release import (
    Release,
    ReleaseRequest,
    SealedRelease,
    WorkerCertificate,
    model_key_info,
    release_info,
)
from cloister.errors import BindingRefused, Tampered
from support.realm import NOW, WORKER, Realm, kem_key, owner_key, sealed_model

SUITE = hpke.WIRE_SUITES[0]


@pytest.fixture(scope="module")
def exchange(realm: Realm) -> tuple[ReleaseRequest, SealedRelease]:
    async def run() -> tuple[ReleaseRequest, SealedRelease]:
        request = realm.release_request()
        return request, await realm.service.release(request)

    return asyncio.run(run())


def unseal(request: ReleaseRequest, sealed: SealedRelease, pool: bytes, **changes: Any) -> Release:
    statements = changes.pop("statements", sealed.statements)
    info = release_info(dataclasses.replace(request, **changes), pool=pool, statements=statements)
    return Release.from_bytes(hpke.open_from(SUITE, kem_key(), sealed.sealed, info=info))


def refused(*arguments: Any, **changes: Any) -> None:
    with pytest.raises(Tampered):
        unseal(*arguments, **changes)


def test_what_holds(realm, exchange):
    request, sealed = exchange
    release = unseal(request, sealed, realm.pool.id)
    assert [model.key.reveal() for model in release.models] == [b"K" * 32]
    assert [model.statement.open().digest for model in release.models] == list(sealed.statements)
    assert [key.epoch for key in release.pool_keys] == [1, 1]
    assert release.service_key == realm.service.log.identity.public


@pytest.mark.parametrize("field", ["challenge", "document", "incarnation"])
def test_each_component_is_bound(realm, exchange, field):
    value = getattr(exchange[0], field)
    refused(*exchange, realm.pool.id, **{field: value[:-1] + bytes([value[-1] ^ 1])})


def test_evidence_pool_and_statements_are_bound(realm, exchange):
    request, sealed = exchange
    other = realm.release_request(challenge=request.challenge)
    assert other.attestation.binding == request.attestation.binding
    refused(request, sealed, realm.pool.id, attestation=other.attestation)
    refused(request, sealed, bytes(32))
    for statements in ((), (bytes(32),), (*sealed.statements, bytes(32)), sealed.statements[::-1] * 2):
        refused(request, sealed, realm.pool.id, statements=statements)


def test_info_names_each_component(realm, exchange):
    request, _ = exchange
    made = [
        release_info(request, pool=bytes(32), statements=()),
        release_info(request, pool=b"p" * 32, statements=()),
        release_info(request, pool=bytes(32), statements=(bytes(32),)),
        release_info(request, pool=bytes(32), statements=(bytes(32), bytes(32))),
        *(
            release_info(dataclasses.replace(request, **change), pool=bytes(32), statements=())
            for change in ({"challenge": bytes(56)}, {"document": bytes(32)}, {"incarnation": bytes(16)})
        ),
        # lists of digests can't be read as one another
        release_info(request, pool=bytes(32), statements=(bytes(31), bytes(33))),
    ]
    assert len(set(made)) == len(made)


def test_replayed_into_another_exchange(realm, exchange):
    """A release that was recorded does not answer a later request of the same worker."""
    _, sealed = exchange
    refused(realm.release_request(), sealed, realm.pool.id)


def test_cross_wired_between_two_workers(realm, exchange):
    """Two workers of one pool ask; the host hands each the other's answer."""
    request, sealed = exchange
    info = release_info(request, pool=realm.pool.id, statements=sealed.statements)
    with pytest.raises(Tampered):
        hpke.open_from(SUITE, hpke_key(), sealed.sealed, info=info)


def hpke_key():
    from cloister.core.ohttp.kem import generate_private_key

    return generate_private_key(SUITE.kem_id)


def test_altered_and_truncated_ciphertext(realm, exchange):
    request, sealed = exchange
    for raw in (
        sealed.sealed[:-1],
        sealed.sealed + b"x",
        sealed.sealed[:-1] + bytes([sealed.sealed[-1] ^ 1]),
        bytes([sealed.sealed[0] ^ 1]) + sealed.sealed[1:],
    ):
        refused(request, dataclasses.replace(sealed, sealed=raw), realm.pool.id)


# -- certificates --------------------------------------------------------------

SERVICE = owner_key("service")
FIELDS: dict[str, Any] = {
    "pool": b"p" * 32,
    "epoch": 3,
    "measurement": WORKER,
    "incarnation": b"i" * 16,
    "public_key": b"k" * 32,
    "not_after": NOW,
}


def test_a_certificate_is_for_all_that_it_names():
    certificate = WorkerCertificate.sign(SERVICE, **FIELDS)
    certificate.verify(SERVICE.public)
    for change in (
        {"pool": bytes(32)},
        {"epoch": 4},
        {"measurement": bytes(32)},
        {"incarnation": bytes(16)},
        {"public_key": bytes(32)},
        {"not_after": NOW + 1},
        {"signature": bytes(64)},
    ):
        with pytest.raises(Tampered):
            dataclasses.replace(certificate, **change).verify(SERVICE.public)


def test_a_certificate_of_another_issuer():
    certificate = WorkerCertificate.sign(SERVICE, **FIELDS)
    with pytest.raises(BindingRefused):
        certificate.verify(SigningKey.generate().public)
    other = SigningKey.generate()
    with pytest.raises(BindingRefused):
        dataclasses.replace(certificate, service=other.thumbprint).verify(SERVICE.public)
    with pytest.raises(Tampered):
        dataclasses.replace(certificate, service=other.thumbprint).verify(other.public)


# -- model keys on their way from the owner ------------------------------------


def test_a_model_key_is_sealed_to_one_service_and_statement(realm, messages):
    key = kem_key()
    said = messages["statement"].value
    sealed = hpke.seal_to(SUITE, key.public_bytes, b"K" * 32, info=model_key_info(realm.id), aad=said.digest)
    assert hpke.open_from(SUITE, key, sealed, info=model_key_info(realm.id), aad=said.digest) == b"K" * 32
    other = dataclasses.replace(said, sealed_model=sealed_model(b"n"))
    for info, aad in ((model_key_info(bytes(32)), said.digest), (model_key_info(realm.id), other.digest)):
        with pytest.raises(Tampered):
            hpke.open_from(SUITE, key, sealed, info=info, aad=aad)
