"""A worker joins through a host that alters, truncates, replays and cross-wires every message, both ways."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest

from cloister.core.encoding import decode, encode
from cloister.core.ohttp import hpke
from cloister.core.protocol.exchange import Challenge
from cloister.core.protocol.flow import Outgoing
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.limits import CLOCK_SKEW, MAX_EPOCH
from cloister.core.protocol.release import (
    PoolKey,
    Release,
    ReleaseRequest,
    SealedRelease,
    WorkerCertificate,
    release_info,
)
from cloister.enclave.clock import HintedClock
from cloister.enclave.keyservice import routes as routes_module
from cloister.enclave.server import EnclaveServer
from cloister.enclave.worker import membership as membership_module
from cloister.enclave.worker.main import Worker
from cloister.enclave.worker.membership import Membership
from cloister.enclave.worker.models import ModelCache
from cloister.errors import (
    AppraisalRefused,
    BindingRefused,
    CloisterError,
    EvidenceRefused,
    FormatError,
    LeaseExpired,
    Overloaded,
    Replayed,
    Rollback,
    Tampered,
    TransportError,
    Unavailable,
    UsageError,
)
from cloister.net.messages import Answer
from support.realm import (
    KEY_SERVICE,
    NOW,
    STRANGER,
    WORKER,
    Attester,
    Clock,
    MemoryHost,
    Realm,
    configuration,
    kem_key,
    owner_key,
    policy,
    statement,
)

pytestmark = pytest.mark.asyncio


class Link:
    """A worker's link, through which the host sees and changes everything."""

    def __init__(self, realm: Realm) -> None:
        self.realm = realm
        self.sent: list[bytes] = []
        self.answers: list[bytes] = []
        self.document_as: Callable[[bytes], bytes] = lambda raw: raw
        self.up: Callable[[int, bytes], bytes] = lambda number, message: message
        self.down: Callable[[int, Answer], Answer] = lambda number, answer: answer

    async def document(self) -> bytes:
        return self.document_as(self.realm.service.documents.raw)

    async def send(self, outgoing: Outgoing) -> Answer:
        number, message = len(self.sent), outgoing.body
        self.sent.append(bytes(message))
        answer = await self.realm.outer(self.up(number, bytes(message)))
        self.answers.append(bytes(answer.body))
        return self.down(number, answer)


class Joined:
    """A realm with a published model, and a worker that may join."""

    def __init__(self, realm: Realm, measurement: bytes = WORKER, **changes: Any) -> None:
        self.realm = realm
        self.link = Link(realm)
        self.attester = Attester(measurement, realm.clock)
        config = realm.worker_configuration(**changes)
        self.worker = Membership(self.link, self.attester, config, HintedClock(realm.clock))  # type: ignore[arg-type]

    def state(self) -> tuple[Any, ...]:
        worker = self.worker
        return (worker.keys, worker.models, worker._lease_end, worker._lease_requests)


async def ready(measurement: bytes = WORKER, **changes: Any) -> Joined:
    realm = await Realm.start(lease_seconds=30, lease_requests=5)
    await realm.create_pool()
    await realm.publish()
    return Joined(realm, measurement, **changes)


async def refused(
    joined: Joined, kind: type[CloisterError] | tuple[Any, ...], code: str | None = None
) -> CloisterError:
    """Renewal fails, by name, and changes nothing."""
    before = joined.state()
    with pytest.raises(kind) as caught:
        await joined.worker.renew()
    assert code is None or caught.value.code == code, str(caught.value)
    assert joined.state() == before
    return caught.value


# -- what holds ----------------------------------------------------------------


async def test_joining_and_renewing():
    joined = await ready()
    worker, realm = joined.worker, joined.realm
    assert not worker.active
    with pytest.raises(LeaseExpired):
        worker.spend()
    await worker.renew()
    assert worker.active
    (live,) = worker.models.values()
    assert live.key.reveal() == b"K" * 32
    assert live.digest == live.statement.digest
    published = {key.key_id: key.public_key for key in realm.document().document.pools[0].keys}
    assert {key_id: key.public_bytes for key_id, key in worker.private_keys()} == published
    assert worker.head == realm.service.log.head() or worker.head.size == len(realm.service.log.tree) - 1
    second = realm.next(live.statement, grants={b"u" * 32: NOW + 9})
    await realm.publish(second, key=None)
    await worker.renew()
    assert worker.models[second.model].statement == second


async def test_a_lease_is_bounded_in_requests_and_in_seconds(monkeypatch):
    joined = await ready()
    await joined.worker.renew()
    for _ in range(5):
        joined.worker.spend()
    with pytest.raises(LeaseExpired):
        joined.worker.spend()
    await joined.worker.renew()
    joined.worker.spend()
    monkeypatch.setattr("time.monotonic", lambda: joined.worker._lease_end)
    assert not joined.worker.active
    with pytest.raises(LeaseExpired):
        joined.worker.spend()


async def test_dead_keys_are_forgotten():
    joined = await ready()
    await joined.worker.renew()
    (end,) = {key.not_after for key in joined.worker.keys.values()}
    joined.realm.clock.time = end - 1
    assert len(joined.worker.private_keys()) == 2
    joined.realm.clock.time = end
    assert joined.worker.private_keys() == []
    assert joined.worker.keys == {}


async def test_keys_of_two_epochs_live_side_by_side():
    joined = await ready()
    await joined.worker.renew()
    await joined.realm.service.documents.rotate()
    await joined.worker.renew()
    assert {key.epoch for key in joined.worker.keys.values()} == {1, 2}
    assert len(joined.worker.private_keys()) == 4


async def test_models_that_left_the_pool_are_dropped():
    joined = await ready()
    await joined.worker.renew()
    joined.realm.service.log.state.models.clear()
    await joined.worker.renew()
    assert joined.worker.models == {}


async def test_a_worker_of_no_pool():
    with pytest.raises(UsageError):
        Membership(None, None, configuration("key-service"), None)  # type: ignore[arg-type]


# -- the document --------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 40, 400, 4000, -1])
async def test_altered_document(position):
    joined = await ready()

    def alter(raw: bytes) -> bytes:
        altered = bytearray(raw)
        altered[position] ^= 1
        return bytes(altered)

    joined.link.document_as = alter
    await refused(joined, (Tampered, BindingRefused, FormatError))
    assert joined.link.sent == []  # nothing was asked of whoever answers for it


@pytest.mark.parametrize("raw", [b"", b"x", b"\xff" * 100])
async def test_no_document(raw):
    joined = await ready()
    joined.link.document_as = lambda _: raw
    await refused(joined, FormatError)


async def test_a_document_of_another_service():
    joined = await ready()
    other = await Realm.start()
    joined.link.document_as = lambda _: other.service.documents.raw
    await refused(joined, BindingRefused, "binding.service")


async def test_a_key_service_that_its_own_configuration_does_not_name():
    joined = await ready(key_service=policy(STRANGER))
    await refused(joined, AppraisalRefused, "appraisal.mr_enclave")
    joined = await ready(key_service=policy(KEY_SERVICE, root=None))
    await refused(joined, AppraisalRefused, "appraisal.simulated")


async def test_an_expired_document():
    joined = await ready()
    joined.realm.clock.time += 700
    await refused(joined, EvidenceRefused, "document.expired")


async def test_a_document_from_before_a_restart():
    joined = await ready()
    stale = joined.realm.service.documents.raw
    joined.link.realm = await Realm.start(joined.realm.host, joined.realm.clock)
    joined.link.document_as = lambda _: stale
    await refused(joined, TransportError, "transport.key")  # its keys died with the process
    joined.link.document_as = lambda raw: raw
    await joined.worker.renew()


# -- messages to the key service -----------------------------------------------


def flip(message: bytes, position: int) -> bytes:
    altered = bytearray(message)
    altered[position] ^= 1
    return bytes(altered)


@pytest.mark.parametrize("which", [0, 1], ids=["challenge request", "release request"])
@pytest.mark.parametrize(
    "change",
    [
        lambda message: flip(message, 0),
        lambda message: flip(message, 2),
        lambda message: flip(message, 50),
        lambda message: flip(message, 1200),
        lambda message: flip(message, -1),
        lambda message: message[:-1],
        lambda message: message[:9],
        lambda message: b"",
        lambda message: message + b"x",
    ],
    ids=["key id", "suite", "enc", "ciphertext", "tag", "cut", "cut in enc", "empty", "extended"],
)
async def test_altered_on_the_way_up(which, change):
    joined = await ready()
    joined.link.up = lambda number, message: change(message) if number == which else message
    error = await refused(joined, TransportError)
    assert error.code in ("transport.status", "transport.key")


async def test_the_second_request_in_place_of_the_first_and_vice_versa():
    joined = await ready()
    await joined.worker.renew()
    recorded = list(joined.link.sent)
    count = len(recorded)
    for number, other in ((0, recorded[1]), (0, recorded[0]), (1, recorded[0]), (1, recorded[1])):
        joined.link.sent.clear()
        joined.link.up = lambda n, message, number=number, other=other: other if n == number else message
        await refused(joined, Tampered, "ohttp.open")  # an answer to another encapsulation
    assert count == 2


async def test_a_recorded_release_request_releases_nothing():
    joined = await ready()
    await joined.worker.renew()
    answer = await joined.realm.outer(joined.link.sent[1])
    assert answer.status == 200
    assert joined.realm.service._challenges._spent
    request = joined.realm.release_request()
    await joined.realm.service.release(request)
    with pytest.raises(Replayed):
        await joined.realm.service.release(request)


# -- answers of the key service ------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["challenge", "release"])
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda body: flip(body, 0), Tampered),
        (lambda body: flip(body, 40), Tampered),
        (lambda body: flip(body, -1), Tampered),
        (lambda body: body[:-1], Tampered),
        (lambda body: body + b"x", Tampered),
        (lambda body: body[:20], FormatError),
        (lambda body: b"", FormatError),
    ],
    ids=["nonce", "ciphertext", "tag", "cut", "extended", "short", "empty"],
)
async def test_altered_on_the_way_down(which, change, kind):
    joined = await ready()
    joined.link.down = lambda number, answer: (
        Answer(body=change(bytes(answer.body))) if number == which else answer
    )
    await refused(joined, kind)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("status", [204, 302, 400, 403, 429, 500, 503])
async def test_outer_errors(which, status):
    joined = await ready()
    joined.link.down = lambda number, answer: Answer(status=status) if number == which else answer
    kind = (Overloaded, "overloaded.host") if status == 429 else (TransportError, "transport.status")
    error = await refused(joined, *kind)
    assert error.retryable


async def test_answers_of_earlier_exchanges():
    joined = await ready()
    await joined.worker.renew()
    recorded = list(joined.link.answers)
    for number in (0, 1):
        for answer in recorded:
            joined.link.sent.clear()
            joined.link.down = lambda n, a, number=number, answer=answer: (
                Answer(body=answer) if n == number else a
            )
            await refused(joined, Tampered, "ohttp.open")


async def test_answers_cross_wired_between_two_workers():
    joined = await ready()
    other = Joined(joined.realm)
    answers: list[Answer] = []
    gate = asyncio.Event()

    async def held(link: Link, message: bytes) -> Answer:
        link.sent.append(bytes(message))
        answer = await joined.realm.outer(bytes(message))
        answers.append(answer)
        if len(answers) == 2:
            gate.set()
        await gate.wait()
        return answers[1] if answer is answers[0] else answers[0]

    for each in (joined, other):
        each.link.send = lambda sent, link=each.link: held(link, sent.body)  # type: ignore[method-assign]
    results = await asyncio.gather(joined.worker.renew(), other.worker.renew(), return_exceptions=True)
    assert [result.code for result in results] == ["ohttp.open", "ohttp.open"]


# -- a key service that is genuine, but whose answers are wrong inside ----------


def inside(monkeypatch: pytest.MonkeyPatch, path: bytes, change: Callable[[bytes], bytes]) -> None:
    """Change what a route answers before it is encapsulated."""
    route = routes_module._ROUTES[path]

    async def changed(service: Any, content: memoryview) -> bytes:
        return change(await route(service, content))

    monkeypatch.setitem(routes_module._ROUTES, path, changed)


@pytest.mark.parametrize("size", [0, 10, -1])
@pytest.mark.parametrize("path", [b"/challenges", b"/releases"])
async def test_truncated_inside(monkeypatch, path, size):
    joined = await ready()
    inside(monkeypatch, path, lambda raw: raw[:size])
    await refused(joined, FormatError)


async def test_a_challenge_of_another_service_or_with_a_rewritten_log(monkeypatch):
    joined = await ready()
    await joined.worker.renew()
    identity = joined.realm.service.log.identity
    forged = TreeHead.sign(owner_key("mallory"), size=90, root=bytes(32), time=NOW)
    fork = TreeHead.sign(identity, size=90, root=bytes(32), time=NOW)
    older = TreeHead.sign(identity, size=2, root=joined.realm.service.log.tree.root(2), time=NOW)
    for head, kind, code in (
        (forged, BindingRefused, "binding.service"),
        (dataclasses.replace(fork, time=1), Tampered, "tampered.signature"),
        (fork, Rollback, "rollback.fork"),
        (older, Rollback, "rollback.head"),
    ):
        with monkeypatch.context() as patch:
            inside(
                patch,
                b"/challenges",
                lambda raw, head=head: dataclasses.replace(Challenge.from_bytes(raw), head=head).to_bytes(),
            )
            await refused(joined, kind, code)


async def test_a_challenge_of_an_older_line_than_the_document(monkeypatch):
    """On a first visit nothing is known but the document's own head."""
    joined = await ready()
    log = joined.realm.service.log
    older = TreeHead.sign(log.identity, size=2, root=log.tree.root(2), time=NOW)
    inside(
        monkeypatch,
        b"/challenges",
        lambda raw: dataclasses.replace(Challenge.from_bytes(raw), head=older).to_bytes(),
    )
    await refused(joined, Rollback, "rollback.head")


async def test_a_store_that_was_put_back_is_noticed_by_the_worker():
    joined = await ready()
    realm = joined.realm
    older = MemoryHost(records={table: dict(rows) for table, rows in realm.host.records.items()})
    for name in ("a", "b", "c"):
        await realm.create_pool(dataclasses.replace(realm.pool, name=name))
    await joined.worker.renew()
    joined.link.realm = await Realm.start(older, realm.clock)
    await refused(joined, Rollback, "rollback.store")
    assert joined.link.realm.service.halted


async def test_sealed_statements_swapped_inside(monkeypatch):
    joined = await ready()

    def change(raw: bytes, statements: tuple[bytes, ...]) -> bytes:
        return dataclasses.replace(SealedRelease.from_bytes(raw), statements=statements).to_bytes()

    for statements in ((), (bytes(32),), (bytes(32), bytes(32))):
        with monkeypatch.context() as patch:
            inside(patch, b"/releases", lambda raw, statements=statements: change(raw, statements))
            await refused(joined, Tampered, "hpke.open")


class Resealing:
    """Lets a test change a release and seals it again, as only the key service itself could.

    Where other statements are to be ``announced`` beside it, their digests are bound as the proper ones are.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        change: Callable[[Release], Release],
        announced: tuple[bytes, ...] | None = None,
    ) -> None:
        seal = hpke.seal_to

        def sealed(suite: Any, public: bytes, plaintext: bytes, *, info: bytes, aad: bytes = b"") -> bytes:
            changed = change(Release.from_bytes(plaintext)).to_bytes()
            return seal(suite, public, changed, info=info, aad=aad)

        monkeypatch.setattr("cloister.enclave.keyservice.service.hpke.seal_to", sealed)
        if announced is None:
            return
        service = "cloister.enclave.keyservice.service"
        monkeypatch.setattr(
            f"{service}.release_info",
            lambda request, *, pool, statements: release_info(request, pool=pool, statements=announced),
        )
        monkeypatch.setattr(
            f"{service}.SealedRelease",
            lambda *, statements, sealed: SealedRelease(statements=announced, sealed=sealed),
        )


def with_certificate(release: Release, realm: Realm, **changes: Any) -> Release:
    fields = {
        name: getattr(release.certificate, name)
        for name in release.certificate.__slots__
        if name not in ("service", "signature")
    }
    made = WorkerCertificate.sign(realm.service.log.identity, **{**fields, **changes})
    return dataclasses.replace(release, certificate=made)


@pytest.mark.parametrize(
    "change", [{"pool": bytes(32)}, {"incarnation": bytes(16)}, {"public_key": bytes(32)}], ids=str
)
async def test_a_certificate_for_somebody_else(monkeypatch, change):
    joined = await ready()
    Resealing(monkeypatch, lambda release: with_certificate(release, joined.realm, **change))
    await refused(joined, BindingRefused, "binding.certificate")


async def test_a_certificate_by_another_key(monkeypatch):
    joined = await ready()
    mallory = owner_key("mallory")
    Resealing(
        monkeypatch,
        lambda release: dataclasses.replace(
            release,
            service_key=mallory.public,
            certificate=WorkerCertificate.sign(
                mallory,
                **{
                    name: getattr(release.certificate, name)
                    for name in ("pool", "epoch", "measurement", "incarnation", "public_key", "not_after")
                },
            ),
        ),
    )
    await refused(joined, BindingRefused, "binding.certificate")


async def test_a_certificate_that_the_service_did_not_sign(monkeypatch):
    joined = await ready()
    for change in ({"signature": bytes(64)}, {"epoch": 77}, {"not_after": NOW + 99_999}):
        with monkeypatch.context() as patch:
            Resealing(
                patch,
                lambda release, change=change: dataclasses.replace(
                    release, certificate=dataclasses.replace(release.certificate, **change)
                ),
            )
            await refused(joined, Tampered, "tampered.signature")


async def test_a_statement_that_the_owner_did_not_sign(monkeypatch):
    joined = await ready()

    def forge(release: Release) -> Release:
        (model,) = release.models
        forged = dataclasses.replace(model.statement, signature=bytes(64))
        return dataclasses.replace(release, models=(dataclasses.replace(model, statement=forged),))

    Resealing(monkeypatch, forge)
    await refused(joined, Tampered, "tampered.signature")


async def test_a_statement_other_than_the_announced_one(monkeypatch):
    joined = await ready()
    other = joined.realm.publication(statement(joined.realm.id, name="other")).statement
    foreign = joined.realm.publication(statement(bytes(32))).statement
    for signed, announced in ((other, None), (foreign, (foreign.open().digest,))):
        with monkeypatch.context() as patch:
            Resealing(
                patch,
                lambda release, signed=signed: dataclasses.replace(
                    release, models=(dataclasses.replace(release.models[0], statement=signed),)
                ),
                announced=announced,
            )
            error = await refused(joined, BindingRefused, "binding.statement")
            assert error.claim == "statement"


async def test_fewer_or_more_models_than_announced(monkeypatch):
    joined = await ready()
    for times in (0, 2):
        with monkeypatch.context() as patch:
            Resealing(patch, lambda release, n=times: dataclasses.replace(release, models=release.models * n))
            await refused(joined, BindingRefused, "binding.statement")


async def test_a_statement_older_than_one_already_held():
    joined = await ready()
    realm = joined.realm
    first = next(iter(realm.service.log.state.models.values()))
    await realm.publish(realm.next(first.statement), key=None)
    await joined.worker.renew()
    realm.service.log.state.models[first.statement.model] = first
    await refused(joined, Rollback, "rollback.statement")


async def test_a_pool_key_that_is_not_its_configuration_s(monkeypatch):
    joined = await ready()

    def swap(release: Release) -> Release:
        one, two = release.pool_keys
        wrong = PoolKey(
            epoch=one.epoch,
            not_after=one.not_after,
            configuration=one.configuration,
            private_key=kem_key().to_secret(),
        )
        return dataclasses.replace(release, pool_keys=(wrong, two))

    Resealing(monkeypatch, swap)
    await refused(joined, BindingRefused, "binding.pool-key")


# -- the worker itself is not one to trust -------------------------------------


@pytest.mark.parametrize(
    ("measurement", "changes", "code"),
    [
        (STRANGER, {}, "appraisal.mr_enclave"),
        (KEY_SERVICE, {}, "appraisal.mr_enclave"),
        (WORKER, {"service": b"o" * 32}, "binding.service"),
    ],
)
async def test_workers_that_may_not_join(measurement, changes, code):
    joined = await ready(measurement, **changes)
    await refused(joined, (AppraisalRefused, BindingRefused), code)


async def test_evidence_under_another_root():
    joined = await ready()
    joined.attester.root = "host"
    await refused(joined, EvidenceRefused, "evidence.root")


async def test_a_pool_that_the_service_does_not_have():
    joined = await ready(pool=dataclasses.replace((await Realm.start()).pool, name="unknown"))
    await refused(joined, CloisterError, "not-found.pool")


async def test_a_store_that_is_away():
    joined = await ready()
    joined.realm.host.writes = "refused"
    await refused(joined, Unavailable, "store.write")


async def test_each_renewal_asks_with_fresh_keys_and_evidence():
    joined = await ready()
    requests: list[ReleaseRequest] = []
    release = joined.realm.service.release

    async def seen(request: ReleaseRequest) -> SealedRelease:
        requests.append(request)
        return await release(request)

    joined.realm.service.release = seen  # type: ignore[method-assign]
    await joined.worker.renew()
    await joined.worker.renew()
    one, two = (request.attestation.binding for request in requests)
    assert one.keys[0] != two.keys[0]
    assert one.keys[1] == two.keys[1]  # the signing key, of this incarnation
    assert one.freshness != two.freshness
    assert requests[0].incarnation == requests[1].incarnation == joined.worker.incarnation
    assert joined.attester.made == 2


async def test_nothing_readable_leaves_the_worker():
    joined = await ready()
    await joined.worker.renew()
    (live,) = joined.worker.models.values()
    secrets = [live.key.reveal(), *(key.to_secret().reveal() for _, key in joined.worker.private_keys())]
    seen = b"".join((*joined.link.sent, *joined.link.answers))
    assert not any(secret in seen for secret in secrets)
    assert joined.worker._signing_key.public not in seen
    assert "K" * 8 not in repr(live) + repr(joined.worker.keys)
    assert decode(encode({}), what="x") == {}


async def test_keys_die_though_the_host_cuts_the_link():
    joined = await ready()
    await joined.worker.renew()
    worker = Worker(joined.worker, ModelCache(joined.link, budget=1 << 20))
    worker.server = EnclaveServer(lambda request: None)
    worker._serve_keys()
    assert worker.server._gateway._keys
    joined.realm.clock.time += 30 * 86400  # by an honest clock
    joined.link.down = lambda number, answer: Answer(status=500)
    stop = asyncio.Event()
    kept = asyncio.ensure_future(worker.keep(stop))
    await asyncio.sleep(0.05)
    stop.set()
    await kept
    assert worker.server._gateway._keys == {}
    assert joined.worker.keys == {}


async def test_keys_die_though_the_host_sets_the_clock_back(monkeypatch):
    joined = await ready()
    await joined.worker.renew()
    renewed = time.monotonic()
    (end,) = {key.not_after for key in joined.worker.keys.values()}
    joined.realm.clock.time -= 365 * 86400
    monkeypatch.setattr(membership_module.time, "monotonic", lambda: renewed + end - NOW - 60)
    assert len(joined.worker.private_keys()) == 2
    monkeypatch.setattr(membership_module.time, "monotonic", lambda: renewed + end - NOW)
    assert joined.worker.private_keys() == []


async def test_no_key_lives_longer_than_an_epoch_may_last(monkeypatch):
    """Not even one for which the key service has said a year, where the host holds the clock."""
    joined = await ready()

    def lengthen(release: Release) -> Release:
        keys = (dataclasses.replace(key, not_after=NOW + 365 * 86400) for key in release.pool_keys)
        return dataclasses.replace(release, pool_keys=tuple(keys))

    with monkeypatch.context() as patch:
        Resealing(patch, lengthen)
        await joined.worker.renew()
    renewed = time.monotonic()
    assert len(joined.worker.private_keys()) == 2
    monkeypatch.setattr(membership_module.time, "monotonic", lambda: renewed + MAX_EPOCH + CLOCK_SKEW)
    assert joined.worker.private_keys() == []


async def test_the_clock_never_falls_behind_a_head():
    """A host that lets the worker's clock run late can't make it believe what had ended by the log's time."""
    joined = await ready()
    late = Clock(NOW - 60)
    configuration = joined.realm.worker_configuration()
    worker = Membership(joined.link, joined.attester, configuration, HintedClock(late))  # type: ignore[arg-type]
    await worker.renew()
    assert worker.head.time > late.time
    assert worker._clock.now() == worker.head.time


async def test_a_head_is_remembered_whatever_becomes_of_the_release():
    joined = await ready()
    joined.link.down = lambda number, answer: Answer(status=500) if number == 1 else answer
    await refused(joined, TransportError)
    assert joined.worker.head.size == len(joined.realm.service.log.tree) - 1  # the release itself is logged
