"""Key release between a real worker enclave and the key service, with a malicious host in between."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.cli.site import reference_policy
from cloister.core.evidence.bundle import Evidence
from cloister.core.identity import SigningKey
from cloister.core.ohttp import hpke
from cloister.core.protocol.document import SignedDocument
from cloister.core.protocol.exchange import HeadRequest
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.release import Release, release_info
from cloister.errors import (
    AppraisalRefused,
    BindingRefused,
    CloisterError,
    EvidenceRefused,
    FormatError,
    NotFound,
    Replayed,
    Tampered,
)
from cloister.sim.authority import Flaws, SimulatedAuthority
from cloister.sim.measurement import measure
from e2e.impostor import Impostor
from e2e.malicious import (
    DOCUMENT,
    KEY_SERVICE,
    Deed,
    Direction,
    MaliciousHost,
    MaliciousWorker,
    Swap,
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
from e2e.world import World, world

CHALLENGE, RELEASE = 0, 1  # place in one renewal of a worker's exchanges with the key service


@pytest.fixture(scope="module")
def brisk(shared_root: Path) -> Iterator[World]:
    """A service with the shortest lease, so that its workers renew every 0.7 s."""
    with world(shared_root / "b", workers=0, models=("digits",), lease_seconds=2) as made:
        yield made


@pytest.fixture(scope="module")
def workers(brisk: World) -> Iterator[tuple[MaliciousWorker, MaliciousWorker]]:
    """Two enclaves on a malicious host, which joined while it behaved. Users don't reach them."""
    with MaliciousHost() as host:
        pair = tuple(host.worker(brisk.site, f"held-{number}", registered=False) for number in (1, 2))
        for worker in pair:
            worker.start()
            worker.renews()
        yield pair[0], pair[1]
        for worker in pair:
            assert not worker.wire.broken


@pytest.fixture
def worker(workers: tuple[MaliciousWorker, MaliciousWorker]) -> Iterator[MaliciousWorker]:
    """One of them. After each test both must renew as if nothing had been."""
    yield workers[0]
    for each in workers:
        each.wire.behave()
        if each.wire.touched:
            each.wire.touched = False
            each.renews()


def order(worker: MaliciousWorker, direction: Direction, deed: Deed, which: int) -> None:
    """Do something to one exchange of the next renewal."""
    worker.wire.on(KEY_SERVICE, direction, deed, skip=which, after=DOCUMENT)


# What the host hands the worker as a service document.


@pytest.mark.parametrize(
    ("deed", "code"),
    [
        pytest.param(flip(-1), "tampered.signature", id="altered-text"),
        pytest.param(flip(12), "binding.service", id="altered-signer"),
        pytest.param(truncate(1), "format.cbor", id="truncated"),
        pytest.param(extend(), "format.cbor", id="extended"),
        pytest.param(substitute(b""), "format.cbor", id="empty"),
        pytest.param(answer(500), "host.status", id="error"),
    ],
)
def test_a_document_that_was_tampered_with_is_refused(worker: MaliciousWorker, deed: Deed, code: str) -> None:
    said = len(worker.said())
    worker.wire.on(DOCUMENT, "answer", deed)
    worker.refuses(code, after=said)


def test_a_document_of_another_service_is_refused(worker: MaliciousWorker, other: World) -> None:
    said = len(worker.said())
    worker.wire.on(DOCUMENT, "answer", substitute(other.raw_document()))
    worker.refuses("binding.service", after=said)


def test_a_document_signed_by_another_key_is_refused(worker: MaliciousWorker, brisk: World) -> None:
    said, forger = len(worker.said()), SigningKey.generate()
    document = brisk.verified().document
    forged = SignedDocument.sign(replace(document, service=forger.thumbprint), forger)
    worker.wire.on(DOCUMENT, "answer", substitute(forged.to_bytes()))
    worker.refuses("binding.service", after=said)


# Challenge and release: both are one encapsulated exchange for the host.


@pytest.mark.parametrize("which", [CHALLENGE, RELEASE], ids=["challenge", "release"])
class TestExchange:
    @pytest.mark.parametrize(
        ("deed", "code"),
        [
            pytest.param(flip(0), "ohttp.key", id="altered-key-id"),
            pytest.param(flip(2), "ohttp.key", id="altered-suite"),
            pytest.param(flip(7), "ohttp.open", id="altered-enc"),
            pytest.param(flip(1200), "ohttp.open", id="altered-ciphertext"),
            pytest.param(flip(-1), "ohttp.open", id="altered-tag"),
            pytest.param(truncate(1), "ohttp.open", id="truncated"),
            pytest.param(extend(), "ohttp.open", id="extended"),
            pytest.param(substitute(b""), "ohttp.request", id="empty"),
        ],
    )
    def test_a_request_that_was_tampered_with_is_refused_by_the_key_service(
        self, worker: MaliciousWorker, which: int, deed: Deed, code: str
    ) -> None:
        said = len(worker.said())
        order(worker, "request", deed, which)
        worker.refuses("transport.key" if code == "ohttp.key" else "transport.status", after=said)
        outer = [each for each in worker.wire.exchanges(KEY_SERVICE) if each.sent != each.request][-1]
        assert (outer.answer.status, outer.answer.code) == (400, code)

    @pytest.mark.parametrize(
        ("deed", "code"),
        [
            pytest.param(flip(0), "ohttp.open", id="altered-nonce"),
            pytest.param(flip(40), "ohttp.open", id="altered-ciphertext"),
            pytest.param(flip(-1), "ohttp.open", id="altered-tag"),
            pytest.param(truncate(1), "ohttp.open", id="truncated"),
            pytest.param(extend(), "ohttp.open", id="extended"),
            pytest.param(substitute(b""), "ohttp.response", id="empty"),
            pytest.param(answer(500), "transport.status", id="error"),
        ],
    )
    def test_an_answer_that_was_tampered_with_is_refused_by_the_worker(
        self, worker: MaliciousWorker, which: int, deed: Deed, code: str
    ) -> None:
        said = len(worker.said())
        order(worker, "answer", deed, which)
        worker.refuses(code, after=said)

    def test_an_earlier_answer_replayed_is_refused_by_the_worker(
        self, worker: MaliciousWorker, which: int
    ) -> None:
        said, earlier = len(worker.said()), worker.wire.exchanges(KEY_SERVICE)[which]
        order(worker, "answer", substitute(earlier.answer.body), which)
        worker.refuses("ohttp.open", after=said)

    def test_the_other_answer_of_the_same_renewal_is_refused_by_the_worker(
        self, worker: MaliciousWorker, which: int
    ) -> None:
        """Reordered: a release's answer where a challenge's belongs, and the other way round."""
        said, earlier = len(worker.said()), worker.wire.exchanges(KEY_SERVICE)[1 - which]
        order(worker, "answer", substitute(earlier.answer.body), which)
        worker.refuses("ohttp.open", after=said)

    def test_an_earlier_request_replayed_gives_the_worker_nothing(
        self, worker: MaliciousWorker, which: int
    ) -> None:
        said, earlier = len(worker.said()), worker.wire.exchanges(KEY_SERVICE)[which]
        order(worker, "request", substitute(earlier.request.body), which)
        worker.refuses("ohttp.open", after=said)  # sealed to the earlier request's sender

    def test_a_request_sent_to_a_pool_is_refused(
        self, worker: MaliciousWorker, brisk: World, which: int
    ) -> None:
        said = len(worker.said())
        order(worker, "request", redirect(brisk.pool.hex()), which)
        worker.refuses("transport.status", after=said)

    def test_answers_swapped_between_two_workers_are_refused_by_both(
        self, workers: tuple[MaliciousWorker, MaliciousWorker], worker: MaliciousWorker, which: int
    ) -> None:
        swap = Swap()
        said = [len(each.said()) for each in workers]
        for each in workers:
            order(each, "answer", swap, which)
        for each, lines in zip(workers, said, strict=True):
            each.refuses("ohttp.open", after=lines)

    def test_requests_swapped_between_two_workers_are_refused_by_both(
        self, workers: tuple[MaliciousWorker, MaliciousWorker], worker: MaliciousWorker, which: int
    ) -> None:
        swap = Swap()
        said = [len(each.said()) for each in workers]
        for each in workers:
            order(each, "request", swap, which)
        for each, lines in zip(workers, said, strict=True):
            each.refuses("ohttp.open", after=lines)

    def test_a_lost_exchange_is_begun_anew(self, worker: MaliciousWorker, which: int) -> None:
        said = len(worker.said())
        order(worker, "request", drop, which)
        worker.refuses("transport.status", after=said)
        assert worker.healthy() or eventually(worker.healthy, "the worker renews")

    def test_a_late_answer_only_costs_time(self, worker: MaliciousWorker, which: int) -> None:
        said = len(worker.said())
        order(worker, "answer", delay(0.5), which)
        eventually(lambda: worker.wire.done, "the delay")
        worker.renews()
        assert len(worker.said()) == said


def test_a_worker_that_is_cut_off_stops_with_its_lease_and_comes_back(
    worker: MaliciousWorker, brisk: World
) -> None:
    worker.wire.on(KEY_SERVICE, "request", drop, times=10**6)
    started = time.monotonic()
    eventually(lambda: not worker.health()["ready"], "the lease runs out")
    assert time.monotonic() - started < brisk.settings["lease_seconds"] + 1
    worker.wire.behave()
    eventually(worker.healthy, "it joins again")


def test_a_replayed_release_request_is_refused_by_name(worker: MaliciousWorker, brisk: World) -> None:
    """The key service answers a copy, but with a refusal: its challenge is spent."""
    import httpx

    (earlier,) = worker.wire.exchanges(KEY_SERVICE)[RELEASE : RELEASE + 1]
    size = len(earlier.answer.body)
    again = httpx.post(
        f"{brisk.url}/ohttp",
        content=earlier.request.body,
        headers=dict(earlier.request.fields),
        trust_env=False,
    )
    assert again.status_code == 200  # what it is, stands inside
    assert len(again.content) < size / 4  # a refusal, no release


# What a worker that isn't honest may send: each part wrong by itself.


def test_an_honest_impostor_would_be_served(service: World) -> None:
    """The tests below mean something: with nothing wrong, the key service releases."""
    impostor = Impostor(service)
    assert impostor.release(impostor.request()).sealed


def refused(service: World, /, **chosen: object) -> CloisterError:
    impostor = Impostor(service)
    request = impostor.request(**chosen)  # type: ignore[arg-type]
    return refusal(lambda: impostor.release(request))


def test_a_made_up_challenge_is_refused(service: World) -> None:
    error = refused(service, challenge=os.urandom(56))
    assert (type(error), error.code) == (BindingRefused, "binding.challenge")


def test_a_challenge_of_another_service_is_refused(service: World, other: World) -> None:
    error = refused(service, challenge=Impostor(other).challenge())
    assert error.code == "binding.challenge"


def test_an_altered_challenge_is_refused(service: World) -> None:
    challenge = bytearray(Impostor(service).challenge())
    challenge[16 + 7] ^= 0x40  # its expiry
    assert refused(service, challenge=bytes(challenge)).code == "binding.challenge"


def test_a_spent_challenge_is_refused(service: World) -> None:
    impostor = Impostor(service)
    request = impostor.request()
    impostor.release(request)
    error = refusal(lambda: impostor.release(request))
    assert (type(error), error.code) == (Replayed, "replayed.challenge")


def test_evidence_for_another_challenge_is_refused(service: World) -> None:
    impostor = Impostor(service)
    request = replace(impostor.request(), challenge=impostor.challenge())
    error = refusal(lambda: impostor.release(request))
    assert (type(error), error.code) == (BindingRefused, "binding.freshness")


def test_a_document_that_was_never_signed_is_refused(service: World) -> None:
    error = refused(service, document=hashlib.sha256(b"another").digest())
    assert (type(error), error.code) == (BindingRefused, "binding.document")


def test_a_document_of_another_service_in_the_request_is_refused(service: World, other: World) -> None:
    assert refused(service, document=other.verified().digest).code == "binding.document"


def test_an_unknown_pool_is_refused(service: World) -> None:
    error = refused(service, pool=bytes(32))
    assert (type(error), error.code) == (NotFound, "not-found.pool")


def test_a_request_without_a_pool_is_refused(service: World) -> None:
    assert refused(service, pool=None).code == "binding.pool"


def test_a_worker_configured_for_another_pool_is_refused(service: World, second_pool: bytes) -> None:
    error = refused(service, pool=second_pool)  # its configuration names the first
    assert (type(error), error.code) == (BindingRefused, "binding.configuration")


def test_evidence_made_for_another_pool_is_refused(service: World, second_pool: bytes) -> None:
    impostor = Impostor(service)
    request = impostor.request()
    moved = replace(request.attestation.binding, pool=second_pool)
    request = replace(request, attestation=replace(request.attestation, binding=moved))
    error = refusal(lambda: impostor.release(request))
    assert (type(error), error.code) == (BindingRefused, "binding.report-data")


def test_evidence_made_for_another_key_is_refused(service: World) -> None:
    """The relay: a genuine worker's evidence, with the attacker's KEM key beside it."""
    genuine, attacker = Impostor(service), Impostor(service)
    request = genuine.request()
    keys = attacker.attest(challenge=request.challenge).binding.keys
    binding = replace(request.attestation.binding, keys=keys)
    request = replace(request, attestation=replace(request.attestation, binding=binding))
    assert refusal(lambda: attacker.release(request)).code == "binding.report-data"


def test_evidence_with_another_purpose_is_refused(service: World) -> None:
    assert refused(service, purpose="service-document").code == "binding.purpose"


def test_evidence_of_another_role_is_refused(service: World) -> None:
    assert refused(service, role="key-service").code == "binding.role"


def test_evidence_for_another_service_is_refused(service: World, other: World) -> None:
    assert refused(service, service=other.user_policy.service).code == "binding.service"


def test_another_measurement_is_refused(service: World) -> None:
    error = refused(service, quote={"mr_enclave": bytes(32)})
    assert (type(error), error.code) == (AppraisalRefused, "appraisal.mr_enclave")
    assert error.actual == bytes(32).hex()


def test_a_key_service_in_the_place_of_a_worker_is_refused(service: World) -> None:
    measured = measure("key-service")
    quote = {"mr_enclave": measured.mr_enclave, "isv_prod_id": measured.isv_prod_id}
    assert refused(service, quote=quote).code == "appraisal.mr_enclave"


def test_a_debug_enclave_is_refused(service: World) -> None:
    assert refused(service, quote={"debug": True}).code == "appraisal.debug"


def test_evidence_of_another_platforms_root_is_refused(service: World, tmp_path: Path) -> None:
    authority = SimulatedAuthority.create(tmp_path, now=int(time.time()))
    error = refused(service, authority=authority)
    assert isinstance(error, EvidenceRefused)


def test_a_revoked_platform_is_refused(service: World) -> None:
    impostor = Impostor(service)
    request = impostor.request()
    authority = SimulatedAuthority.open(service.site.authority)
    collateral = authority.collateral(int(time.time()), flaws=Flaws(pck_revoked=True))
    evidence = Evidence(
        tee=request.attestation.evidence.tee,
        quote=request.attestation.evidence.quote,
        collateral=collateral,
    )
    request = replace(request, attestation=replace(request.attestation, evidence=evidence))
    assert isinstance(refusal(lambda: impostor.release(request)), EvidenceRefused)


def test_an_altered_quote_is_refused(service: World) -> None:
    impostor = Impostor(service)
    request = impostor.request()
    quote = bytearray(request.attestation.evidence.quote)
    quote[112] ^= 1  # MRENCLAVE
    evidence = replace(request.attestation.evidence, quote=bytes(quote))
    request = replace(request, attestation=replace(request.attestation, evidence=evidence))
    assert isinstance(refusal(lambda: impostor.release(request)), EvidenceRefused)


def test_a_configuration_that_names_another_trust_anchor_is_refused(service: World, tmp_path: Path) -> None:
    """A genuine worker that its host started with a root of the host's own."""
    root = SimulatedAuthority.create(tmp_path, now=int(time.time())).roots_der
    configuration = replace(Impostor(service).configuration(), anchor_roots=root)
    error = refused(service, configuration=configuration)
    assert (type(error), error.code) == (AppraisalRefused, "appraisal.anchor")


def test_a_configuration_that_is_not_the_attested_one_is_refused(service: World) -> None:
    impostor = Impostor(service)
    request = impostor.request()
    changed = replace(impostor.configuration(), settings={"threads": 200})
    attestation = replace(request.attestation, configuration=changed.to_bytes())
    request = replace(request, attestation=attestation)
    assert refusal(lambda: impostor.release(request)).code == "binding.report-data"


def test_a_request_without_a_configuration_is_refused(service: World) -> None:
    impostor = Impostor(service)
    request = impostor.request()
    request = replace(request, attestation=replace(request.attestation, configuration=b""))
    assert isinstance(refusal(lambda: impostor.release(request)), FormatError)


def test_a_release_opens_for_its_own_exchange_only(service: World, second_pool: bytes) -> None:
    """Taken from another challenge, document, incarnation, pool or set of statements: it does not open."""
    impostor = Impostor(service)
    one, two = impostor.request(), impostor.request()
    sealed = impostor.release(one)
    suite = hpke.WIRE_SUITES[0]

    def opened(info: bytes) -> Release:
        return Release.from_bytes(hpke.open_from(suite, impostor.kem, sealed.sealed, info=info))

    def info(request: object, pool: bytes, statements: tuple[bytes, ...]) -> bytes:
        return release_info(request, pool=pool, statements=statements)  # type: ignore[arg-type]

    assert opened(info(one, service.pool, sealed.statements)).models
    for wrong in (
        info(two, service.pool, sealed.statements),
        info(replace(one, challenge=two.challenge), service.pool, sealed.statements),
        info(replace(one, document=bytes(32)), service.pool, sealed.statements),
        info(replace(one, incarnation=two.incarnation), service.pool, sealed.statements),
        info(replace(one, attestation=two.attestation), service.pool, sealed.statements),
        info(one, second_pool, sealed.statements),
        info(one, service.pool, sealed.statements[:-1]),
        info(one, service.pool, sealed.statements[::-1]),
    ):
        with pytest.raises(Tampered):
            opened(wrong)


def test_a_release_holds_nothing_of_another_pool(service: World, second_pool: bytes) -> None:
    impostor = Impostor(service)
    request = impostor.request()
    sealed = impostor.release(request)
    info = release_info(request, pool=service.pool, statements=sealed.statements)
    release = Release.from_bytes(hpke.open_from(hpke.WIRE_SUITES[0], impostor.kem, sealed.sealed, info=info))
    document = service.verified().document
    ours = {key.to_bytes() for key in document.pool(service.pool).keys}
    theirs = {key.to_bytes() for key in document.pool(second_pool).keys}
    released = {key.configuration for key in release.pool_keys}
    assert ours <= released
    assert not theirs & released


@pytest.mark.parametrize("path", [b"/challenges", b"/possession"])
def test_a_head_of_another_service_is_refused(service: World, other: World, path: bytes) -> None:
    head = other.verified().document.head
    request = HeadRequest(nonce=os.urandom(32), head=head)
    error = refusal(lambda: Impostor(service).ask(path, request.to_bytes()))
    assert (type(error), error.code) == (BindingRefused, "binding.service")


@pytest.mark.parametrize("path", [b"/challenges", b"/possession"])
def test_a_forged_head_that_would_halt_the_service_is_refused(service: World, path: bytes) -> None:
    """Anyone may present a head; only one that this service signed can show that it was put back."""
    head = service.verified().document.head
    forged = replace(head, size=head.size + 1000)
    request = HeadRequest(nonce=os.urandom(32), head=forged)
    error = refusal(lambda: Impostor(service).ask(path, request.to_bytes()))
    assert (type(error), error.code) == (Tampered, "tampered.signature")
    mine = TreeHead.sign(SigningKey.generate(), size=10**6, root=bytes(32), time=1)
    request = HeadRequest(nonce=os.urandom(32), head=replace(mine, service=head.service))
    assert refusal(lambda: Impostor(service).ask(path, request.to_bytes())).code == "binding.service"
    Impostor(service).challenge()  # it serves on


# A host that chooses what an enclave is started with.


@pytest.mark.parametrize("part", ["anchor", "key service", "service"])
def test_a_worker_whose_host_chose_its_configuration_never_joins(
    service: World, other: World, tmp_path: Path, host: MaliciousHost, part: str
) -> None:
    honest = Impostor(service).configuration()
    root = SimulatedAuthority.create(tmp_path, now=int(time.time())).roots_der
    chosen, code = {
        "anchor": (
            replace(honest, anchor_roots=root, key_service=reference_policy(measure("key-service"), root)),
            "appraisal.anchor",
        ),
        "key service": (
            replace(
                honest,
                key_service=replace(honest.key_service, mr_enclave=frozenset({bytes(32)})),  # type: ignore[type-var]
            ),
            "appraisal.mr_enclave",
        ),
        "service": (replace(honest, service=other.user_policy.service), "binding.service"),
    }[part]
    name = f"chosen-{part.split(maxsplit=1)[0]}"
    worker = host.worker(service.site, name, configuration=chosen, registered=False)
    worker.launch()
    worker.refuses(code, after=0)
    assert not worker.health()["ready"]


def test_a_worker_of_another_service_never_joins_this_one(
    service: World, other: World, host: MaliciousHost
) -> None:
    """Honest in its own service; the host connects it to another one."""
    worker = host.worker(other.site, "crossed", registered=False)
    worker.wire.on(DOCUMENT, "answer", substitute(service.raw_document()), times=1000)
    worker.launch()
    worker.refuses("binding.service", after=0)
    assert not worker.health()["ready"]
