"""The service document and its proof of possession, in the hands of a malicious host."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from cloister.core.identity import SigningKey
from cloister.core.ohttp.keyconfig import select
from cloister.core.protocol.document import ServiceDocument, SignedDocument, VerifiedDocument
from cloister.core.protocol.exchange import HeadRequest, Possession
from cloister.core.protocol.trust import UserPolicy
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import (
    AppraisalRefused,
    BindingRefused,
    CloisterError,
    FormatError,
    Refused,
    Rollback,
    Tampered,
    TransportError,
    UsageError,
)
from e2e.malicious import (
    DOCUMENT,
    KEY_SERVICE,
    Deed,
    MaliciousHost,
    Swap,
    Wire,
    answer,
    delay,
    drop,
    extend,
    flip,
    redirect,
    refusal,
    substitute,
    truncate,
)
from e2e.world import World

Change = Callable[[SignedDocument], SignedDocument]


def test_an_honest_host_changes_nothing(service: World, url: str, wire: Wire) -> None:
    with service.client(url) as client:
        assert service.serves(client)
    assert {each.route for each in wire.log} == {DOCUMENT, KEY_SERVICE, service.pool.hex()}
    assert all(each.sent == each.request and each.returned == each.answer for each in wire.log)


# The document (host -> client).


def text(change: Callable[[bytearray], None]) -> Change:
    def apply(signed: SignedDocument) -> SignedDocument:
        changed = bytearray(signed.text)
        change(changed)
        return replace(signed, text=bytes(changed))

    return apply


def resigned(change: Callable[[ServiceDocument], ServiceDocument]) -> Change:
    """A document that says something else, signed by a key of the host's own making."""

    def apply(signed: SignedDocument) -> SignedDocument:
        document = change(ServiceDocument.from_bytes(signed.text))
        return replace(
            SignedDocument.sign(document, SigningKey.generate()), key=signed.key
        )  # the service's key, not its signature

    return apply


def flipped(at: float) -> Change:
    def change(raw: bytearray) -> None:
        raw[int(at * (len(raw) - 1))] ^= 1

    return text(change)


FORGERIES: dict[str, tuple[Change, str]] = {
    "a bit of the text's start": (flipped(0.0), "tampered.signature"),
    "a bit of the evidence": (flipped(0.3), "tampered.signature"),
    "a bit of the text's end": (flipped(1.0), "tampered.signature"),
    "the signature": (
        lambda signed: replace(signed, signature=bytes(64)),
        "tampered.signature",
    ),
    "the signer": (
        lambda signed: replace(signed, key=SigningKey.generate().public),
        "binding.service",
    ),
    "the validity": (
        resigned(lambda document: replace(document, not_after=document.not_after + 3600)),
        "tampered.signature",
    ),
    "the keys, one suite left out": (
        resigned(lambda document: replace(document, keys=document.keys[1:])),
        "tampered.signature",
    ),
    "a pool's keys": (
        resigned(
            lambda document: replace(
                document,
                pools=tuple(replace(entry, keys=document.keys) for entry in document.pools),
            )
        ),
        "tampered.signature",
    ),
    "a pool left out": (
        resigned(lambda document: replace(document, pools=())),
        "tampered.signature",
    ),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_an_altered_document_is_refused(service: World, url: str, wire: Wire, what: str) -> None:
    change, code = FORGERIES[what]
    forged = change(service.document()).to_bytes()
    wire.on(DOCUMENT, "answer", substitute(forged))
    with service.client(url) as client:
        error = refusal(client.verify)
        assert error.code == code
        assert isinstance(error, Refused)
        assert not wire.exchanges(KEY_SERVICE)  # nothing was sent to whoever made that
        assert service.serves(client)


@pytest.mark.parametrize(("deed", "code"), [(truncate(1), "format.cbor"), (extend(), "format.cbor")])
def test_a_truncated_or_extended_document_is_refused(
    service: World, url: str, wire: Wire, deed: Deed, code: str
) -> None:
    wire.on(DOCUMENT, "answer", deed)
    with service.client(url) as client:
        error = refusal(client.verify)
        assert (type(error), error.code) == (FormatError, code)
        assert service.serves(client)


def test_a_document_of_another_service_is_refused(service: World, other: World, url: str, wire: Wire) -> None:
    wire.on(DOCUMENT, "answer", substitute(other.raw_document()))
    with service.client(url) as client:
        error = refusal(client.verify)
        assert isinstance(error, BindingRefused)
        assert error.code == "binding.service"
        assert error.expected == service.user_policy.service.hex()


def test_an_older_document_is_refused_by_a_client_that_saw_a_newer_one(
    service: World, url: str, wire: Wire
) -> None:
    older = service.raw_document()
    with service.publisher() as publisher:  # makes the log grow, and a newer document
        publisher.grant("diagnosis", os.urandom(32), 2_000_000_000)
    with service.client(url) as client:
        client.verify()
        wire.on(DOCUMENT, "answer", substitute(older), times=4)
        error = refusal(client.verify)
        assert isinstance(error, Rollback)
        assert error.code == "rollback.document"
        wire.behave()
        assert service.serves(client)


def test_an_expired_document_is_refused(service: World, url: str, wire: Wire) -> None:
    document = ServiceDocument.from_bytes(service.document().text)
    with service.client(url, now=lambda: document.not_after + 601) as client:
        assert refusal(client.verify).code == "document.expired"


def test_a_document_from_the_future_is_refused(service: World, url: str) -> None:
    document = ServiceDocument.from_bytes(service.document().text)
    with service.client(url, now=lambda: document.not_before - 3600) as client:
        assert refusal(client.verify).code == "document.not-yet-valid"


def test_a_document_of_an_epoch_that_is_over_is_refused(other: World, host: MaliciousHost) -> None:
    wire = Wire()
    url = host.front(other.url, wire)
    older = other.raw_document()
    end = ServiceDocument.from_bytes(SignedDocument.from_bytes(older).text).not_after
    wire.on(DOCUMENT, "answer", substitute(older), times=9)
    with other.client(url, now=lambda: end + 1) as client:
        assert refusal(client.verify).code == "document.expired"


@pytest.mark.parametrize("status", [500, 503, 404, 302])
def test_a_document_that_is_not_served_is_a_clear_retryable_error(
    service: World, url: str, wire: Wire, status: int
) -> None:
    wire.on(DOCUMENT, "answer", answer(status, b"#ohttp-key weaker, please"))
    with service.client(url) as client:
        error = refusal(client.verify)
        assert isinstance(error, TransportError)
        assert (error.code, error.actual) == ("transport.status", str(status))
        assert error.retryable
        assert service.serves(client)


def test_a_document_that_is_dropped_is_a_clear_retryable_error(service: World, url: str, wire: Wire) -> None:
    wire.on(DOCUMENT, "answer", drop)
    with service.client(url) as client:
        assert isinstance(refusal(client.verify), TransportError)
        assert service.serves(client)


# Possession (client -> key service -> client). The host sees ciphertext.


@pytest.mark.parametrize("at", [0, 1, 6, 7, 200, 1130, -1])
def test_an_altered_possession_request_is_refused(service: World, url: str, wire: Wire, at: int) -> None:
    wire.on(KEY_SERVICE, "request", flip(at))
    with service.client(url) as client:
        error = refusal(client.verify)
        assert isinstance(error, TransportError)
        assert error.code in ("transport.key", "transport.status")
    (passed,) = wire.exchanges(KEY_SERVICE)
    assert passed.answer.status == 400  # the enclave refused it
    assert passed.answer.code == ("ohttp.key" if at in (0, 1, 6) else "ohttp.open")


@pytest.mark.parametrize(
    ("deed", "code"),
    [(truncate(1), "ohttp.open"), (truncate(10**6), "ohttp.request"), (extend(), "ohttp.open")],
)
def test_a_truncated_or_extended_possession_request_is_refused(
    service: World, url: str, wire: Wire, deed: Deed, code: str
) -> None:
    wire.on(KEY_SERVICE, "request", deed)
    with service.client(url) as client:
        assert refusal(client.verify).code == "transport.status"
    assert wire.exchanges(KEY_SERVICE)[0].answer.code == code


@pytest.mark.parametrize("at", [0, 31, 32, 200, -1])
def test_an_altered_possession_is_refused(service: World, url: str, wire: Wire, at: int) -> None:
    wire.on(KEY_SERVICE, "answer", flip(at))
    with service.client(url) as client:
        error = refusal(client.verify)
        assert isinstance(error, Tampered)
        assert error.code == "ohttp.open"
        assert service.serves(client)


@pytest.mark.parametrize(
    ("deed", "code"),
    [(truncate(1), "ohttp.open"), (extend(), "ohttp.open"), (truncate(10**6), "ohttp.response")],
)
def test_a_truncated_or_extended_possession_is_refused(
    service: World, url: str, wire: Wire, deed: Deed, code: str
) -> None:
    wire.on(KEY_SERVICE, "answer", deed)
    with service.client(url) as client:
        assert refusal(client.verify).code == code


def test_a_replayed_possession_is_refused(service: World, url: str, wire: Wire) -> None:
    with service.client(url) as client:
        client.verify()
        wire.on(KEY_SERVICE, "answer", substitute(wire.exchanges(KEY_SERVICE)[0].returned.body))
        assert refusal(client.verify).code == "ohttp.open"


def test_a_replayed_possession_request_gives_the_client_nothing(service: World, url: str, wire: Wire) -> None:
    """The request is idempotent: the enclave answers a copy, to the copy's own key and nonce."""
    with service.client(url) as client:
        client.verify()
        wire.on(KEY_SERVICE, "request", substitute(wire.exchanges(KEY_SERVICE)[0].request.body))
        assert refusal(client.verify).code == "ohttp.open"


def test_possessions_swapped_between_two_clients_are_refused(service: World, url: str, wire: Wire) -> None:
    from concurrent.futures import ThreadPoolExecutor

    wire.on(KEY_SERVICE, "answer", Swap(), times=2)
    with service.client(url) as one, service.client(url) as two, ThreadPoolExecutor(2) as both:
        codes = list(both.map(lambda client: refusal(client.verify).code, (one, two)))
    assert codes == ["ohttp.open", "ohttp.open"]


def test_a_possession_request_sent_to_a_pool_is_refused(service: World, url: str, wire: Wire) -> None:
    wire.on(KEY_SERVICE, "request", redirect(service.pool.hex()))
    with service.client(url) as client:
        assert refusal(client.verify).code in ("transport.key", "transport.status")
    assert wire.exchanges(KEY_SERVICE)[0].answer.status == 400


def test_a_possession_request_sent_to_another_service_is_refused(
    service: World, other: World, url: str, wire: Wire
) -> None:
    import httpx

    def elsewhere(message):  # type: ignore[no-untyped-def]
        got = httpx.post(
            f"{other.url}/ohttp", content=message.body, headers=dict(message.fields), trust_env=False
        )
        return replace(message, status=got.status_code, body=got.content)

    wire.on(KEY_SERVICE, "request", elsewhere)
    with service.client(url) as client:
        assert isinstance(refusal(client.verify), TransportError)
    assert wire.exchanges(KEY_SERVICE)[0].answer.status == 400


def test_a_possession_for_another_nonce_is_refused(service: World) -> None:
    """A key service that answers an old nonce, as a recording would."""
    verified = service.verified()
    asked = HeadRequest(nonce=os.urandom(32), head=None)
    possession = ask(service, verified, b"/possession", asked.to_bytes())
    key = verified.attested.binding.key("Ed25519")
    Possession.from_bytes(possession).verify(asked, service=verified.document.service, service_key=key)
    with pytest.raises(Tampered) as refused:
        Possession.from_bytes(possession).verify(
            replace(asked, nonce=os.urandom(32)), service=verified.document.service, service_key=key
        )
    assert refused.value.code == "tampered.inclusion"


@pytest.mark.parametrize("status", [500, 400, 502])
def test_an_outer_error_never_leads_to_a_weaker_suite(
    service: World, url: str, wire: Wire, status: int
) -> None:
    hint = b'{"type": "https://iana.org/assignments/http-problem-types#ohttp-key", "code": "ohttp.key"}'
    wire.on(KEY_SERVICE, "answer", answer(status, hint), times=3)
    preferred = select(service.verified().document.keys)
    with service.client(url) as client:
        for _ in range(3):
            assert refusal(client.verify).retryable
        client.verify()
    headers = {each.request.body[:7] for each in wire.exchanges(KEY_SERVICE)}
    assert headers == {bytes([preferred[0].key_id]) + preferred[1].to_bytes()}
    assert preferred[1].kem_id == 0x647A  # X-Wing


def test_a_slow_host_only_costs_time(service: World, url: str, wire: Wire) -> None:
    wire.on(DOCUMENT, "answer", delay(0.3))
    wire.on(KEY_SERVICE, "answer", delay(0.3))
    with service.client(url) as client:
        assert service.serves(client)


# Policies.


def test_a_production_policy_refuses_a_simulated_service(service: World, url: str) -> None:
    policy = service.user_policy
    production = replace(
        policy,
        key_service=replace(policy.key_service, dangerous_simulated_roots=None),
        worker=replace(policy.worker, dangerous_simulated_roots=None),
    )
    with service.client(url, policy=production) as client:
        error = refusal(client.verify)
        assert isinstance(error, AppraisalRefused)
        assert error.code == "appraisal.simulated"


def test_a_policy_with_production_workers_alone_refuses_the_pool(service: World, url: str) -> None:
    policy = service.user_policy
    mixed = replace(policy, worker=replace(policy.worker, dangerous_simulated_roots=None))
    with service.client(url, policy=mixed) as client:
        error = refusal(lambda: service.serves(client))
        assert (type(error), error.code, error.claim) == (
            AppraisalRefused,
            "appraisal.not-subset",
            "simulated",
        )


def test_an_empty_policy_refuses_the_service(service: World, url: str) -> None:
    policy = replace(service.user_policy, key_service=AppraisalPolicy())
    with service.client(url, policy=policy) as client:
        error: CloisterError = refusal(client.verify)
        assert isinstance(error, AppraisalRefused)


def test_an_empty_policy_of_workers_refuses_every_pool(service: World, url: str) -> None:
    policy = replace(service.user_policy, worker=AppraisalPolicy())
    with service.client(url, policy=policy) as client:
        assert refusal(lambda: service.serves(client)).code == "appraisal.not-subset"


def test_an_empty_policy_file_is_refused(service: World) -> None:
    text = f'service = "{service.user_policy.service.hex()}"\n[key_service]\n[worker]\n'
    with pytest.raises(UsageError) as refused:
        UserPolicy.from_toml(text)
    assert refused.value.code == "policy.empty"


@pytest.mark.parametrize("which", ["key_service", "worker"])
def test_another_measurement_is_refused(service: World, url: str, which: str) -> None:
    policy = service.user_policy
    changed = replace(getattr(policy, which), mr_enclave=frozenset({bytes(32)}))
    with service.client(url, policy=replace(policy, **{which: changed})) as client:
        error = refusal(lambda: service.serves(client))
        assert isinstance(error, AppraisalRefused)
        assert error.code == ("appraisal.mr_enclave" if which == "key_service" else "appraisal.not-subset")
        assert error.claim == "mr_enclave"


def ask(service: World, verified: VerifiedDocument, path: bytes, content: bytes) -> bytes:
    """One encapsulated exchange with the key service; gives the content of its answer."""
    from cloister.core.protocol.conversation import ask_key_service
    from cloister.party.carry import Carrier

    carrier = Carrier(service.url)
    try:
        return bytes(carrier.run(ask_key_service(verified.document, path, content)))
    finally:
        carrier.close()
