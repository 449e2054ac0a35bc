"""The key service: what it refuses, what it logs, whom it gives keys, and when it stops."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import time
from typing import Any

import pytest

from cloister.core.encoding import encode
from cloister.core.identity import SigningKey
from cloister.core.ohttp import bhttp, hpke
from cloister.core.ohttp.kem import generate_private_key
from cloister.core.ohttp.keyconfig import KeyConfiguration
from cloister.core.protocol.conversation import ask_key_service
from cloister.core.protocol.document import KEM_NAMES, SIGNING_ALGORITHM, ServiceDocument
from cloister.core.protocol.exchange import HeadRequest, PoolCreation, Possession, Publication, StatementQuery
from cloister.core.protocol.flow import drive_async
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.limits import MAX_POOLS
from cloister.core.protocol.pool import Pool
from cloister.core.protocol.release import Release, ReleaseRequest, SealedRelease, release_info
from cloister.core.protocol.statement import ServingOptions, Statement
from cloister.enclave import challenges as challenge_module
from cloister.enclave.challenges import LIFETIME, Challenges
from cloister.enclave.keyservice import documents as documents_module
from cloister.enclave.keyservice import possession as possession_module
from cloister.enclave.keyservice.epochs import Epochs
from cloister.enclave.keyservice.routes import KeyServiceRoutes
from cloister.enclave.keyservice.service import MAX_APPRAISALS, REFUSALS_PER_MINUTE
from cloister.enclave.server import InnerRequest
from cloister.errors import (
    AccessRefused,
    AppraisalRefused,
    BindingRefused,
    CloisterError,
    EvidenceRefused,
    FormatError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Replayed,
    Rollback,
    Tampered,
    Unavailable,
)
from cloister.net.messages import Answer
from support import realm as support
from support.realm import (
    DAY,
    KEY_SERVICE,
    NOW,
    STRANGER,
    WORKER,
    Clock,
    MemoryHost,
    Realm,
    kem_key,
    owner_key,
    policy,
    sealed_model,
    statement,
)

pytestmark = pytest.mark.asyncio


async def started(**settings: int) -> Realm:
    realm = await Realm.start(**settings)
    await realm.create_pool()
    return realm


async def refused(kind: type[CloisterError], code: str, work: Any) -> CloisterError:
    with pytest.raises(kind) as caught:
        result = work() if callable(work) else work
        if inspect.isawaitable(result):
            await result
    assert caught.value.code == code, str(caught.value)
    return caught.value


def logged(realm: Realm, kind: str) -> int:
    """How many entries of a kind the durable log holds, by opening it anew."""
    from cloister.core.sealing.records import open_record
    from cloister.enclave.keyservice.entries import Entry

    log, count = realm.service.log, 0
    for index, (key, (version, sealed)) in enumerate(sorted(realm.host.records["log"].items())):
        raw = open_record(
            log._state_key,
            sealed=sealed,
            service=log.service,
            table="log",
            record_key=key + log.tree.root(index),
            version=version,
        )
        count += Entry.from_bytes(raw).kind == kind
    return count


# -- challenges ----------------------------------------------------------------


async def test_a_challenge_is_good_once():
    made = Challenges()
    one, two = made.issue(NOW), made.issue(NOW)
    assert one != two
    assert len(one) == 56
    made.require(one, NOW)
    made.spend(one, NOW)
    await refused(Replayed, "replayed.challenge", lambda: made.spend(one, NOW))
    await refused(Replayed, "replayed.challenge", lambda: made.require(one, NOW))
    made.spend(two, NOW + LIFETIME)


async def test_an_expired_challenge():
    made = Challenges()
    await refused(
        BindingRefused,
        "binding.challenge-expired",
        lambda: made.spend(made.issue(NOW), NOW + LIFETIME + 1),
    )


@pytest.mark.parametrize("position", range(56))
async def test_a_forged_challenge(position):
    made = Challenges()
    altered = bytearray(made.issue(NOW))
    altered[position] ^= 1
    await refused(BindingRefused, "binding.challenge", lambda: made.spend(bytes(altered), NOW))


@pytest.mark.parametrize("challenge", [b"", bytes(56), bytes(24), b"x" * 100])
async def test_no_challenge(challenge):
    await refused(BindingRefused, "binding.challenge", lambda: Challenges().spend(challenge, NOW))


async def test_a_challenge_of_another_start():
    await refused(
        BindingRefused, "binding.challenge", lambda: Challenges().spend(Challenges().issue(NOW), NOW)
    )


async def test_spent_challenges_are_bounded_and_forgotten(monkeypatch):
    monkeypatch.setattr(challenge_module, "MAX_SPENT", 3)
    made = Challenges()
    for _ in range(3):
        made.spend(made.issue(NOW), NOW)
    await refused(Overloaded, "overloaded", lambda: made.spend(made.issue(NOW), NOW))
    made.spend(made.issue(NOW + LIFETIME + 1), NOW + LIFETIME + 1)
    assert len(made._spent) == 1


# -- epochs and documents ------------------------------------------------------


async def test_epochs_overlap_and_die():
    epochs = Epochs(seconds=100, overlap=30)
    epochs.begin(epochs.make(1, 1000))
    first = epochs.current
    assert [epochs.due(now) for now in (1000, 1069, 1070, 2000)] == [False, False, True, True]
    made = epochs.make(2, 1070)
    assert epochs.current is first
    epochs.begin(made)
    assert [epoch.number for epoch in epochs.live(1099)] == [1, 2]
    assert [epoch.number for epoch in epochs.live(1100)] == [2]
    assert [epoch.number for epoch in epochs.live(9999)] == [2]


async def test_pool_keys_are_one_for_each_pool_epoch_and_suite():
    epochs = Epochs(seconds=100, overlap=30)
    keys = set()
    for number in (1, 2):
        epochs.begin(epochs.make(number, 1000))
        for pool in (b"a" * 32, b"b" * 32):
            made = epochs.current.pool(pool)
            assert made is epochs.current.pool(pool)
            keys |= {key.configuration.public_key for key in made}
        keys |= {key.configuration.public_key for key in epochs.current.service}
    assert len(keys) == 12


async def test_documents_rotate_and_renew():
    realm = await started(document_seconds=100, epoch_seconds=1000)
    service, clock = realm.service, realm.clock
    first = service.documents.digest
    await service.tick()
    assert service.documents.digest == first
    clock.time += 51
    await service.tick()
    renewed = realm.document().document
    assert service.documents.digest != first
    assert (renewed.epoch, renewed.not_before, renewed.not_after) == (1, NOW + 51, NOW + 151)
    service.documents.require_recent(first)
    clock.time = NOW + 900
    await service.tick()
    rotated = realm.document().document
    assert rotated.epoch == 2
    assert rotated.pools[0].epoch == 2
    assert {key.public_key for key in rotated.keys}.isdisjoint({key.public_key for key in renewed.keys})
    assert {key_id for key_id, _ in service.documents.private_keys()} == {2, 3, 4, 5}
    clock.time = NOW + 1001
    assert {key_id for key_id, _ in service.documents.private_keys()} == {4, 5}
    await refused(BindingRefused, "ohttp.key", lambda: service.documents.private_key(2))


async def test_documents_never_outlive_their_epoch():
    realm = await started(document_seconds=600, epoch_seconds=60)
    for _ in range(200):
        document = realm.document().document
        assert document.not_after <= document.pools[0].not_after
        realm.clock.time += 1
        await realm.service.tick()


async def test_a_rotation_that_fails_changes_nothing(monkeypatch):
    realm = await started()
    before = (realm.service.documents.raw, realm.service.documents.epochs.current)
    attester = realm.service.documents._attester
    monkeypatch.setattr(attester, "root", "host")  # evidence under another root
    await refused(EvidenceRefused, "evidence.root", realm.service.documents.rotate())
    assert (realm.service.documents.raw, realm.service.documents.epochs.current) == before
    monkeypatch.setattr(attester, "root", "main")
    await realm.service.documents.rotate()
    assert realm.document().document.epoch == 3


async def test_pool_keys_never_enter_the_store():
    realm = await started()
    request = realm.release_request()
    await realm.service.release(request)
    epoch = realm.service.documents.epochs.current
    secrets = [key.private_key.to_secret().reveal() for key in (*epoch.service, *epoch.pool(realm.pool.id))]
    stored = b"".join(value for rows in realm.host.records.values() for _, value in rows.values())
    assert not any(secret in stored for secret in secrets)
    restarted = await Realm.start(realm.host, realm.clock)
    fresh = restarted.service.documents.epochs.current
    assert fresh.number == 2
    assert {key.private_key.to_secret().reveal() for key in fresh.pool(realm.pool.id)}.isdisjoint(secrets)


async def test_a_service_whose_own_evidence_does_not_verify_does_not_come_up(monkeypatch):
    from support import realm as support

    real = support.configuration
    root = support.authority("host").roots_der
    monkeypatch.setattr(
        support, "configuration", lambda role="key-service", **more: real(role, anchor_roots=root, **more)
    )
    with pytest.raises(EvidenceRefused):
        await Realm.start()


# -- documents -----------------------------------------------------------------


def sign(realm):
    realm.clock.time += 1  # the same state at the same time is the same document
    realm.service.documents.sign()


async def test_a_document_that_was_replaced_a_moment_ago_still_counts(monkeypatch):
    """Otherwise an owner who publishes often would lock everyone out who lives some milliseconds away."""
    realm = await started()
    old = realm.service.documents.digest
    sign(realm)
    proof = await realm.service.possession(HeadRequest(nonce=bytes(32), head=None, document=old))
    assert proof.document == old != realm.service.documents.digest
    unknown = HeadRequest(nonce=bytes(32), head=None, document=b"x" * 32)
    assert (await realm.service.possession(unknown)).document == realm.service.documents.digest
    monkeypatch.setattr(documents_module, "CURRENT", -1.0)
    late = HeadRequest(nonce=bytes(32), head=None, document=old)
    assert (await realm.service.possession(late)).document == realm.service.documents.digest


async def test_two_documents_in_one_batch():
    realm = await started()
    old = realm.document()
    sign(realm)
    new = realm.document()
    requests = [HeadRequest(nonce=os.urandom(32), head=None, document=each.digest) for each in (old, new)]
    proofs = await asyncio.gather(*map(realm.service.possession, requests))
    for request, proof, document in zip(requests, proofs, (old, new), strict=True):
        assert proof.document == document.digest
        service_key = document.attested.binding.key(SIGNING_ALGORITHM)
        proof.verify(request, service=realm.id, service_key=service_key)


async def test_documents_that_workers_may_name_are_bounded(monkeypatch):
    realm = await started()
    documents = realm.service.documents
    old = documents.digest
    monkeypatch.setattr(documents_module, "MAX_RECENT", 4)
    for _ in range(9):
        sign(realm)
    assert len(documents._recent) == 4
    with pytest.raises(BindingRefused):
        documents.require_recent(old)
    latest = documents.digest
    sign(realm)
    documents.require_recent(latest)
    monkeypatch.setattr(documents_module, "RECENT", -1.0)
    with pytest.raises(BindingRefused):
        documents.require_recent(latest)


async def test_evidence_of_another_enclave_is_not_its_own(monkeypatch):
    """The host's device may answer with anybody's genuine quote."""
    monkeypatch.setattr(
        support.Attester,
        "evidence",
        lambda self, report_data: support.evidence(bytes(64), KEY_SERVICE, now=NOW),
    )
    await refused(BindingRefused, "binding.report-data", Realm.start(measurement=STRANGER))


async def test_evidence_that_changes_between_epochs_is_not_its_own(monkeypatch):
    """Its host may have another enclave ask with our report data: a genuine quote, and not ours."""
    realm = await started()
    before = realm.service.documents.own_evidence

    def other(self, report_data):
        return support.evidence(report_data, STRANGER, now=NOW)

    monkeypatch.setattr(support.Attester, "evidence", other)
    await refused(BindingRefused, "binding.measurement", realm.service.documents.rotate())
    assert realm.service.documents.own_evidence == before


# -- messages of many items ------------------------------------------------------


@pytest.mark.parametrize("read", [Publication.from_bytes, ReleaseRequest.from_bytes, PoolCreation.from_bytes])
async def test_messages_of_many_items_are_refused_before_they_are_built(read):
    """An item takes a byte to send and a microsecond to read, on the one event loop, before any signature."""
    raw = encode([{}] * 100_000)
    before = time.perf_counter()
    with pytest.raises(FormatError) as caught:
        read(raw)
    assert caught.value.claim == "items"
    assert time.perf_counter() - before < 0.05


# -- possession ----------------------------------------------------------------


async def test_many_nonces_under_one_signature(monkeypatch):
    realm = await started()
    signatures = []
    sign = Possession.sign
    monkeypatch.setattr(Possession, "sign", staticmethod(lambda *given: signatures.append(1) or sign(*given)))
    requests = [HeadRequest(nonce=os.urandom(32), head=None) for _ in range(50)]
    proofs = await asyncio.gather(*map(realm.service.possession, requests))
    assert len(signatures) == 1
    public = realm.service.log.identity.public
    for request, proof in zip(requests, proofs, strict=True):
        proof.verify(request, service=realm.id, service_key=public)
        assert proof.document == realm.service.documents.digest
    with pytest.raises(Tampered):
        proofs[0].verify(requests[1], service=realm.id, service_key=public)


async def test_a_batch_is_bounded(monkeypatch):
    monkeypatch.setattr(possession_module, "MAX_BATCH", 2)
    realm = await started()
    ask = [realm.service.possession(HeadRequest(nonce=bytes(32), head=None)) for _ in range(3)]
    results = await asyncio.gather(*ask, return_exceptions=True)
    assert [type(result) for result in results] == [Possession, Possession, Overloaded]


async def test_a_client_that_goes_away_does_not_disturb_the_others():
    realm = await started()
    requests = [HeadRequest(nonce=os.urandom(32), head=None) for _ in range(3)]
    tasks = [asyncio.ensure_future(realm.service.possession(request)) for request in requests]
    await asyncio.sleep(0)
    tasks[1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [Possession, asyncio.CancelledError, Possession]


async def test_a_failure_reaches_whoever_waits(monkeypatch):
    realm = await started()
    monkeypatch.setattr(realm.service.log, "head", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(realm.service.possession(HeadRequest(nonce=bytes(32), head=None)), 2)


# -- pools ---------------------------------------------------------------------


async def test_pools_of_another_anchor():
    realm = await started()
    for root in (None, "host"):
        pool = Pool(name="p", policy=policy(WORKER, root=root))
        await refused(AppraisalRefused, "appraisal.anchor", realm.create_pool(pool))
    assert len(realm.document().document.pools) == 1


async def test_the_same_pool_again_changes_nothing():
    realm = await started()
    size = len(realm.service.log.tree)
    receipt = await realm.service.create_pool(PoolCreation(pool=realm.pool, owner=b"o" * 32))
    assert receipt.index == 2
    assert len(realm.service.log.tree) == size
    assert realm.document().document.pools[0].owner is None


async def test_pools_are_bounded():
    realm = await started()
    state = realm.service.log.state
    for number in range(MAX_POOLS - len(state.pools)):
        state.pools[bytes([number]) * 32] = realm.pool
    await refused(
        Overloaded, "overloaded", realm.create_pool(dataclasses.replace(realm.pool, name="one-more"))
    )


@pytest.mark.parametrize("sender", [b"", b"enclave", b"operator", b"other"])
@pytest.mark.parametrize(
    ("path", "expected"), [(b"/pools", b"operator"), (b"/challenges", b"enclave"), (b"/releases", b"enclave")]
)
async def test_routes_that_are_not_for_everyone(path, expected, sender):
    realm = await Realm.start()
    content = PoolCreation(pool=realm.pool).to_bytes()
    http = bhttp.Request(method=b"POST", path=path, content=content)
    request = InnerRequest(http=http, enc=b"", key_id=0, arrived=0, opened=0, sender=sender)
    routes = KeyServiceRoutes(realm.service)
    if sender != expected:
        await refused(AccessRefused, "access.sender", routes(request))
        assert realm.service.log.state.pools == {}
    elif path == b"/pools":
        assert (await routes(request)).status == 200
    else:  # past the door, where another message is refused
        await refused(FormatError, "format", routes(request))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        (b"GET", b"/challenges"),
        (b"POST", b"/"),
        (b"POST", b"/challenges/"),
        (b"POST", b"/releases?x"),
        (b"PUT", b"/pools"),
    ],
)
async def test_routes_that_are_not_there(method, path):
    realm = await Realm.start()
    http = bhttp.Request(method=method, path=path)
    request = InnerRequest(http=http, enc=b"", key_id=0, arrived=0, opened=0, sender=b"operator")
    await refused(NotFound, "not-found.route", KeyServiceRoutes(realm.service)(request))


# -- statements ----------------------------------------------------------------


async def test_a_chain_of_statements():
    realm = await started()
    first = await realm.publish()
    served = realm.document().document.pools[0].models[0]
    assert (served.model, served.statement) == (first.model, first.digest)
    second = realm.next(first, grants={b"u" * 32: NOW + DAY})
    await realm.publish(second, key=None)
    state = realm.service.log.state.models[first.model]
    assert state.statement == second
    assert state.key.reveal() == b"K" * 32
    third = realm.next(second, sealed_model=sealed_model(b"n"))
    await realm.publish(third, key=b"L" * 32)
    assert realm.service.log.state.models[first.model].key.reveal() == b"L" * 32


async def test_the_newest_statement_again_changes_nothing():
    realm = await started()
    first = await realm.publish()
    index = len(realm.service.log.tree) - 1
    await realm.create_pool(dataclasses.replace(realm.pool, name="other"))
    receipt = await realm.service.publish(realm.publication(first))
    assert receipt.index == index
    assert logged(realm, "statement") == 1


async def refused_statement(
    realm: Realm, kind: type[CloisterError], code: str, said: Statement, **options: Any
) -> None:
    before = dict(realm.service.log.state.models)
    await refused(kind, code, realm.service.publish(realm.publication(said, **options)))
    assert realm.service.log.state.models == before


async def test_statements_that_do_not_follow():
    realm = await started()
    first = statement(realm.id)
    for said in (
        dataclasses.replace(first, version=2),
        dataclasses.replace(first, version=2, previous=b"p" * 32),
    ):
        await refused_statement(realm, Rollback, "rollback.statement", said)
    await refused_statement(realm, Rollback, "rollback.chain", dataclasses.replace(first, previous=b"p" * 32))
    await realm.publish(first)
    second = realm.next(first, grants={b"u" * 32: NOW})
    await refused_statement(
        realm, Rollback, "rollback.statement", dataclasses.replace(second, version=3), key=None
    )
    await refused_statement(
        realm, Rollback, "rollback.chain", dataclasses.replace(second, previous=b"p" * 32), key=None
    )
    await realm.publish(second, key=None)
    await refused_statement(realm, Rollback, "rollback.statement", first)
    fork = realm.next(first)
    await refused_statement(realm, Rollback, "rollback.statement", fork, key=None)


async def test_a_replayed_older_statement_does_not_take_a_grant_back():
    realm = await started()
    first = await realm.publish()
    recorded = realm.publication(first)
    second = realm.next(first, grants={b"u" * 32: NOW + DAY})
    await realm.publish(second, key=None)
    await refused(Rollback, "rollback.statement", realm.service.publish(recorded))
    assert b"u" * 32 in realm.service.log.state.models[first.model].statement.grants


async def test_statements_by_or_for_somebody_else():
    realm = await started()
    said = statement(realm.id)
    forged = dataclasses.replace(
        realm.publication(said).statement,
        owner_key=owner_key("mallory").public,
        signature=owner_key("mallory").sign("statement", said.to_bytes()),
    )
    await refused(
        AccessRefused, "access.owner", realm.service.publish(realm.publication(said, statement=forged))
    )
    altered = dataclasses.replace(realm.publication(said).statement, signature=bytes(64))
    await refused(
        Tampered, "tampered.signature", realm.service.publish(realm.publication(said, statement=altered))
    )
    await refused_statement(
        realm, BindingRefused, "binding.service", dataclasses.replace(said, service=b"o" * 32)
    )


async def test_statements_that_accept_no_key_service_like_this():
    realm = await started()
    said = statement(realm.id, key_service=policy(STRANGER))
    await refused_statement(realm, AppraisalRefused, "appraisal.mr_enclave", said)
    said = statement(realm.id, key_service=policy(KEY_SERVICE, root=None))
    await refused_statement(realm, AppraisalRefused, "appraisal.simulated", said)


async def test_statements_that_admit_fewer_workers_than_the_pool():
    realm = await started()
    for release in (policy(STRANGER), policy(WORKER, root="host"), policy(WORKER, max_age=60)):
        said = statement(realm.id, release_policy=release)
        await refused_statement(realm, AppraisalRefused, "appraisal.not-subset", said)
    await realm.publish(statement(realm.id, release_policy=policy(WORKER, STRANGER)))


async def test_a_pool_serves_one_owner():
    realm = await started()
    await realm.publish()
    mallory = owner_key("mallory")
    said = statement(realm.id, owner=mallory)
    await refused_statement(realm, AccessRefused, "access.pool", said, owner=mallory)
    mine = dataclasses.replace(realm.pool, name="for-mallory")
    await realm.create_pool(mine, owner=mallory.thumbprint)
    await refused_statement(
        realm, AccessRefused, "access.pool", statement(realm.id, name="other"), pool=mine.id
    )
    await realm.publish(said, owner=mallory, pool=mine.id)


async def test_a_shared_pool_serves_several_owners_each_under_its_own_statements():
    realm = await started()
    shared = await realm.create_pool(dataclasses.replace(realm.pool, shared=True))
    assert shared.id != realm.pool.id
    one, two = owner_key("one"), owner_key("two")
    said = {owner: statement(realm.id, owner=owner) for owner in (one, two)}
    for owner in (one, two):
        await realm.publish(said[owner], owner=owner, pool=shared.id)
    entry = realm.document().document.pool(shared.id)
    assert entry.pool.shared
    assert entry.owner is None
    assert {each.model for each in entry.models} == {each.model for each in said.values()}
    theirs = realm.next(said[two], grants={b"u" * 32: 1 << 40})
    with pytest.raises(CloisterError):  # nobody speaks for another owner
        await realm.publish(theirs, owner=one, pool=shared.id)
    again = await Realm.start(MemoryHost(records=realm.host.records))  # and so it is after a restart
    assert again.service.log.state.owners.get(shared.id) is None
    assert len(again.service.log.state.models_of(shared.id)) == 2


async def test_an_unknown_pool():
    realm = await started()
    await refused_statement(realm, NotFound, "not-found.pool", statement(realm.id), pool=b"n" * 32)


@pytest.mark.parametrize("batching", ["same-user", "cross-user"])
async def test_options_that_contradict_each_other(batching):
    realm = await started()
    said = statement(realm.id, options=ServingOptions(isolation="strict", batching=batching))
    await refused_statement(realm, InvalidRequest, "request.options", said)


@pytest.mark.parametrize("options", [{"isolation": "strict"}, {"batching": "cross-user"}])
async def test_options_are_published(options):
    realm = await started()
    await realm.create_pool(owner=realm.owner.thumbprint)
    said = await realm.publish(statement(realm.id, options=ServingOptions(**options)))
    (entry,) = realm.document().document.pools
    assert [model.options for model in entry.models] == [said.options]


async def test_model_keys():
    realm = await started()
    said = statement(realm.id)
    await refused_statement(realm, InvalidRequest, "request.model-key", said, key=None)
    other = statement(realm.id, sealed_model=sealed_model(b"n"))
    await refused_statement(
        realm,
        Tampered,
        "hpke.open",
        said,
        sealed_key=realm.publication(other).sealed_key,
    )
    await refused_statement(realm, InvalidRequest, "request", said, key=b"short")
    await refused_statement(realm, BindingRefused, "ohttp.key", said, key_id=77)
    await realm.publish(said)
    await refused_statement(
        realm,
        InvalidRequest,
        "request.model-key",
        realm.next(said, sealed_model=sealed_model(b"n")),
        key=None,
    )


async def test_who_may_read_a_statement():
    realm = await started()
    said = await realm.publish()
    query = StatementQuery.sign(realm.owner, service=realm.id, model=said.model, time=NOW)
    assert realm.service.statement_of(query).statement == said
    stranger = StatementQuery.sign(owner_key("mallory"), service=realm.id, model=said.model, time=NOW)
    await refused(AccessRefused, "access.owner", lambda: realm.service.statement_of(stranger))
    unknown = StatementQuery.sign(realm.owner, service=realm.id, model=said.model + "x", time=NOW)
    await refused(NotFound, "not-found.model", lambda: realm.service.statement_of(unknown))


async def test_a_statement_that_the_store_did_not_take_has_no_effect():
    realm = await started()
    publication = realm.publication(statement(realm.id))
    realm.host.writes = "refused"
    await refused(Unavailable, "store.write", realm.service.publish(publication))
    assert realm.service.log.state.models == {}
    assert realm.document().document.pools[0].models == ()
    realm.host.writes = "ok"
    await realm.service.publish(publication)


# -- releases ------------------------------------------------------------------


def unseal(realm: Realm, request: ReleaseRequest, sealed: SealedRelease) -> Release:
    info = release_info(request, pool=realm.pool.id, statements=sealed.statements)
    return Release.from_bytes(hpke.open_from(hpke.WIRE_SUITES[0], kem_key(), sealed.sealed, info=info))


async def test_a_release():
    realm = await started(lease_seconds=17, lease_requests=9)
    said = await realm.publish()
    request = realm.release_request()
    release = unseal(realm, request, await realm.service.release(request))
    assert [model.statement.open() for model in release.models] == [said]
    assert release.models[0].key.reveal() == b"K" * 32
    assert (release.lease.seconds, release.lease.requests) == (17, 9)
    certificate = release.certificate
    certificate.verify(realm.service.log.identity.public)
    assert (certificate.pool, certificate.epoch, certificate.measurement) == (realm.pool.id, 1, WORKER)
    assert (certificate.incarnation, certificate.not_after) == (b"i" * 16, NOW + 17)
    published = {key.to_bytes() for key in realm.document().document.pools[0].keys}
    assert {key.configuration for key in release.pool_keys} == published
    assert logged(realm, "release") == 1


async def test_a_renewal_is_not_logged_but_a_change_is():
    realm = await started()
    first = await realm.publish()
    for _ in range(3):
        await realm.service.release(realm.release_request())
    assert logged(realm, "release") == 1
    await realm.service.release(realm.release_request(incarnation=b"j" * 16))
    assert logged(realm, "release") == 2
    await realm.publish(realm.next(first), key=None)
    await realm.service.release(realm.release_request())
    assert logged(realm, "release") == 3


async def refused_release(
    realm: Realm, kind: type[CloisterError], code: str, request: ReleaseRequest
) -> None:
    travelled = ReleaseRequest.from_bytes(request.to_bytes())
    await refused(kind, code, realm.service.release(travelled))


@pytest.mark.parametrize(
    ("options", "kind", "code"),
    [
        ({"measurement": STRANGER}, AppraisalRefused, "appraisal.mr_enclave"),
        ({"debug": True}, AppraisalRefused, "appraisal.debug"),
        ({"root": "host"}, EvidenceRefused, "evidence.root"),
        ({"purpose": "service-document"}, BindingRefused, "binding.purpose"),
        ({"role": "key-service"}, BindingRefused, "binding.role"),
        ({"service": b"o" * 32}, BindingRefused, "binding.service"),
        ({"freshness": ("challenge", bytes(56))}, BindingRefused, "binding.freshness"),
        ({"freshness": ("epoch", (1).to_bytes(8))}, BindingRefused, "binding.freshness"),
        ({"configuration": bytes(32)}, BindingRefused, "binding.report-data"),
        ({"pool": None}, BindingRefused, "binding.pool"),
        ({"pool": b"n" * 32}, NotFound, "not-found.pool"),
        ({"keys": (("Ed25519", b"e" * 32),)}, InvalidRequest, "request.kem"),
        ({"keys": ((KEM_NAMES[0x647A], b"e" * 1216),)}, CloisterError, "format"),
        ({"keys": ((KEM_NAMES[0x20], bytes(32)), ("Ed25519", b"e" * 32))}, CloisterError, "hpke.kem"),
        ({"keys": ((KEM_NAMES[0x647A], b"short"), ("Ed25519", b"e" * 32))}, CloisterError, "hpke.public-key"),
        ({"document": bytes(32)}, BindingRefused, "binding.document"),
        ({"challenge": bytes(56)}, BindingRefused, "binding.challenge"),
    ],
)
async def test_workers_that_get_nothing(options, kind, code):
    realm = await started()
    await realm.publish()
    await refused_release(realm, kind, code, realm.release_request(**options))
    assert logged(realm, "release") == 0


async def test_a_worker_configured_for_another_pool_service_or_key_service():
    realm = await started()
    await realm.publish()
    other = dataclasses.replace(realm.pool, name="other")
    for change in ({"pool": other}, {"service": b"o" * 32}):
        config = realm.worker_configuration(**change)
        await refused_release(
            realm, BindingRefused, "binding.configuration", realm.release_request(config=config)
        )
    config = realm.worker_configuration(key_service=policy(STRANGER))
    await refused_release(
        realm, AppraisalRefused, "appraisal.mr_enclave", realm.release_request(config=config)
    )
    config = realm.worker_configuration(key_service=policy(KEY_SERVICE, root="host"))
    await refused_release(realm, AppraisalRefused, "appraisal.anchor", realm.release_request(config=config))


async def test_a_recorded_request_is_good_once():
    realm = await started()
    request = realm.release_request()
    await realm.service.release(request)
    await refused_release(realm, Replayed, "replayed.challenge", request)


async def test_a_refused_request_spends_its_challenge():
    realm = await started()
    request = realm.release_request(measurement=STRANGER)
    await refused_release(realm, AppraisalRefused, "appraisal.mr_enclave", request)
    again = realm.release_request(challenge=request.challenge)
    await refused_release(realm, Replayed, "replayed.challenge", again)


async def test_a_request_from_before_a_restart_or_of_another_service():
    realm = await started()
    request = realm.release_request()
    restarted = await Realm.start(realm.host, realm.clock)
    await refused_release(restarted, BindingRefused, "binding.challenge", request)
    current = restarted.release_request(document=request.document)
    await refused_release(restarted, BindingRefused, "binding.document", current)


async def test_an_expired_challenge_releases_nothing():
    realm = await started()
    request = realm.release_request()
    realm.clock.time += LIFETIME + 1
    await refused_release(realm, BindingRefused, "binding.challenge-expired", request)


async def test_altered_attestation():
    realm = await started()
    request = realm.release_request()
    proof = request.attestation.evidence
    quote = bytearray(proof.quote)
    quote[200] ^= 1
    forged = dataclasses.replace(
        request,
        attestation=dataclasses.replace(
            request.attestation, evidence=dataclasses.replace(proof, quote=bytes(quote))
        ),
    )
    with pytest.raises(EvidenceRefused):
        await realm.service.release(forged)


async def test_models_whose_owner_no_longer_admits_the_worker_or_the_service_are_left_out():
    """The pool's policy admits the worker; each owner's own policies are asked once more."""
    realm = await Realm.start()
    realm_pool = Pool(name="two", policy=policy(WORKER, STRANGER))
    await realm.create_pool(realm_pool)
    said = statement(realm.id, release_policy=policy(WORKER, STRANGER))
    await realm.publish(said, pool=realm_pool.id)
    model = realm.service.log.state.models[said.model]
    config = realm.worker_configuration(pool=realm_pool)
    for changed in (
        dataclasses.replace(said, release_policy=policy(STRANGER)),
        dataclasses.replace(said, key_service=policy(STRANGER)),
    ):
        realm.service.log.state.models[said.model] = dataclasses.replace(model, statement=changed)
        sealed = await realm.service.release(realm.release_request(config=config, pool=realm_pool.id))
        assert sealed.statements == ()
    realm.service.log.state.models[said.model] = model
    sealed = await realm.service.release(realm.release_request(config=config, pool=realm_pool.id))
    assert sealed.statements == (said.digest,)


async def test_a_release_is_logged_before_it_leaves():
    realm = await started()
    await realm.publish()
    realm.host.writes = "refused"
    await refused_release(realm, Unavailable, "store.write", realm.release_request())


async def test_waiting_releases_are_bounded(monkeypatch):
    realm = await started()
    gate = asyncio.Event()
    acquire = realm.service._appraisals.acquire

    async def slow() -> bool:
        await gate.wait()
        return await acquire()

    monkeypatch.setattr(realm.service._appraisals, "acquire", slow)
    requests = [realm.release_request(incarnation=bytes([n]) * 16) for n in range(MAX_APPRAISALS + 1)]
    tasks = [asyncio.ensure_future(realm.service.release(request)) for request in requests]
    await asyncio.sleep(0.01)
    await refused(Overloaded, "overloaded", tasks[-1])
    gate.set()
    assert len(await asyncio.gather(*tasks[:-1])) == MAX_APPRAISALS


async def test_refusals_are_logged_and_rate_limited():
    realm = await started()
    for _ in range(REFUSALS_PER_MINUTE + 4):
        with pytest.raises(AppraisalRefused):
            await realm.service.release(realm.release_request(measurement=STRANGER))
    assert logged(realm, "refusal") == REFUSALS_PER_MINUTE
    realm.clock.time += 60
    with pytest.raises(Rollback):
        await realm.service.publish(realm.publication(statement(realm.id, version=5)))
    assert logged(realm, "refusal") == REFUSALS_PER_MINUTE + 1
    assert realm.service._refusals[1:] == (1, 0)  # what was left out is in that entry


async def test_requests_that_are_no_refusal_of_trust_are_not_logged():
    realm = await started()
    with pytest.raises(InvalidRequest):
        await realm.service.publish(realm.publication(statement(realm.id), key=None))
    with pytest.raises(BindingRefused):
        await realm.service.release(realm.release_request(challenge=bytes(56)))
    assert logged(realm, "refusal") == 0


# -- put back ------------------------------------------------------------------


async def test_it_stops_once_a_newer_head_of_its_own_is_shown():
    realm = await started()
    older = MemoryHost(records={table: dict(rows) for table, rows in realm.host.records.items()})
    await realm.publish()
    for name in ("a", "b", "c"):
        await realm.create_pool(dataclasses.replace(realm.pool, name=name))
    newest = realm.service.log.head()
    back = await Realm.start(older, realm.clock)
    service = back.service
    assert not service.halted
    forged = TreeHead.sign(SigningKey.generate(), size=99, root=bytes(32), time=NOW)
    await refused(
        BindingRefused,
        "binding.service",
        lambda: service.challenge(HeadRequest(nonce=bytes(32), head=forged)),
    )
    with pytest.raises(Tampered):
        service.challenge(HeadRequest(nonce=bytes(32), head=dataclasses.replace(newest, size=99)))
    assert not service.halted  # nobody but the service itself can make it stop
    shown = HeadRequest(nonce=bytes(32), head=newest)
    await refused(Rollback, "rollback.store", lambda: service.challenge(shown))
    assert service.halted
    first = HeadRequest(nonce=bytes(32), head=None)
    await refused(Rollback, "rollback.store", lambda: service.challenge(first))
    await refused(Rollback, "rollback.store", service.possession(first))
    await refused(Rollback, "rollback.store", service.publish(realm.publication(statement(back.id))))
    await refused(Rollback, "rollback.store", service.release(realm.release_request()))
    await refused(Rollback, "rollback.store", service.create_pool(PoolCreation(pool=realm.pool)))
    document = service.documents.raw
    back.clock.time += 10_000
    await service.tick()
    assert service.documents.raw == document  # and it signs no more


async def test_a_fork_of_the_same_length_stops_it_too():
    realm = await started()
    fork = TreeHead.sign(
        realm.service.log.identity, size=len(realm.service.log.tree), root=b"f" * 32, time=NOW
    )
    await refused(
        Rollback,
        "rollback.store",
        realm.service.possession(HeadRequest(nonce=bytes(32), head=fork)),
    )
    assert realm.service.halted


# -- through the encapsulation -------------------------------------------------


async def test_end_to_end_through_the_encapsulation():
    realm = await started()
    said = await realm.publish()
    verified = realm.document()

    async def send(outgoing: Any) -> Answer:
        return await realm.outer(bytes(outgoing.body))

    request = realm.release_request()
    content = await drive_async(
        ask_key_service(verified.document, b"/releases", request.to_bytes()), send, asyncio.sleep
    )
    release = unseal(realm, request, SealedRelease.from_bytes(content))
    assert release.models[0].statement.open() == said
    for path in (b"/challenges", b"/possession", b"/releases", b"/statements", b"/statements/current"):
        for raw in (b"", b"\xff", encode({}), b"\x00" * 9000):
            with pytest.raises(CloisterError) as caught:
                await drive_async(ask_key_service(verified.document, path, raw), send, asyncio.sleep)
            assert caught.value.code.startswith("format")


async def test_the_document_tells_no_grants_and_no_keys():
    realm = await started()
    said = statement(realm.id, grants={b"u" * 32: NOW + DAY})
    await realm.publish(said)
    raw = realm.service.documents.raw
    assert b"u" * 32 not in raw
    assert b"K" * 32 not in raw
    assert isinstance(realm.document().document, ServiceDocument)


async def test_another_pool_s_keys_do_not_open_a_request():
    realm = await started()
    other = await realm.create_pool(dataclasses.replace(realm.pool, name="other"))
    document = realm.document().document
    keys = [{key.public_key for key in document.pool(each).keys} for each in (realm.pool.id, other.id)]
    assert keys[0].isdisjoint(keys[1])
    assert KeyConfiguration.for_key(0, generate_private_key(0x20)).public_key not in keys[0]
    assert Clock().now() == NOW
