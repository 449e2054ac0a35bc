"""A relying party's conversation, without I/O: a scripted host that lags, rolls back, forks, and lies."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from cloister.core.identity import SigningKey
from cloister.core.ohttp.hpke import WIRE_SUITES
from cloister.core.protocol import conversation as module
from cloister.core.protocol.conversation import (
    LAG_PAUSES,
    Conversation,
    StaleKey,
    ask_key_service,
)
from cloister.core.protocol.document import ServiceDocument, SignedDocument
from cloister.core.protocol.exchange import Possession
from cloister.core.protocol.flow import Outgoing, Pause, drive_async
from cloister.core.protocol.head import TreeHead
from cloister.enclave.keyservice import documents as documents_module
from cloister.errors import (
    AppraisalRefused,
    BindingRefused,
    CloisterError,
    EvidenceRefused,
    FormatError,
    NotFound,
    Overloaded,
    Rollback,
    Tampered,
    TransportError,
)
from cloister.net.messages import Answer
from support.realm import KEY_SERVICE, NOW, STRANGER, Clock, MemoryHost, Realm, policy


class Script:
    """A host between a conversation and a realm; ``document`` and ``answer`` may change what comes back."""

    def __init__(self, realm: Realm) -> None:
        self.realm = realm
        self.sent: list[Outgoing] = []
        self.pauses: list[float] = []
        self.document: Callable[[bytes], bytes] = lambda raw: raw
        self.answer: Callable[[Answer], Answer] = lambda answer: answer

    async def send(self, outgoing: Outgoing) -> Answer:
        self.sent.append(outgoing)
        if outgoing.method == b"GET":
            assert outgoing.target == b"/.well-known/cloister"
            return Answer(body=self.document(self.realm.service.documents.raw))
        assert (outgoing.method, outgoing.target) == (b"POST", b"/ohttp")
        assert dict(outgoing.fields)[b"cloister-pool"] == b"key-service"
        return self.answer(await self.realm.outer(bytes(outgoing.body)))

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def run(self, flow: Any) -> Any:
        return asyncio.run(drive_async(flow, self.send, self.sleep))


def refresh(script: Script, talk: Conversation, now: int = NOW) -> Any:
    return script.run(talk.refresh(now))


def refused(
    kind: type[CloisterError], code: str, script: Script, talk: Conversation, now: int = NOW
) -> CloisterError:
    head, before = talk.head, (talk.verified, talk.possession, talk.verifications)
    with pytest.raises(kind) as caught:
        refresh(script, talk, now)
    assert caught.value.code == code, str(caught.value)
    assert (talk.verified, talk.possession, talk.verifications) == before
    assert head is None or talk.head.size >= head.size  # what was proven stays remembered
    return caught.value


@pytest.fixture
def realm() -> Realm:
    return asyncio.run(Realm.start())


@pytest.fixture
def script(realm: Realm) -> Script:
    return Script(realm)


@pytest.fixture
def talk(realm: Realm) -> Conversation:
    return realm.conversation()


# -- what holds ----------------------------------------------------------------


def test_first_visit(realm, script, talk):
    with pytest.raises(NotFound):
        talk.current()
    verified = refresh(script, talk)
    assert talk.current() is verified
    assert talk.head == realm.service.log.head()
    assert talk.fresh(NOW)
    assert not talk.fresh(verified.not_after)
    assert [step.name for step in talk.steps[-2:]] == ["possession", "audit log"]
    assert "first visit" in talk.steps[-1].detail
    assert script.pauses == []
    assert len(script.sent) == 2


def test_later_visits_prove_that_the_log_only_grew(realm, script, talk):
    refresh(script, talk)
    asyncio.run(realm.create_pool())
    refresh(script, talk)
    assert "2 to 3" in talk.steps[-1].detail
    assert talk.head.size == 3


def test_the_preferred_suite_is_used(realm, script, talk):
    refresh(script, talk)
    body = bytes(script.sent[-1].body)
    assert body[1:7] == WIRE_SUITES[0].to_bytes()
    assert WIRE_SUITES[0].kem_id == 0x647A


def test_nothing_readable_leaves(realm, script, talk):
    refresh(script, talk)
    head = talk.head
    refresh(script, talk)
    for outgoing in script.sent:
        for secret in (head.root, head.signature, realm.id, b"possession", b"nonce"):
            assert secret not in bytes(outgoing.body)


# -- rollback, fork, stale -----------------------------------------------------


@pytest.fixture
def strict(monkeypatch):
    """A document that was replaced no longer counts as served, as if some seconds had gone by."""
    monkeypatch.setattr(documents_module, "CURRENT", -1.0)


def test_a_document_older_than_the_service_s_own(realm, script, talk, strict):
    """The host keeps serving what was current before a change: refused once the cache has had its time."""
    stale = realm.service.documents.raw
    asyncio.run(realm.create_pool())
    script.document = lambda raw: stale
    refused(Rollback, "rollback.document", script, talk)
    assert script.pauses == list(LAG_PAUSES)


def test_a_document_that_was_replaced_a_moment_ago_serves(realm, script, talk):
    stale = realm.service.documents.raw
    asyncio.run(realm.create_pool())
    script.document = lambda raw: stale
    refresh(script, talk)
    assert script.pauses == list(LAG_PAUSES)  # the current one is waited for first
    assert talk.head.size == 3  # the proof shows the newest head all the same


def test_a_cache_that_lags_for_a_moment_is_waited_for(realm, script, talk, strict):
    stale = [realm.service.documents.raw] * 2
    asyncio.run(realm.create_pool())
    script.document = lambda raw: stale.pop() if stale else raw
    refresh(script, talk)
    assert script.pauses == list(LAG_PAUSES[:2])
    assert talk.head.size == 3


def test_a_store_that_was_put_back(realm, script, talk):
    """The service restarts on an older store: the head that this party saw stops it, by name."""
    store = {table: dict(rows) for table, rows in realm.host.records.items()}
    asyncio.run(realm.create_pool())
    asyncio.run(realm.create_pool(dataclasses.replace(realm.pool, name="second")))
    for name in ("third", "fourth"):
        asyncio.run(realm.create_pool(dataclasses.replace(realm.pool, name=name)))
    refresh(script, talk)
    restarted = asyncio.run(Realm.start(MemoryHost(records=store), realm.clock))
    assert restarted.id == realm.id
    other = Script(restarted)
    refused(Rollback, "rollback.store", other, talk)
    newcomer = restarted.conversation()
    refused(Rollback, "rollback.store", other, newcomer)  # it serves nobody any more


def test_a_service_that_hides_its_rollback(realm, script, talk, monkeypatch):
    """Even a service that doesn't stop by itself can't prove that it extends what was seen."""
    refresh(script, talk)
    talk.head = TreeHead.sign(realm.service.log.identity, size=50, root=b"r" * 32, time=NOW)
    monkeypatch.setattr(realm.service.log, "contradicts", lambda head: False)
    refused(Rollback, "rollback.head", script, talk)
    talk.head = TreeHead.sign(realm.service.log.identity, size=1, root=b"r" * 32, time=NOW)
    refused(Rollback, "rollback.fork", script, talk)


def test_a_document_of_another_line_than_the_proof(realm, script, talk):
    """Both signed by the service, as by two copies of it that share an identity."""
    log, documents = realm.service.log, realm.service.documents
    ahead = TreeHead.sign(log.identity, size=50, root=bytes(32), time=NOW)
    document = dataclasses.replace(realm.document().document, head=ahead)
    made = SignedDocument.sign(document, log.identity)
    documents.raw, documents.digest = made.to_bytes(), made.digest
    error = refused(Rollback, "rollback.document", script, talk)
    assert error.claim == "tree head of the service document"


def test_a_recorded_proof_does_not_serve_another_nonce(realm, script, talk, monkeypatch):
    refresh(script, talk)
    recorded = talk.possession
    monkeypatch.setattr(Possession, "from_bytes", lambda content: recorded)
    refused(Tampered, "tampered.inclusion", script, talk)


def test_a_recorded_answer_does_not_open(realm, script, talk):
    answers: list[Answer] = []
    script.answer = lambda answer: answers.append(answer) or answer
    refresh(script, talk)
    script.answer = lambda answer: answers[0]
    refused(Tampered, "ohttp.open", script, talk)


def test_a_proof_of_possession_by_another_key(realm, script, talk, monkeypatch):
    sign = Possession.sign
    forger = SigningKey.generate()
    monkeypatch.setattr(Possession, "sign", staticmethod(lambda key, *rest: sign(forger, *rest)))
    refused(Tampered, "tampered.signature", script, talk)


def test_a_document_that_expired_or_was_altered(realm, script, talk):
    refused(EvidenceRefused, "document.expired", script, talk, now=NOW + 100_000)
    script.document = lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])
    with pytest.raises(CloisterError):
        refresh(script, talk)
    script.document = lambda raw: b"\xff" * (5 << 20)
    refused(FormatError, "format", script, talk)
    assert talk.verified is None


def test_another_service_and_another_measurement(realm, script):
    trust = realm.conversation().trust
    refused(
        BindingRefused,
        "binding.service",
        script,
        Conversation(trust=dataclasses.replace(trust, service=bytes(32))),
    )
    refused(
        AppraisalRefused,
        "appraisal.mr_enclave",
        script,
        Conversation(trust=dataclasses.replace(trust, key_service=policy(STRANGER))),
    )
    refused(
        AppraisalRefused,
        "appraisal.simulated",
        script,
        Conversation(trust=dataclasses.replace(trust, key_service=policy(KEY_SERVICE, root=None))),
    )


def test_a_host_that_strips_the_preferred_suite(realm, script, talk):
    """The host can't lower the suite: the keys are signed and attested as they stand."""

    def strip(raw: bytes) -> bytes:
        signed = SignedDocument.from_bytes(raw)
        document = ServiceDocument.from_bytes(signed.text)
        weaker = dataclasses.replace(document, keys=document.keys[1:])
        return dataclasses.replace(signed, text=weaker.to_bytes()).to_bytes()

    script.document = strip
    refused(Tampered, "tampered.signature", script, talk)


# -- outer errors --------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (
            400,
            b'{"type": "https://iana.org/assignments/http-problem-types#ohttp-key"}',
            StaleKey,
            "transport.key",
        ),
        (400, b"", TransportError, "transport.status"),
        (401, b"", TransportError, "transport.status"),
        (404, b"", TransportError, "transport.status"),
        (413, b"", FormatError, "request.size"),
        (415, b"#ohttp-key", TransportError, "transport.status"),
        (429, b"", Overloaded, "overloaded.host"),
        (500, b"#ohttp-key", TransportError, "transport.status"),
        (503, b"{}", TransportError, "transport.status"),
        (302, b"", TransportError, "transport.status"),
        (204, b"", TransportError, "transport.status"),
    ],
)
def test_outer_errors_are_untrusted_and_never_weaken_anything(script, talk, status, body, kind, code):
    verified = refresh(script, talk)
    script.sent.clear()
    script.answer = lambda answer: Answer(status=status, body=body)
    for _ in range(3):
        with pytest.raises(kind) as caught:
            script.run(ask_key_service(verified.document, b"/possession", b""))
        assert caught.value.code == code
        assert caught.value.retryable is (kind is not FormatError)
    bodies = [bytes(outgoing.body) for outgoing in script.sent]
    assert {made[1:7] for made in bodies} == {WIRE_SUITES[0].to_bytes()}
    assert len({made[7:200] for made in bodies}) == 3  # each with an encapsulation of its own


@pytest.mark.parametrize("body", [b"", b"x", bytes(48), bytes(1000), b"<html>"])
def test_an_answer_that_is_no_ciphertext(script, talk, body):
    script.answer = lambda answer: Answer(status=200, body=body)
    with pytest.raises((Tampered, FormatError)):
        refresh(script, talk)


def test_errors_inside_are_the_enclave_s_own(script, talk):
    verified = refresh(script, talk)
    with pytest.raises(NotFound) as caught:
        script.run(ask_key_service(verified.document, b"/nothing", b""))
    assert caught.value.code == "not-found.route"
    with pytest.raises(FormatError):
        script.run(ask_key_service(verified.document, b"/possession", b"\xff"))


def test_a_host_that_is_away(script, talk):
    flow = talk.refresh(NOW)
    next(flow)
    with pytest.raises(TransportError):
        flow.throw(TransportError("away"))
    assert talk.verified is None


def test_a_flow_yields_nothing_but_requests_and_pauses(realm, script, talk, strict):
    stale = realm.service.documents.raw
    asyncio.run(realm.create_pool())
    script.document = lambda raw: stale
    flow = talk.refresh(NOW)
    kinds = set()
    answer = None
    with pytest.raises(Rollback):
        while True:
            item = flow.send(answer)
            kinds.add(type(item))
            answer = None if isinstance(item, Pause) else asyncio.run(script.send(item))
    assert kinds == {Outgoing, Pause}


def test_the_clock_and_nothing_else_says_when(realm, script, talk):
    assert not hasattr(module, "time")
    late = Clock(NOW + 500)
    refresh(script, talk, now=late.now())
    assert not talk.fresh(NOW + 600)
