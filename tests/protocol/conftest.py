"""One key service with a pool and a model, and every message of the protocol as it really occurs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from cloister.core.encoding import decode, encode
from cloister.core.merkle import MerkleTree
from cloister.core.ohttp import hpke
from cloister.core.ohttp.kem import KEMS
from cloister.core.protocol.attestation import Attestation
from cloister.core.protocol.configuration import EnclaveConfiguration
from cloister.core.protocol.document import PoolEntry, ServedModel, ServiceDocument, SignedDocument
from cloister.core.protocol.exchange import (
    Challenge,
    HeadRequest,
    PoolCreation,
    Possession,
    Publication,
    Receipt,
    StatementQuery,
)
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.pool import Pool
from cloister.core.protocol.release import (
    Lease,
    PoolKey,
    Release,
    ReleasedModel,
    ReleaseRequest,
    SealedRelease,
    WorkerCertificate,
    release_info,
)
from cloister.core.protocol.statement import SealedModel, ServingOptions, SignedStatement, Statement
from cloister.core.verifier.appraisal import AppraisalPolicy
from support.realm import NOW, Realm, kem_key

assert KEMS  # the messages below carry keys of each


@dataclass(frozen=True)
class Message:
    """A message with its two forms: ``read(write(value)) == value``."""

    value: Any
    write: Callable[[Any], bytes]
    read: Callable[[bytes], Any]


def _data(kind: Any, value: Any) -> Message:
    return Message(
        value, lambda made: encode(made.to_data()), lambda raw: kind.from_data(decode(raw, what="message"))
    )


def _bytes(kind: Any, value: Any) -> Message:
    return Message(value, lambda made: made.to_bytes(), kind.from_bytes)


async def _make() -> tuple[Realm, dict[str, Message]]:
    realm = await Realm.start()
    await realm.create_pool(owner=realm.owner.thumbprint)
    said = await realm.publish()
    said = realm.next(said, grants={b"u" * 32: NOW + 100, b"v" * 32: NOW + 5})
    await realm.publish(said, key=None)
    request = realm.release_request()
    sealed = await realm.service.release(request)
    info = release_info(request, pool=realm.pool.id, statements=sealed.statements)
    release = Release.from_bytes(hpke.open_from(hpke.WIRE_SUITES[0], kem_key(), sealed.sealed, info=info))
    log = realm.service.log
    head = log.head()
    older = TreeHead.sign(log.identity, size=2, root=log.tree.root(2), time=NOW)
    nonces = [b"n" * 32, b"o" * 32, b"p" * 32]
    tree = MerkleTree(nonces)
    possession = Possession(
        document=realm.service.documents.digest,
        root=tree.root(),
        size=3,
        index=1,
        path=tuple(tree.inclusion_proof(1)),
        signature=Possession.sign(log.identity, realm.service.documents.digest, tree),
        head=head,
        consistency=log.consistency(older),
    )
    signed = realm.signed()
    document = ServiceDocument.from_bytes(signed.text)
    publication = realm.publication(said)
    query = StatementQuery.sign(realm.owner, service=realm.id, model=said.model, time=NOW)
    challenge = Challenge(challenge=realm.challenge(), head=head, consistency=log.consistency(older))
    return realm, {
        "tree head": _bytes(TreeHead, head),
        "pool": _data(Pool, realm.pool),
        "appraisal policy": _data(AppraisalPolicy, realm.pool.policy),
        "key service configuration": _bytes(
            EnclaveConfiguration, EnclaveConfiguration.from_bytes(document.attestation.configuration)
        ),
        "worker configuration": _bytes(EnclaveConfiguration, realm.worker_configuration()),
        "attestation": _data(Attestation, request.attestation),
        "served model": _data(ServedModel, document.pools[0].models[0]),
        "pool entry": _data(PoolEntry, document.pools[0]),
        "service document": _bytes(ServiceDocument, document),
        "signed document": _bytes(SignedDocument, signed),
        "sealed model": _data(SealedModel, said.sealed_model),
        "serving options": _data(ServingOptions, said.options),
        "statement": _bytes(Statement, said),
        "signed statement": _data(SignedStatement, publication.statement),
        "release request": _bytes(ReleaseRequest, request),
        "pool key": _data(PoolKey, release.pool_keys[0]),
        "released model": _data(ReleasedModel, release.models[0]),
        "lease": _data(Lease, release.lease),
        "worker certificate": _data(WorkerCertificate, release.certificate),
        "release": _bytes(Release, release),
        "sealed release": _bytes(SealedRelease, sealed),
        "first head request": _bytes(HeadRequest, HeadRequest(nonce=nonces[0], head=None)),
        "head request": _bytes(HeadRequest, HeadRequest(nonce=nonces[1], head=older)),
        "possession": _bytes(Possession, possession),
        "challenge": _bytes(Challenge, challenge),
        "publication": _bytes(Publication, publication),
        "pool creation": _bytes(PoolCreation, PoolCreation(pool=realm.pool, owner=b"o" * 32)),
        "statement query": _bytes(StatementQuery, query),
        "receipt": _bytes(Receipt, Receipt(index=3, head=head)),
    }


NAMES = [
    "tree head",
    "pool",
    "appraisal policy",
    "key service configuration",
    "worker configuration",
    "attestation",
    "served model",
    "pool entry",
    "service document",
    "signed document",
    "sealed model",
    "serving options",
    "statement",
    "signed statement",
    "release request",
    "pool key",
    "released model",
    "lease",
    "worker certificate",
    "release",
    "sealed release",
    "first head request",
    "head request",
    "possession",
    "challenge",
    "publication",
    "pool creation",
    "statement query",
    "receipt",
]


@pytest.fixture(scope="session")
def made() -> tuple[Realm, dict[str, Message]]:
    realm, messages = asyncio.run(_make())
    assert sorted(messages) == sorted(NAMES)
    return realm, messages


@pytest.fixture(scope="session")
def realm(made) -> Realm:
    return made[0]


@pytest.fixture(scope="session")
def messages(made) -> dict[str, Message]:
    return made[1]


@pytest.fixture(params=NAMES)
def message(request, messages) -> Message:
    return messages[request.param]
