"""Publishing to a service in this process, through hosts that lose, replay and put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from cloister.core.protocol.pool import Pool
from cloister.core.protocol.statement import Statement
from cloister.errors import (
    AccessRefused,
    AppraisalRefused,
    BindingRefused,
    CloisterError,
    NotFound,
    Rollback,
    TransportError,
    Unavailable,
    UsageError,
)
from cloister.owner.desk import Desk
from cloister.owner.policy import ModelPolicy
from cloister.owner.publish import Publisher
from cloister.owner.seal import seal_model
from support.realm import DAY, KEY_SERVICE, NOW, STRANGER, WORKER, MemoryHost, Realm, policy
from support.stage import DIGITS, Theatre

POLICY = ModelPolicy(release=policy(WORKER), key_service=policy(KEY_SERVICE))


class Office:
    """A desk with a sealed model, before a service."""

    def __init__(self, theatre: Theatre, desk: Desk, folder: Path) -> None:
        self.theatre = theatre
        self.desk = desk
        self.file = folder / "digits.sealed"
        self.seal()
        self.pool = Pool(name="mine", policy=policy(WORKER))
        self.create(self.pool)

    def seal(self) -> None:
        seal_model(self.desk, "digits", DIGITS, self.file)

    def create(self, pool: Pool) -> None:
        self.theatre.backstage.run(self.theatre.realm.create_pool(pool, owner=self.desk.owner))

    def publisher(self, transport: httpx.BaseTransport | None = None, **options: Any) -> Publisher:
        fields = {"service": self.theatre.realm.id, "key_service": policy(KEY_SERVICE)}
        return Publisher(
            self.desk,
            "http://service.test",
            transport=transport or self.theatre.transport(),
            now=self.theatre.realm.clock.now,
            **{**fields, **options},
        )

    def publish(self, made: ModelPolicy = POLICY, **options: Any) -> Statement:
        with self.publisher() as publisher:
            return publisher.publish("digits", made, self.file, **{"pool": self.pool.id, **options})

    @property
    def state(self) -> Any:
        return self.theatre.realm.service.log.state.models.get(self.desk.model_id("digits"))

    @property
    def uploads(self) -> int:
        return sum(request.method == "PUT" for request in self.theatre.requests)


@pytest.fixture
def office(theatre, desk, tmp_path) -> Office:
    return Office(theatre, desk, tmp_path)


def refused(kind: type[CloisterError], code: str, work: Any) -> CloisterError:
    with pytest.raises(kind) as caught:
        work()
    assert caught.value.code == code, str(caught.value)
    return caught.value


def test_publish_grant_revoke(office):
    done = []
    first = office.publish(progress=lambda *given: done.append(given))
    assert office.state.statement == first
    assert office.state.key == office.desk.model("digits").key
    assert office.theatre.realm.host.blobs[first.sealed_model.blob] == office.file.read_bytes()
    assert done[-1] == (first.sealed_model.size,) * 2
    with office.publisher() as publisher:
        granted = publisher.grant("digits", b"u" * 32, NOW + DAY)
        assert (granted.version, granted.previous, granted.grants) == (
            2,
            first.digest,
            {b"u" * 32: NOW + DAY},
        )
        revoked = publisher.revoke("digits", b"u" * 32)
        assert (revoked.version, revoked.grants) == (3, {})
        refused(NotFound, "not-found.grant", lambda: publisher.revoke("digits", b"u" * 32))
    assert office.state.statement == revoked == office.desk.model("digits").current()
    assert office.desk.memory(office.theatre.realm.id).head.size == len(office.theatre.realm.service.log.tree)


def test_a_new_version_keeps_its_grants(office):
    office.publish()
    with office.publisher() as publisher:
        publisher.grant("digits", b"u" * 32, NOW + DAY)
    office.seal()
    second = office.publish()
    assert second.version == 3
    assert second.grants == {b"u" * 32: NOW + DAY}
    assert office.state.key == office.desk.model("digits").key


def test_neither_key_nor_model_is_readable_on_the_way(office):
    office.publish()
    key = office.desk.model("digits").key.reveal()
    seed = office.desk.key.seed().reveal()
    for request in office.theatre.requests:
        assert key not in request.read()
        assert seed not in request.read()
        assert b"Conv" not in request.read()
    stored = b"".join(
        value for rows in office.theatre.realm.host.records.values() for _, value in rows.values()
    )
    assert key not in stored


# -- refusals ------------------------------------------------------------------


def test_another_service_than_the_pinned_one(office):
    publisher = office.publisher(service=bytes(32))
    refused(BindingRefused, "binding.service", publisher.verify)
    assert office.uploads == 0


def test_a_key_service_that_the_owner_does_not_accept(office):
    publisher = office.publisher(key_service=policy(STRANGER))
    refused(AppraisalRefused, "appraisal.mr_enclave", publisher.verify)
    publisher = office.publisher(key_service=policy(KEY_SERVICE, root=None))
    refused(AppraisalRefused, "appraisal.simulated", publisher.verify)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [(policy(STRANGER), "appraisal.mr_enclave"), (policy(KEY_SERVICE, root=None), "appraisal.simulated")],
)
def test_a_key_service_that_the_statement_itself_does_not_accept_gets_nothing(office, wrong, code):
    made = ModelPolicy(release=policy(WORKER), key_service=wrong)
    refused(AppraisalRefused, code, lambda: office.publish(made))
    assert office.uploads == 0
    assert office.state is None
    assert office.desk.model("digits").current() is None


def test_a_pool_that_the_release_policy_does_not_admit(office):
    made = ModelPolicy(release=policy(STRANGER), key_service=policy(KEY_SERVICE))
    refused(AppraisalRefused, "appraisal.not-subset", lambda: office.publish(made))
    assert office.desk.model("digits").current() is None


def test_another_owner_s_pool(office):
    theirs = office.theatre.stage.pool
    refused(AccessRefused, "access.pool", lambda: office.publish(pool=theirs.id))


def test_an_owner_s_only_pool_need_not_be_named(office):
    assert len(office.theatre.realm.service.log.state.pools) == 2  # the other one belongs to somebody else
    office.publish(pool=None)
    assert office.desk.model("digits").pool == office.pool.id


def test_a_pool_that_must_be_named(office):
    office.create(Pool(name="another", policy=policy(WORKER)))
    error = refused(UsageError, "owner.pool", lambda: office.publish(pool=None))
    assert office.pool.id.hex() in error.expected


def test_before_publishing(office):
    with office.publisher() as publisher:
        refused(UsageError, "owner.unpublished", lambda: publisher.grant("digits", b"u" * 32, NOW))
        refused(UsageError, "owner.model", lambda: publisher.grant("other", b"u" * 32, NOW))


def test_a_sealed_file_that_is_gone(office):
    office.file.unlink()
    refused(UsageError, "owner.file", office.publish)
    assert office.state is None


def test_a_host_that_takes_no_upload(office):
    inner = office.theatre.transport()

    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            request.read()
            return httpx.Response(422, stream=httpx.ByteStream(b""))
        return inner.handler(request)

    with office.publisher(httpx.MockTransport(handle)) as publisher:
        refused(
            CloisterError,
            "owner.upload",
            lambda: publisher.publish("digits", POLICY, office.file, pool=office.pool.id),
        )
    assert office.state is None


def test_a_store_that_is_away(office):
    office.theatre.realm.host.writes = "refused"
    refused(Unavailable, "store.write", office.publish)
    assert office.desk.model("digits").current() is None
    office.theatre.realm.host.writes = "ok"
    assert office.publish().version == 1


# -- lost receipts and older stores --------------------------------------------


def losing(office: Office, lost: int) -> httpx.MockTransport:
    """The host delivers, but loses the answer to the ``lost``-th encapsulated request."""
    inner = office.theatre.transport()
    count = 0

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal count
        answer = inner.handler(request)
        if request.url.path == "/ohttp":
            count += 1
            if count == lost:
                raise httpx.ReadError("lost")
        return answer

    return httpx.MockTransport(handle)


def test_a_lost_receipt_is_told_from_a_rollback(office):
    with office.publisher(losing(office, 2)) as publisher, pytest.raises(TransportError):
        publisher.publish("digits", POLICY, office.file, pool=office.pool.id)
    assert office.state.statement.version == 1
    assert office.desk.model("digits").current() is None
    with office.publisher() as publisher:
        first = office.desk.model("digits")
        publisher.publish("digits", POLICY, office.file, pool=office.pool.id)  # the same statement again
        assert office.desk.model("digits").current() == office.state.statement
        assert first.key == office.desk.model("digits").key
    with office.publisher(losing(office, 2)) as publisher, pytest.raises(TransportError):
        publisher.grant("digits", b"u" * 32, NOW + DAY)
    with office.publisher() as publisher:
        refused(UsageError, "owner.receipt", lambda: publisher.grant("digits", b"v" * 32, NOW + DAY))
        assert office.desk.model("digits").current() == office.state.statement
        granted = publisher.grant("digits", b"v" * 32, NOW + DAY)
    assert granted.version == 3
    assert granted.grants.keys() == {b"u" * 32, b"v" * 32}


def test_an_older_store_put_back_is_noticed_by_the_returning_owner(office):
    office.publish()
    host = office.theatre.realm.host
    older = MemoryHost(records={table: dict(rows) for table, rows in host.records.items()})
    with office.publisher() as publisher:
        publisher.grant("digits", b"u" * 32, NOW + DAY)
        publisher.grant("digits", b"v" * 32, NOW + DAY)
        publisher.grant("digits", b"w" * 32, NOW + DAY)
    realm = office.theatre.backstage.run(Realm.start(older, office.theatre.realm.clock))
    office.theatre.stage.realm = realm
    refused(Rollback, "rollback.store", lambda: office.publisher().verify())
    refused(Rollback, "rollback.store", lambda: office.publisher().grant("digits", b"x" * 32, NOW))
    assert realm.service.halted


def test_an_older_store_put_back_is_noticed_even_by_a_desk_that_lost_its_memory(office):
    office.publish()
    host = office.theatre.realm.host
    older = MemoryHost(records={table: dict(rows) for table, rows in host.records.items()})
    with office.publisher() as publisher:
        publisher.grant("digits", b"u" * 32, NOW + DAY)
    office.theatre.stage.realm = office.theatre.backstage.run(Realm.start(older, office.theatre.realm.clock))
    for path in office.desk.directory.glob("*.memory"):
        path.unlink()
    with office.publisher() as publisher:
        refused(Rollback, "rollback.statement", lambda: publisher.grant("digits", b"v" * 32, NOW + DAY))
    assert office.desk.model("digits").current().version == 2
