"""Inference requests and responses, publication and consent, with a malicious host in between."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloister.client.client import Client
from cloister.client.identity import Identity
from cloister.client.session import model_path
from cloister.core import oip
from cloister.core.identity import SigningKey
from cloister.core.ohttp import bhttp, encapsulation, hpke
from cloister.core.ohttp.keyconfig import select
from cloister.core.protocol import problem
from cloister.core.protocol.authorization import FIELD, RequestAuthorization, RequestContext
from cloister.core.protocol.exchange import Publication, StatementQuery
from cloister.core.protocol.release import model_key_info
from cloister.core.protocol.statement import SignedStatement, Statement
from cloister.core.protocol.trust import UserPolicy
from cloister.errors import (
    AccessRefused,
    AppraisalRefused,
    BindingRefused,
    CloisterError,
    NotFound,
    Replayed,
    Rollback,
    Tampered,
    TransportError,
)
from cloister.owner.desk import Desk
from e2e.impostor import Impostor
from e2e.malicious import (
    KEY_SERVICE,
    OTHER,
    Deed,
    MaliciousHost,
    Message,
    Swap,
    Wire,
    answer,
    delay,
    drop,
    eventually,
    extend,
    flip,
    redirect,
    refusal,
    substitute,
    truncate,
)
from e2e.world import World

SETTLE = 0.3  # seconds after which the gateway serves the newest document, so that one exchange is enough


@pytest.fixture
def pool(service: World) -> str:
    return service.pool.hex()


@pytest.fixture
def client(service: World, url: str) -> Any:
    """A user's client behind the malicious host; it has verified the service."""
    with service.client(url) as made:
        made.verify()
        yield made


# The request (user -> worker).


@pytest.mark.parametrize(
    ("deed", "code"),
    [
        pytest.param(flip(0), "ohttp.key", id="altered-key-id"),
        pytest.param(flip(1), "ohttp.key", id="altered-kem"),
        pytest.param(flip(6), "ohttp.key", id="altered-aead"),
        pytest.param(flip(7), "ohttp.open", id="altered-enc"),
        pytest.param(flip(1126), "ohttp.open", id="altered-enc-end"),
        pytest.param(flip(1127), "ohttp.open", id="altered-ciphertext"),
        pytest.param(flip(-1), "ohttp.open", id="altered-tag"),
        pytest.param(truncate(1), "ohttp.open", id="truncated"),
        pytest.param(truncate(1 << 20), "ohttp.request", id="empty"),
        pytest.param(extend(), "ohttp.open", id="extended"),
    ],
)
def test_a_request_that_was_tampered_with_is_refused_by_every_worker(
    service: World, client: Client, wire: Wire, pool: str, deed: Deed, code: str
) -> None:
    """And the user gets a right answer as soon as the host lets one request pass."""
    wire.on(pool, "request", deed)
    assert service.serves(client)
    first, *_, last = wire.exchanges(pool)
    assert (first.answer.status, first.answer.code) == (400, code)
    assert (last.answer.status, last.request.body[7:]) != (400, first.request.body[7:])  # encapsulated anew


def test_a_request_that_is_always_tampered_with_gives_a_retryable_error(
    service: World, client: Client, wire: Wire, pool: str
) -> None:
    wire.on(pool, "request", flip(-1), times=99)
    error = refusal(lambda: service.serves(client))
    assert isinstance(error, TransportError)
    assert error.retryable
    assert len({each.request.body for each in wire.exchanges(pool)}) == len(wire.exchanges(pool))


@pytest.mark.parametrize("kind", [400, 429, 500, 503])
def test_outer_errors_never_lead_to_a_weaker_suite_or_key(
    service: World, client: Client, wire: Wire, pool: str, kind: int
) -> None:
    hint = b'{"type": "https://iana.org/assignments/http-problem-types#ohttp-key", "code": "ohttp.key"}'
    wire.on(pool, "answer", answer(kind, hint), times=2)
    assert service.serves(client)
    configuration, suite = select(client.session.conversation.current().document.pool(service.pool).keys)
    assert suite.kem_id == 0x647A  # X-Wing
    headers = {each.request.body[:7] for each in wire.exchanges(pool)}
    assert headers == {bytes([configuration.key_id]) + suite.to_bytes()}
    assert len(wire.exchanges(pool)) == 3


def test_an_outer_success_of_the_hosts_own_making_is_refused(
    service: World, client: Client, wire: Wire, pool: str
) -> None:
    wire.on(pool, "answer", answer(200, b'{"outputs": []}', "application/json"), times=99)
    error = refusal(lambda: service.serves(client))
    assert error.code in ("ohttp.response", "ohttp.open")


def test_a_dropped_request_is_made_anew(service: World, client: Client, wire: Wire, pool: str) -> None:
    wire.on(pool, "request", drop)
    assert service.serves(client)


def test_a_dropped_answer_is_asked_for_anew(service: World, client: Client, wire: Wire, pool: str) -> None:
    wire.on(pool, "answer", drop)
    assert service.serves(client)
    encs = {each.request.body[7:1127] for each in wire.exchanges(pool)}
    assert len(encs) == len(wire.exchanges(pool))  # never the same bytes twice


def test_a_late_answer_only_costs_time(service: World, client: Client, wire: Wire, pool: str) -> None:
    wire.on(pool, "answer", delay(0.4))
    assert service.serves(client)


# The response (worker -> user).


@pytest.mark.parametrize(
    ("deed", "code"),
    [
        pytest.param(flip(0), "ohttp.open", id="altered-nonce"),
        pytest.param(flip(32), "ohttp.open", id="altered-ciphertext"),
        pytest.param(flip(-1), "ohttp.open", id="altered-tag"),
        pytest.param(truncate(1), "ohttp.open", id="truncated"),
        pytest.param(truncate(1 << 20), "ohttp.response", id="empty"),
        pytest.param(extend(), "ohttp.open", id="extended"),
    ],
)
def test_an_answer_that_was_tampered_with_is_refused(
    service: World, client: Client, wire: Wire, pool: str, deed: Deed, code: str
) -> None:
    wire.on(pool, "answer", deed)
    error = refusal(lambda: service.serves(client))
    assert error.code == code
    assert service.serves(client)


def test_an_earlier_answer_is_refused(service: World, client: Client, wire: Wire, pool: str) -> None:
    assert service.serves(client)
    wire.on(pool, "answer", substitute(wire.exchanges(pool)[-1].answer.body))
    error = refusal(lambda: service.serves(client))
    assert (type(error), error.code) == (Tampered, "ohttp.open")


@pytest.mark.parametrize("direction", ["request", "answer"])
def test_requests_or_answers_swapped_in_flight_are_refused(
    service: World, url: str, wire: Wire, pool: str, direction: Any
) -> None:
    """Two users' messages at the same time: neither gets the other's answer."""
    with service.client(url) as one, service.client(url) as two:
        for each in (one, two):
            each.verify()
        wire.on(pool, direction, Swap(), times=2)
        with ThreadPoolExecutor(2) as both:
            errors = list(
                both.map(
                    lambda each: refusal(lambda: service.serves(each[0], seed=each[1])), ((one, 1), (two, 2))
                )
            )
        assert [error.code for error in errors] == ["ohttp.open", "ohttp.open"]
        assert service.serves(one)
        assert service.serves(two)


# Captured requests, sent again by the host.


def captured(wire: Wire, pool: str) -> Message:
    return wire.exchanges(pool)[-1].request


def resend(url: str, message: Message, pool: str) -> httpx.Response:
    fields = {**message.fields, "cloister-pool": pool}
    return httpx.post(f"{url}/ohttp", content=message.body, headers=fields, trust_env=False)


def test_a_replayed_request_is_refused_by_name_by_the_worker_that_answered_it(
    service: World, host: MaliciousHost, wire: Wire
) -> None:
    """The user's own bytes, twice: the host forwards both and hands back the second answer."""
    alone = host.worker(service.site, "alone", pool="default", registered=False)
    alone.start()

    async def twice(message: Message) -> Message:
        transport = httpx.AsyncHTTPTransport(uds=str(alone.socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://enclave") as http:
            for _ in range(2):
                got = await http.post("/ohttp", content=message.body, headers=dict(message.fields))
        return Message(status=got.status_code, body=got.content, fields={"content-type": "message/ohttp-res"})

    wire.on(service.pool.hex(), "request", twice)
    with service.client(host.front(service.url, wire)) as client:
        error = refusal(lambda: service.serves(client))
        assert (type(error), error.code) == (Replayed, "replayed.request")
        assert service.serves(client)


def test_a_captured_request_sent_to_another_pool_is_refused(
    service: World, client: Client, wire: Wire, pool: str, second_pool: bytes, host: MaliciousHost
) -> None:
    host.worker(service.site, "second-1", pool="second").start()
    assert service.serves(client)
    got = resend(service.url, captured(wire, pool), second_pool.hex())
    assert got.status_code == 400
    assert got.json()["code"] in ("ohttp.key", "ohttp.open")
    wire.on(pool, "request", redirect(second_pool.hex()), times=99)
    error = refusal(lambda: service.serves(client))
    assert isinstance(error, TransportError)
    wire.behave()
    assert service.serves(client)


def test_a_captured_request_sent_to_the_key_service_is_refused(
    service: World, client: Client, wire: Wire, pool: str
) -> None:
    assert service.serves(client)
    assert resend(service.url, captured(wire, pool), KEY_SERVICE).json()["code"] in (
        "ohttp.key",
        "ohttp.open",
    )


def test_a_captured_request_sent_to_another_service_is_refused(
    service: World, other: World, client: Client, wire: Wire, pool: str
) -> None:
    assert service.serves(client)
    got = resend(other.url, captured(wire, pool), other.pool.hex())
    assert got.status_code == 400
    assert got.json()["code"] in ("ohttp.key", "ohttp.open")


def test_a_captured_request_serves_no_later_epoch(other: World, host: MaliciousHost) -> None:
    """Keys live for 10 s here. The client goes on by itself; the captured request is worth nothing."""
    wire, pool = Wire(), other.pool.hex()
    with other.client(host.front(other.url, wire)) as client:
        assert other.serves(client)
        message, entry = captured(wire, pool), client.session.conversation.current().document.pool(other.pool)
        again = resend(other.url, message, pool)
        assert again.status_code == 200  # while the key lives, the refusal is inside
        while time.time() <= entry.not_after + 2.5:  # and a renewal
            assert other.serves(client)
            time.sleep(0.25)
        got = resend(other.url, message, pool)
        assert (got.status_code, got.json()["code"]) == (400, "ohttp.key")
        assert client.record.epoch > entry.epoch


# What a user signs, one thing at a time. The encapsulation is the user's own: only the signature is wrong.


def craft(
    service: World,
    /,
    *,
    name: str = "digits",
    path: bytes | None = None,
    key: SigningKey | None = None,
    field: bytes | None = None,
    expiry: int = 60,
    change: Callable[[RequestAuthorization], RequestAuthorization] = lambda authorization: authorization,
    statement: bytes | None = None,
    **context: Any,
) -> bhttp.Response:
    """Send one request with a signature that differs from the honest one in what is given."""
    document, model = service.verified().document, service.model(name)
    entry = document.pool(service.pool)
    configuration, suite = select(entry.keys)
    sealer = encapsulation.begin(configuration, suite)
    signed = {
        "service": document.service,
        "pool": service.pool,
        "epoch": entry.epoch,
        "model": model,
        "enc": sealer.enc,
        **context,
    }
    authorization = change(
        RequestAuthorization.sign(
            key or service.user.key_at(service.desk.owner),
            RequestContext(**signed),
            statement=statement or entry.model(model).statement,
            request_id=os.urandom(16),
            expiry=int(time.time()) + expiry,
        )
    )
    header, buffers = oip.encode_request(service.sample(name, 3))
    fields = (
        (b"content-type", b"application/octet-stream"),
        (oip.HEADER_LENGTH, b"%d" % len(header)),
        *(() if field == b"" else ((FIELD, field or authorization.to_field()),)),
    )
    inner = bhttp.Request(
        method=b"POST",
        path=path or model_path(model, "infer"),
        fields=fields,
        content=b"".join((header, *buffers)),
    )
    got = httpx.post(
        f"{service.url}/ohttp",
        content=bytes(sealer.seal(inner.to_bytes(pad=True))),
        headers={"content-type": "message/ohttp-req", "cloister-pool": service.pool.hex()},
        trust_env=False,
    )
    assert got.status_code == 200
    return bhttp.Response.from_bytes(sealer.open(got.content))


def craft_refused(service: World, /, **chosen: Any) -> CloisterError:
    response = craft(service, **chosen)
    assert response.status != 200
    return problem.from_bytes(memoryview(response.content))


def test_an_honest_signature_is_served(service: World) -> None:
    assert craft(service).status == 200


@pytest.mark.parametrize("what", ["service", "pool", "epoch", "model", "enc"])
def test_a_signature_for_another(service: World, what: str) -> None:
    context: dict[str, Any] = {
        "service": bytes(32),
        "pool": bytes(32),
        "epoch": 10**6,
        "model": service.model("diagnosis"),
        "enc": os.urandom(1120),
    }
    error = craft_refused(service, **{what: context[what]})
    assert (type(error), error.code) == (BindingRefused, "binding.request")


def test_a_signature_taken_from_another_request_is_refused(service: World) -> None:
    """What a compromised worker or another user could do with a signature that it saw."""
    taken: list[bytes] = []

    def keep(authorization: RequestAuthorization) -> RequestAuthorization:
        taken.append(authorization.to_field())
        return authorization

    assert craft(service, change=keep).status == 200
    error = craft_refused(service, field=taken[0])
    assert (type(error), error.code) == (BindingRefused, "binding.request")


def test_a_request_sent_to_another_models_path_is_refused(service: World) -> None:
    path = model_path(service.model("diagnosis"), "infer")
    assert craft_refused(service, path=path).code == "binding.request"


@pytest.mark.parametrize("what", ["expiry", "request_id", "statement", "allow_outside_stages", "signature"])
def test_an_altered_authorization_is_refused(service: World, what: str) -> None:
    values = {
        "expiry": int(time.time()) + 300,
        "request_id": bytes(16),
        "statement": bytes(32),
        "allow_outside_stages": True,
        "signature": bytes(64),
    }
    error = craft_refused(service, change=lambda given: replace(given, **{what: values[what]}))
    assert (type(error), error.code) == (BindingRefused, "binding.request")


def test_another_users_key_under_a_taken_signature_is_refused(service: World) -> None:
    other = SigningKey.generate().public
    assert (
        craft_refused(service, change=lambda given: replace(given, user_key=other)).code == "binding.request"
    )


@pytest.mark.parametrize("expiry", [-1, 10_000])
def test_an_expired_or_endless_signature_is_refused(service: World, expiry: int) -> None:
    error = craft_refused(service, expiry=expiry)
    assert (type(error), error.code) == (AccessRefused, "access.request-expiry")


def test_an_unsigned_request_is_refused(service: World) -> None:
    assert craft_refused(service, field=b"").code == "access.authorization"


@pytest.mark.parametrize("field", [b"!", b"AAAA", b"A" * 2000])
def test_a_garbage_authorization_is_refused(service: World, field: bytes) -> None:
    assert craft_refused(service, field=field).code.startswith("format")


def test_a_statement_that_the_user_did_not_accept_is_refused(service: World) -> None:
    error = craft_refused(service, statement=bytes(32))
    assert (type(error), error.code) == (AccessRefused, "access.statement")


def test_a_model_that_the_pool_does_not_serve_is_refused(service: World) -> None:
    absent = service.desk.model_id("absent")
    error = craft_refused(service, path=model_path(absent, "infer"), model=absent)
    assert (type(error), error.code) == (NotFound, "not-found.model")


def test_a_model_is_served_the_moment_it_is_published(service: World) -> None:
    """Workers learn of it with their next renewal, which the first request for it brings forward."""
    service.publish("digits")
    with service.client() as client:
        for _ in range(3):
            with service.publisher() as publisher:
                publisher.grant("digits", os.urandom(32), 2_000_000_000)
            client.verify()
            assert service.serves(client)


# Both consents.


def test_a_grant_without_the_users_acceptance_is_not_enough(
    service: World, url: str, wire: Wire, pool: str
) -> None:
    """The owner grants; the user's policy accepts other workers than the pool's. Nothing leaves."""
    policy = service.user_policy
    policy = replace(policy, worker=replace(policy.worker, mr_enclave=frozenset({os.urandom(32)})))
    with service.client(url, policy=policy) as client:
        error = refusal(lambda: service.serves(client))
    assert (type(error), error.code, error.claim) == (AppraisalRefused, "appraisal.not-subset", "mr_enclave")
    assert not wire.exchanges(pool)


def test_an_acceptance_without_a_grant_is_not_enough(service: World, url: str) -> None:
    with service.client(url, identity=service.stranger) as client:
        error = refusal(lambda: service.serves(client))
    assert (type(error), error.code) == (AccessRefused, "access.grant")


def test_a_grant_of_one_model_is_none_of_another(service: World, folder: Callable[[str], Path]) -> None:
    friend = Identity.create(folder("friend") / "user.identity")
    with service.publisher() as publisher:
        publisher.grant("diagnosis", friend.user_id(service.desk.owner), int(time.time()) + 60)
    with service.client(identity=friend) as client:
        assert service.serves(client, "diagnosis")
        assert refusal(lambda: service.serves(client, "digits")).code == "access.grant"


def test_a_revoked_user_is_refused(service: World, folder: Callable[[str], Path]) -> None:
    friend = Identity.create(folder("friend") / "user.identity")
    user = friend.user_id(service.desk.owner)
    with service.publisher() as publisher, service.client(identity=friend) as client:
        publisher.grant("digits", user, int(time.time()) + 60)
        assert service.serves(client)
        publisher.revoke("digits", user)
        client.verify()
        assert refusal(lambda: service.serves(client)).code == "access.grant"


def test_a_grant_that_ended_is_refused(service: World, folder: Callable[[str], Path]) -> None:
    friend = Identity.create(folder("friend") / "user.identity")
    with service.publisher() as publisher, service.client(identity=friend) as client:
        publisher.grant("digits", friend.user_id(service.desk.owner), int(time.time()) + 2)
        assert service.serves(client)
        time.sleep(2.1)
        assert refusal(lambda: service.serves(client)).code == "access.expired"


def test_an_id_at_one_owner_is_none_at_another(service: World, other: World) -> None:
    assert service.user.user_id(service.desk.owner) != service.user.user_id(other.desk.owner)


# Publication (owner -> key service).


@pytest.mark.parametrize(
    ("deed", "code"),
    [
        pytest.param(flip(0), "ohttp.key", id="altered-key-id"),
        pytest.param(flip(-1), "ohttp.open", id="altered"),
        pytest.param(truncate(1), "ohttp.open", id="truncated"),
        pytest.param(extend(), "ohttp.open", id="extended"),
    ],
)
def test_a_publication_that_was_tampered_with_is_refused(
    service: World, url: str, wire: Wire, deed: Deed, code: str
) -> None:
    before = service.statement("diagnosis")
    with service.publisher(url) as publisher:
        time.sleep(SETTLE)
        wire.on(KEY_SERVICE, "request", deed, skip=1)  # after the possession
        error = refusal(lambda: publisher.grant("diagnosis", os.urandom(32), 2_000_000_000))
        assert isinstance(error, TransportError)
        assert wire.exchanges(KEY_SERVICE)[-1].answer.code == code
        assert service.statement("diagnosis") == before
        publisher.grant("diagnosis", os.urandom(32), 2_000_000_000)  # and the next one works


@pytest.mark.parametrize("deed", [pytest.param(flip(-1), id="altered"), pytest.param(drop, id="dropped")])
def test_a_receipt_that_was_tampered_with_is_refused_and_the_owner_goes_on(
    service: World, url: str, wire: Wire, deed: Deed
) -> None:
    """The statement counts, the receipt is lost: the desk learns of it at the next command, by name."""
    with service.publisher(url) as publisher:
        time.sleep(SETTLE)
        wire.on(KEY_SERVICE, "answer", deed, skip=1)
        error = refusal(lambda: publisher.grant("diagnosis", os.urandom(32), 2_000_000_000))
        assert error.code == "ohttp.open" or isinstance(error, TransportError)
        again = refusal(lambda: publisher.grant("diagnosis", os.urandom(32), 2_000_000_000))
        assert again.code == "owner.receipt"
        publisher.grant("diagnosis", os.urandom(32), 2_000_000_000)


def test_a_replayed_publication_changes_nothing(service: World, url: str, wire: Wire) -> None:
    with service.publisher(url) as publisher:
        user = os.urandom(32)
        publisher.grant("diagnosis", user, 2_000_000_000)
        grant = wire.exchanges(KEY_SERVICE)[-1].request
        publisher.revoke("diagnosis", user)
        digest = service.statement("diagnosis").digest
        got = resend(service.url, grant, KEY_SERVICE)
        assert got.status_code == 200  # the refusal stands inside, for the owner's eyes
        publisher.grant("diagnosis", user, 2_000_000_000)  # the chain goes on from the revocation
    assert service.statement("diagnosis").previous == digest


def publication(
    service: World, statement: Statement, key: SigningKey | None = None, **chosen: Any
) -> Publication:
    signed = SignedStatement.sign(statement, key or service.desk.key)
    values = {"statement": signed, "sealed_key": None, "key_id": 0, "pool": service.pool, **chosen}
    return Publication(**values)


def published(service: World, sent: Publication) -> CloisterError:
    return refusal(lambda: Impostor(service).ask(b"/statements", sent.to_bytes()))


def following(service: World, /, **changes: Any) -> Statement:
    current = service.statement("diagnosis")
    return replace(current, **{"version": current.version + 1, "previous": current.digest, **changes})


def test_a_statement_for_another_service_is_refused(service: World) -> None:
    error = published(service, publication(service, following(service, service=bytes(32))))
    assert (type(error), error.code) == (BindingRefused, "binding.service")


def test_an_older_statement_is_refused(service: World) -> None:
    current = service.statement("diagnosis")
    error = published(service, publication(service, replace(current, grants={})))
    assert (type(error), error.code) == (Rollback, "rollback.statement")


def test_a_statement_that_skips_a_version_is_refused(service: World) -> None:
    current = service.statement("diagnosis")
    error = published(service, publication(service, following(service, version=current.version + 2)))
    assert error.code == "rollback.statement"


def test_a_statement_that_follows_another_is_refused(service: World) -> None:
    error = published(service, publication(service, following(service, previous=os.urandom(32))))
    assert (type(error), error.code) == (Rollback, "rollback.chain")


def test_a_statement_by_somebody_else_is_refused(service: World) -> None:
    thief = SigningKey.generate()
    statement = following(service)
    text = statement.to_bytes()
    signed = SignedStatement(text=text, owner_key=thief.public, signature=thief.sign("statement", text))
    error = published(service, replace(publication(service, statement), statement=signed))
    assert (type(error), error.code) == (AccessRefused, "access.owner")


def test_an_altered_statement_is_refused(service: World) -> None:
    sent = publication(service, following(service))
    text = following(service, grants={bytes(32): 2_000_000_000}).to_bytes()
    error = published(service, replace(sent, statement=replace(sent.statement, text=text)))
    assert (type(error), error.code) == (Tampered, "tampered.signature")


def test_a_statement_whose_release_policy_does_not_admit_the_pool_is_refused(service: World) -> None:
    narrower = replace(service.model_policy.release, mr_enclave=frozenset({bytes(32)}))
    error = published(service, publication(service, following(service, release_policy=narrower)))
    assert (type(error), error.code) == (AppraisalRefused, "appraisal.not-subset")


def test_a_statement_that_accepts_another_key_service_is_refused(service: World) -> None:
    another = replace(service.model_policy.key_service, mr_enclave=frozenset({bytes(32)}))
    error = published(service, publication(service, following(service, key_service=another)))
    assert (type(error), error.code) == (AppraisalRefused, "appraisal.mr_enclave")


def test_a_model_of_another_owner_in_a_claimed_pool_is_refused(
    service: World, folder: Callable[[str], Path]
) -> None:
    rival = Desk.create(folder("rival"))
    statement = replace(
        service.statement("diagnosis"), model=rival.model_id("diagnosis"), version=1, previous=bytes(32)
    )
    error = published(service, publication(service, statement, rival.key))
    assert error.code == "access.pool"


def test_a_model_key_sealed_under_another_statement_is_refused(service: World) -> None:
    """Taken from one publication and put into the next: the statement digest is the AAD."""
    one, two = following(service), following(service, grants={})
    configuration, suite = select(service.verified().document.keys)
    sealed = hpke.seal_to(
        suite,
        configuration.public_key,
        os.urandom(32),
        info=model_key_info(service.user_policy.service),
        aad=two.digest,
    )
    sent = publication(service, one, sealed_key=sealed, key_id=configuration.key_id)
    assert isinstance(published(service, sent), Tampered)


def test_a_strangers_question_for_statements_is_refused(service: World) -> None:
    stranger = SigningKey.generate()
    query = StatementQuery.sign(
        stranger,
        service=service.user_policy.service,
        model=service.model("digits"),
        time=int(time.time()),
    )
    error = refusal(lambda: Impostor(service).ask(b"/statements/current", query.to_bytes()))
    assert (type(error), error.code) == (AccessRefused, "access.owner")


def test_a_user_cannot_make_a_pool(service: World) -> None:
    from cloister.core.protocol.exchange import PoolCreation
    from cloister.core.protocol.pool import Pool

    wish = PoolCreation(pool=Pool(name="mine", policy=service.model_policy.release), owner=None)
    error = refusal(lambda: Impostor(service).ask(b"/pools", wish.to_bytes()))
    assert isinstance(error, CloisterError)
    assert all(entry.pool.name != "mine" for entry in service.verified().document.pools)


def test_an_owner_refuses_a_service_that_its_policy_does_not_name(service: World, other: World) -> None:
    with service.publisher(other.url) as publisher:
        error = refusal(publisher.verify)
    assert (type(error), error.code) == (BindingRefused, "binding.service")


def test_a_tampered_upload_is_refused(service: World, url: str, wire: Wire) -> None:
    wire.on(OTHER, "request", flip(5000))
    with service.publisher(url) as publisher:
        error = refusal(
            lambda: publisher.publish("diagnosis", service.model_policy, service.sealed("diagnosis"))
        )
    assert (error.code, error.actual) == ("owner.upload", "422")


def test_a_sealed_model_that_was_tampered_with_at_rest_is_refused_by_the_worker(
    service: World, folder: Callable[[str], Path], host: MaliciousHost, wire: Wire
) -> None:
    """The blob in the operator's store is changed; a worker that has not loaded it yet refuses it by name."""
    from cloister.core.protocol.statement import SealedModel

    sealed: SealedModel = service.desk.model("diagnosis").sealed
    (path,) = [each for each in service.site.blobs.rglob("*") if sealed.blob.hex() in each.name]
    kept = path.read_bytes()
    fresh = host.worker(service.site, "fresh", registered=False)
    fresh.start()

    async def to_fresh(message: Message) -> Message:
        transport = httpx.AsyncHTTPTransport(uds=str(fresh.socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://enclave") as http:
            got = await http.post("/ohttp", content=message.body, headers=dict(message.fields))
        return Message(status=got.status_code, body=got.content, fields={"content-type": "message/ohttp-res"})

    wire.on(service.pool.hex(), "request", to_fresh, times=99)
    with service.client(host.front(service.url, wire)) as client:
        for damaged in (
            kept[:-40] + bytes([kept[-40] ^ 1]) + kept[-39:],
            kept[:-1],
            kept + b"\0",
        ):
            path.chmod(0o600)
            path.write_bytes(damaged)
            try:
                error = refusal(lambda: service.serves(client, "diagnosis"))
                assert isinstance(error, Tampered | TransportError)
                assert error.code.startswith(("sealing.", "tampered", "store.length", "transport"))
            finally:
                path.write_bytes(kept)
        assert service.serves(client, "diagnosis")


# The operator's own view.


def test_metrics_carry_nothing_secret(service: World, client: Client) -> None:
    assert service.serves(client)
    text = httpx.get(f"{service.url}/metrics", trust_env=False).text
    assert "cloister_gateway_requests_total" in text
    secrets = [
        service.desk.owner.hex(),
        service.user.user_id(service.desk.owner).hex(),
        service.model("digits"),
        "digits",
        "diagnosis",
        service.desk.model("digits").key.reveal().hex(),
        service.desk.model("digits").sealed.blob.hex(),
        service.statement("digits").digest.hex(),
    ]
    assert [each for each in secrets if each in text] == []


def test_the_operator_sees_stages_of_many_answers(service: World, client: Client) -> None:
    for _ in range(2 * 40):  # there are two workers
        assert service.serves(client)
    assert client.record.reuse == "hot"

    def told(stage: str) -> float:
        text = httpx.get(f"{service.url}/metrics", trust_env=False).text
        name = f'cloister_stage_seconds_count{{pool="{service.pool.hex()}",stage="{stage}"}} '
        return sum(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))

    for stage in ("decrypt", "queue", "run", "encode", "encrypt"):
        eventually(lambda stage=stage: told(stage) >= 32, f"figures of {stage}")  # type: ignore[misc]
    for stage in ("start", "launch", "attest", "release", "open", "build"):
        assert told(stage) > 0


def test_logs_carry_nothing_secret(service: World, client: Client) -> None:
    inputs = service.sample("digits", 77)
    client.infer(service.model("digits"), inputs)
    key = service.desk.model("digits").key.reveal()
    value = inputs["image"].tobytes()
    for path in [*service.site.root.rglob("*.log"), *service.site.root.rglob("records.sqlite*")]:
        raw = path.read_bytes()
        for secret in (key, key.hex().encode(), value[:32], service.desk.key.seed().reveal()):
            assert secret not in raw, path


def test_the_user_policy_of_the_site_round_trips(service: World) -> None:
    assert UserPolicy.from_toml(service.user_policy.to_toml()) == service.user_policy
