"""The simulated Nitro hypervisor: recognisable, restorable, private."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister.core.evidence import Evidence
from cloister.core.evidence.nitro import NitroDocument
from cloister.core.verifier import TrustAnchors, nitro
from cloister.core.verifier.anchors import SIMULATED_MARK
from cloister.errors import EvidenceError, UsageError
from cloister.sim.nitro import LEAF_LIFETIME, ROLES, SimulatedNitro

NOW = 1_800_000_000
YEAR = 365 * 86400


@pytest.fixture(scope="module")
def simulated() -> SimulatedNitro:
    return SimulatedNitro.create(now=NOW)


def document(simulated: SimulatedNitro, now: int = NOW, **extra) -> bytes:
    values = {"report_data": b"r" * 64, "pcrs": {0: b"p" * 48}} | extra
    return simulated.document(**values, now=now)


def check(raw: bytes, simulated: SimulatedNitro, now: int = NOW):
    evidence = Evidence(tee="nitro", quote=raw, collateral=None)
    return nitro.verify(evidence, anchors=TrustAnchors.simulated(simulated.root_der), now=now)


def chain(raw: bytes) -> list[x509.Certificate]:
    parsed = NitroDocument.from_bytes(raw)
    return [x509.load_der_x509_certificate(der) for der in (*parsed.cabundle, parsed.certificate)]


def test_chain_has_the_shape_of_aws(simulated):
    certificates = chain(document(simulated))
    lengths = [
        certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
        for certificate in certificates
    ]
    assert lengths == [3, 2, 1, 0, None]
    leaf = certificates[-1]
    assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds() == LEAF_LIFETIME
    for certificate in certificates:
        assert SIMULATED_MARK in certificate.subject.rfc4514_string()
        assert isinstance(certificate.public_key().curve, ec.SECP384R1)
        assert len(certificate.public_bytes(Encoding.DER)) <= 1024


def test_each_document_has_a_leaf_of_its_own(simulated):
    one, two = (NitroDocument.from_bytes(document(simulated)) for _ in range(2))
    assert one.certificate != two.certificate
    assert one.module_id != two.module_id
    assert one.cabundle == two.cabundle


def test_restored_one_is_the_same(simulated):
    again = SimulatedNitro.from_pem(simulated.to_pem())
    assert again.root_der == simulated.root_der
    assert check(document(again), simulated).report_data == b"r" * 64
    assert set(simulated.to_pem()) == set(ROLES)


def test_years_later(simulated):
    assert check(document(simulated, NOW + 9 * YEAR), simulated, NOW + 9 * YEAR).simulated
    with pytest.raises(UsageError) as caught:
        document(simulated, NOW + 11 * YEAR)
    assert caught.value.code == "sim.authority"


def other_key() -> bytes:
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def ed25519_key() -> bytes:
    key = ed25519.Ed25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda key, certificate: (b"garbage", certificate),
        lambda key, certificate: (other_key(), certificate),
        lambda key, certificate: (ed25519_key(), certificate),
        lambda key, certificate: (key, b"garbage"),
        lambda key, certificate: (key, "text"),
        lambda key, certificate: (key,),
    ],
)
def test_restoring_what_is_damaged(spoil, role, simulated):
    identities = simulated.to_pem()
    with pytest.raises(UsageError, match="damaged") as caught:
        SimulatedNitro.from_pem(identities | {role: spoil(*identities[role])})
    assert caught.value.code == "sim.authority"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("role", ROLES)
def test_restoring_without_a_role(role, simulated):
    identities = simulated.to_pem()
    del identities[role]
    with pytest.raises(UsageError, match="damaged"):
        SimulatedNitro.from_pem(identities)


@pytest.mark.parametrize(
    ("extra", "claim"),
    [
        ({"report_data": bytes(513)}, "user_data"),
        ({"nonce": bytes(513)}, "nonce"),
        ({"public_key": b""}, "public_key"),
        ({"pcrs": {0: b"short"}}, "pcr0"),
        ({"pcrs": {32: bytes(48)}}, "pcrs"),
    ],
)
def test_value_of_another_length(extra, claim, simulated):
    with pytest.raises(EvidenceError) as caught:
        document(simulated, **extra)
    assert caught.value.claim == claim


def test_debug_has_zero_registers(simulated):
    parsed = NitroDocument.from_bytes(document(simulated, debug=True, pcrs={0: b"p" * 48, 4: b"4" * 48}))
    assert [any(parsed.pcrs[index]) for index in range(5)] == [False, False, False, False, True]
    assert parsed.debug


def test_keys_are_not_printed(simulated):
    assert "PRIVATE" not in repr(simulated) + repr(vars(simulated))
