"""Verification of simulated Nitro documents: what is found out, and one test per refusal."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from types import MappingProxyType

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.evidence import Evidence
from cloister.core.evidence.nitro import NitroDocument
from cloister.core.verifier import TrustAnchors, nitro
from cloister.core.verifier.nitro import MAX_AGE
from cloister.core.verifier.result import MAX_AHEAD, NitroPlatform
from cloister.errors import EvidenceError, EvidenceRefused
from cloister.sim import nitro as sim_nitro
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.nitro import FLAWLESS, LEAF_LIFETIME, ROLES, NitroFlaws, SimulatedNitro
from cloister.sim.pki import raw_sign

NOW = 1_800_000_000
PCRS = {0: b"0" * 48, 1: b"1" * 48, 2: b"2" * 48, 8: b"8" * 48}


@pytest.fixture(scope="module")
def simulated() -> SimulatedNitro:
    return SimulatedNitro.create(now=NOW)


@pytest.fixture(scope="module")
def other() -> SimulatedNitro:
    return SimulatedNitro.create(now=NOW)


@pytest.fixture(scope="module")
def nitro_anchors(simulated) -> TrustAnchors:
    return TrustAnchors.simulated(simulated.root_der)


@pytest.fixture(scope="module")
def document(simulated) -> NitroDocument:
    return NitroDocument.from_bytes(make(simulated, nonce=b"n" * 20, public_key=b"k"))


def make(simulated: SimulatedNitro, flaws: NitroFlaws = FLAWLESS, now: int = NOW, **extra) -> bytes:
    return simulated.document(report_data=b"r" * 64, pcrs=PCRS, now=now, flaws=flaws, **extra)


def check(document: bytes | NitroDocument, anchors: TrustAnchors, now: int = NOW):
    raw = document if isinstance(document, bytes) else document.to_bytes()
    return nitro.verify(Evidence(tee="nitro", quote=raw, collateral=None), anchors=anchors, now=now)


def refusal(document: bytes | NitroDocument, anchors: TrustAnchors, now: int = NOW) -> tuple[str, str]:
    with pytest.raises(EvidenceRefused) as caught:
        check(document, anchors, now)
    return caught.value.code, caught.value.claim


def test_document(document, nitro_anchors):
    result = check(document, nitro_anchors)
    assert (result.tee, result.simulated, result.debug) == ("nitro", True, False)
    assert result.anchors_digest == nitro_anchors.digest
    assert result.platform == NitroPlatform(module_id=document.module_id, timestamp=NOW)
    assert result.report_data == b"r" * 64
    assert (result.tcb_status, result.tcb_date, result.tcb_evaluation_number) == (None, None, None)
    assert (result.advisories, dict(result.collateral)) == ((), {})
    assert result.collateral_issued == NOW
    assert set(result.measurements) == {f"pcr{index}" for index in range(16)} | {"public_key", "nonce"}
    assert {name: result.measurements[name] for name in ("pcr0", "pcr8", "pcr3", "nonce", "public_key")} == {
        "pcr0": b"0" * 48,
        "pcr8": b"8" * 48,
        "pcr3": bytes(48),
        "nonce": b"n" * 20,
        "public_key": b"k",
    }
    assert [step.name.split()[0] for step in result.steps] == ["1", "2", "3", "4", "5", "6"]
    assert {step.outcome for step in result.steps} == {"ok"}


def test_what_the_enclave_left_out(simulated, nitro_anchors):
    result = check(simulated.document(report_data=None, pcrs=PCRS, now=NOW), nitro_anchors)
    assert result.report_data == b""
    assert not {"nonce", "public_key"} & set(result.measurements)


def test_tagged_document(document, nitro_anchors):
    assert not check(replace(document, tagged=True), nitro_anchors).debug


def test_debug_document_says_so(simulated, nitro_anchors):
    result = check(make(simulated, debug=True), nitro_anchors)
    assert result.debug
    assert result.measurements["pcr8"] == b"8" * 48
    assert result.steps[-1].outcome == "note"


def test_result_can_be_printed_and_does_not_change(document, nitro_anchors):
    result = check(document, nitro_anchors)
    printed = json.loads(json.dumps(result.to_dict()))
    assert printed["platform"] == {"module_id": document.module_id, "timestamp": NOW}
    assert "SIMULATED" in result.lines()[0]
    with pytest.raises(TypeError):
        result.measurements["pcr0"] = b""  # type: ignore[index]


# Step 1: the document parses.


def test_document_that_does_not_parse(nitro_anchors):
    with pytest.raises(EvidenceError) as caught:
        check(b"\x80", nitro_anchors)
    assert caught.value.code == "evidence.format"


@pytest.mark.parametrize("position", range(5))
def test_certificate_that_does_not_parse(position, document, nitro_anchors):
    with pytest.raises(EvidenceError) as caught:
        check(with_certificate(document, position, lambda der: der[:-1]), nitro_anchors)
    assert (caught.value.code, caught.value.claim) == ("evidence.certificate", "certificate")


def test_certificate_of_another_kind(document, nitro_anchors, authority: SimulatedAuthority):
    """A P-256 root has no place in a Nitro chain, whoever vouches for it."""
    bundle = (authority.root_der, *document.cabundle[1:])
    with pytest.raises(EvidenceError, match="AWS"):
        check(replace(document, cabundle=bundle), TrustAnchors.simulated(authority.root_der))


# Step 2: the root.


def test_simulated_document_under_the_vendors_root(document):
    assert refusal(document, TrustAnchors.vendor()) == ("evidence.simulated", "simulated")


def test_root_of_another_platform(document, other):
    anchors = TrustAnchors.simulated(other.root_der)
    assert refusal(document, anchors) == ("evidence.root", "root certificate")


def test_no_root_of_this_kind(document, authority):
    anchors = TrustAnchors.simulated(authority.root_der)
    assert refusal(document, anchors) == ("evidence.root", "root certificate")


def test_bundle_in_reverse_order(document, nitro_anchors):
    found = refusal(replace(document, cabundle=document.cabundle[::-1]), nitro_anchors)
    assert found == ("evidence.root", "root certificate")


def test_chain_without_its_root(simulated, nitro_anchors):
    flaws = NitroFlaws(left_out=frozenset({"nitro-root"}))
    assert refusal(make(simulated, flaws), nitro_anchors) == ("evidence.root", "root certificate")


# Step 3: the chain.


@pytest.mark.parametrize("role", ROLES[1:])
def test_chain_with_a_gap(role, simulated, nitro_anchors):
    code, claim = refusal(make(simulated, NitroFlaws(left_out=frozenset({role}))), nitro_anchors)
    assert (code, claim.split(":")[0]) == ("evidence.nitro-chain", "Nitro chain")


def test_swapped_intermediates(document, nitro_anchors):
    root, regional, zonal, instance = document.cabundle
    for bundle in ((root, zonal, regional, instance), (root, regional, instance, zonal)):
        code, claim = refusal(replace(document, cabundle=bundle), nitro_anchors)
        assert (code, claim.split(":")[0]) == ("evidence.nitro-chain", "Nitro chain")


def test_certificate_twice(document, nitro_anchors):
    root, *rest = document.cabundle
    code, _ = refusal(replace(document, cabundle=(root, root, *rest)), nitro_anchors)
    assert code == "evidence.nitro-chain"


def test_leaf_of_another_platform(document, simulated, other, nitro_anchors):
    """Everything but the pinned root is another platform's; so are root and leaf swapped alone."""
    foreign = NitroDocument.from_bytes(make(other))
    for spoiled in (
        replace(foreign, cabundle=(document.cabundle[0], *foreign.cabundle[1:])),
        replace(foreign, cabundle=document.cabundle),
        replace(document, certificate=foreign.certificate),
    ):
        code, claim = refusal(spoiled, nitro_anchors)
        assert (code, claim.split(":")[0]) == ("evidence.nitro-chain", "Nitro chain")
    assert check(document, nitro_anchors).simulated


def test_leaf_that_signs_a_certificate(document, simulated, nitro_anchors):
    """An end entity issues nothing: the path ends at the instance's certificate."""
    issuer = SimulatedNitro.create(now=NOW)
    instance = simulated.to_pem()["nitro-instance"]
    issuer = SimulatedNitro.from_pem(issuer.to_pem() | {"nitro-instance": instance})
    under_leaf = NitroDocument.from_bytes(make(issuer, NitroFlaws(leaf_is_ca=True)))
    bundle = (*document.cabundle, document.certificate)
    code, claim = refusal(replace(under_leaf, cabundle=bundle), nitro_anchors)
    assert code == "evidence.nitro-chain"
    assert document.module_id in claim


def test_leaf_that_is_a_ca(simulated, nitro_anchors):
    """Its signature and name are right: what it may do isn't."""
    code, claim = refusal(make(simulated, NitroFlaws(leaf_is_ca=True)), nitro_anchors)
    assert (code, "-enc" in claim) == ("evidence.nitro-chain", True)


def test_leaf_that_must_not_sign(simulated, nitro_anchors):
    code, claim = refusal(make(simulated, NitroFlaws(leaf_signs=False)), nitro_anchors)
    assert (code, "-enc" in claim) == ("evidence.nitro-chain", True)


@pytest.mark.parametrize(
    ("flaws", "now", "code"),
    [
        (FLAWLESS, NOW + LEAF_LIFETIME, "evidence.expired"),
        (NitroFlaws(age=LEAF_LIFETIME), NOW, "evidence.expired"),
        (FLAWLESS, NOW - 4, "evidence.not-yet-valid"),
        (NitroFlaws(leaf_age=-10), NOW, "evidence.not-yet-valid"),
        (NitroFlaws(leaf_lifetime=2), NOW, "evidence.expired"),
    ],
)
def test_leaf_out_of_its_dates(flaws, now, code, simulated, nitro_anchors):
    found, claim = refusal(make(simulated, flaws), nitro_anchors, now)
    assert (found, claim.startswith("validity of Nitro chain: i-simulated-enc")) == (code, True)


def test_last_second(document, nitro_anchors):
    result = check(document, nitro_anchors)
    assert result.not_after == NOW + LEAF_LIFETIME - 3
    assert check(document, nitro_anchors, now=result.not_after).not_after == result.not_after
    assert refusal(document, nitro_anchors, result.not_after + 1)[0] == "evidence.expired"


@pytest.mark.parametrize("role", ROLES)
def test_result_ends_with_each_certificate(role):
    identities: dict = {}
    for below, name in zip(reversed(range(len(ROLES))), ROLES, strict=True):
        identities[name] = sim_nitro._issue(
            f"Cloister Simulated {name}",
            issuer=next(reversed(identities.values()), None),
            not_before=NOW - 86400,
            not_after=NOW + (3600 if name == role else 86400),
            path_length=below,
        )
    made = SimulatedNitro(identities)
    assert check(make(made), TrustAnchors.simulated(made.root_der)).not_after == NOW + 3600


def test_result_ends_when_the_document_is_too_old(simulated, nitro_anchors):
    result = check(make(simulated, NitroFlaws(leaf_lifetime=86400)), nitro_anchors)
    assert result.not_after == NOW + MAX_AGE


def with_certificate(document: NitroDocument, position: int, change) -> NitroDocument:
    """A document with one certificate changed: 0 is the root, 4 the leaf."""
    chain = [*document.cabundle, document.certificate]
    chain[position] = change(chain[position])
    return replace(document, cabundle=tuple(chain[:-1]), certificate=chain[-1])


@pytest.mark.parametrize("position", range(5))
def test_certificate_with_any_byte_changed(position, document, nitro_anchors):
    size = len((*document.cabundle, document.certificate)[position])
    for offset in range(0, size, 13):
        changed = with_certificate(
            document, position, lambda der, at=offset: der[:at] + bytes([der[at] ^ 1]) + der[at + 1 :]
        )
        with pytest.raises((EvidenceRefused, EvidenceError)) as caught:
            check(changed, nitro_anchors)
        assert caught.value.code in {
            "evidence.certificate",
            "evidence.root",
            "evidence.simulated",
            "evidence.key-usage",
            "evidence.nitro-chain",
            "evidence.nitro-signature",
        }


# Step 4: the signature.


SIGNED = ("evidence.nitro-signature", "signature of the Nitro document")


def test_another_key_signed(simulated, nitro_anchors):
    assert refusal(make(simulated, NitroFlaws(other_signer=True)), nitro_anchors) == SIGNED


@pytest.mark.parametrize(
    "change",
    [
        {"module_id": "i-other-enc0"},
        {"timestamp": NOW * 1000 + 1},
        {"pcrs": MappingProxyType(PCRS)},
        {"public_key": b"K"},
        {"public_key": None},
        {"user_data": b"R" * 64},
        {"user_data": None},
        {"nonce": b"N" * 20},
        {"nonce": b""},
        {"nonce": None},
        {"signature": bytes(96)},
        {"signature": b"\xff" * 96},
    ],
)
def test_field_that_was_changed(change, document, nitro_anchors):
    assert refusal(replace(document, **change), nitro_anchors) == SIGNED


@pytest.mark.parametrize("index", range(16))
def test_register_that_was_changed(index, document, nitro_anchors):
    pcrs = dict(document.pcrs) | {index: b"x" * 48}
    assert refusal(replace(document, pcrs=MappingProxyType(pcrs)), nitro_anchors) == SIGNED


def test_registers_and_fields_in_another_order(document, nitro_anchors):
    pcrs = MappingProxyType(dict(reversed(document.pcrs.items())))
    assert refusal(replace(document, pcrs=pcrs), nitro_anchors) == SIGNED
    assert refusal(replace(document, fields=document.fields[::-1]), nitro_anchors) == SIGNED


def test_signature_of_another_document(document, simulated, nitro_anchors):
    foreign = NitroDocument.from_bytes(make(simulated))
    assert refusal(replace(document, signature=foreign.signature), nitro_anchors) == SIGNED


def test_document_that_the_instance_signed(document, simulated, nitro_anchors):
    """Only the leaf signs documents, not the CA above it."""
    key = load_pem_private_key(simulated.to_pem()["nitro-instance"][0], None)
    forged = replace(document, signature=raw_sign(key, document.signed_bytes))
    assert refusal(forged, nitro_anchors) == SIGNED


# Step 5: the timestamp.

TIMESTAMP = ("evidence.timestamp", "timestamp of the Nitro document")
VALIDITY = "validity of the Nitro document"


def test_document_older_than_its_leaf(simulated, nitro_anchors):
    assert refusal(make(simulated, NitroFlaws(leaf_age=-1)), nitro_anchors, NOW + 2) == TIMESTAMP


def test_document_younger_than_its_leaf_lives(simulated, nitro_anchors):
    document = make(simulated, NitroFlaws(leaf_lifetime=5, leaf_age=6))
    assert refusal(document, nitro_anchors, NOW - 2) == TIMESTAMP


def test_document_from_the_future(simulated, nitro_anchors):
    document = make(simulated, NitroFlaws(leaf_age=MAX_AHEAD + 10))
    assert check(document, nitro_anchors, NOW - MAX_AHEAD).platform.timestamp == NOW
    assert refusal(document, nitro_anchors, NOW - MAX_AHEAD - 1) == ("evidence.not-yet-valid", VALIDITY)


def test_document_that_outlives_what_leaves_do(simulated, nitro_anchors):
    """A leaf of a day doesn't make a document of a day."""
    document = make(simulated, NitroFlaws(leaf_lifetime=86400))
    result = check(document, nitro_anchors, NOW + MAX_AGE)
    assert result.not_after == NOW + MAX_AGE
    assert refusal(document, nitro_anchors, NOW + MAX_AGE + 1) == ("evidence.expired", VALIDITY)


# Any bytes.


@settings(max_examples=200, deadline=None)
@given(offset=st.integers(0, 1 << 16), value=st.binary(min_size=1, max_size=4))
def test_changed_document_is_our_error(offset, value, document, nitro_anchors):
    raw = document.to_bytes()
    offset %= len(raw)
    changed = raw[:offset] + value + raw[offset + len(value) :]
    with contextlib.suppress(EvidenceError, EvidenceRefused):
        assert check(changed, nitro_anchors).to_dict() == check(raw, nitro_anchors).to_dict()
        assert changed == raw
