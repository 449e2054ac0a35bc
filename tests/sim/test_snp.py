"""The simulated AMD: kept and restored, recognisable, and in AMD's format."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from cloister.core.evidence import Evidence
from cloister.core.evidence.snp import PRODUCTS, SnpReport
from cloister.core.evidence.snp_table import CertificateTable
from cloister.core.verifier import TrustAnchors
from cloister.core.verifier.certificates import AMD, load_chain
from cloister.core.verifier.snp import verify
from cloister.errors import EvidenceError, UsageError
from cloister.sim.snp import ROLES, SimulatedAmd, SnpFlaws

NOW = 1_800_000_000


@pytest.fixture(scope="module")
def amd() -> SimulatedAmd:
    return SimulatedAmd.create(now=NOW)


def make_report(amd: SimulatedAmd, **changes) -> bytes:
    return amd.report(**{"report_data": b"r" * 64, "measurement": b"m" * 48, **changes})


@pytest.mark.parametrize("product", PRODUCTS)
def test_restored_one_signs_under_the_same_root(product):
    made = SimulatedAmd.create(now=NOW, product=product)
    restored = SimulatedAmd.from_pem(made.to_pem())
    assert (restored.product, restored.root_der) == (product, made.root_der)
    assert (restored.chip_id, restored.tcb) == (made.chip_id, made.tcb)
    evidence = Evidence(tee="snp", quote=make_report(restored), collateral=made.collateral(NOW))
    anchors = TrustAnchors.simulated(made.root_der)
    assert verify(evidence, anchors=anchors, now=NOW).simulated


def test_each_has_its_own_root_and_chip(amd):
    other = SimulatedAmd.create(now=NOW)
    assert other.root_der != amd.root_der
    assert other.chip_id != amd.chip_id


def test_every_name_says_simulated(amd):
    for flaws in (SnpFlaws(), SnpFlaws(vlek=True)):
        for certificate in load_chain(amd.collateral(NOW, flaws=flaws).certificates, AMD):
            assert certificate.common_name.startswith("Cloister Simulated ")


def test_unknown_product():
    with pytest.raises(UsageError) as caught:
        SimulatedAmd.create(now=NOW, product="Naples")
    assert caught.value.claim == "product"


@pytest.mark.parametrize("role", ROLES)
def test_damaged_part(amd, role):
    parts = amd.to_pem()
    key, certificate = parts[role]
    stranger = SimulatedAmd.create(now=NOW).to_pem()[role]
    for damaged in ((b"", certificate), (key, b""), (key[:-40], certificate), (stranger[0], certificate)):
        with pytest.raises(UsageError) as caught:
            SimulatedAmd.from_pem({**parts, role: damaged})
        assert caught.value.code == "sim.authority"
        assert caught.value.__cause__ is None
    with pytest.raises(UsageError):
        SimulatedAmd.from_pem({name: part for name, part in parts.items() if name != role})


def test_encrypted_key(amd):
    parts = amd.to_pem()
    pem = amd._vcek.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    with pytest.raises(UsageError):
        SimulatedAmd.from_pem({**parts, "snp-vcek": (pem, parts["snp-vcek"][1])})


def test_keys_in_each_others_place(amd):
    parts = amd.to_pem()
    for swapped in (("snp-ask", "snp-vcek"), ("snp-vcek", "snp-ask"), ("snp-ark", "snp-ask")):
        with pytest.raises(UsageError):
            SimulatedAmd.from_pem({**parts, swapped[0]: parts[swapped[1]]})


def test_other_kinds_of_keys(amd):
    parts = amd.to_pem()
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())):
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with pytest.raises(UsageError):
            SimulatedAmd.from_pem({**parts, "snp-vcek": (pem, parts["snp-vcek"][1])})


def test_nothing_prints_a_key(amd):
    for identity in (amd._ark, amd._ask, amd._vcek):
        assert "PRIVATE" not in repr(identity)
        assert "key=" not in repr(identity)
    assert isinstance(amd._ark.key, rsa.RSAPrivateKey)


def test_report_fields(amd):
    raw = make_report(amd, host_data=b"h" * 32, vmpl=3, guest_svn=2, version=5, debug=True)
    report = SnpReport.from_bytes(raw)
    assert report.to_bytes() == raw
    assert (report.version, report.vmpl, report.guest_svn, report.debug) == (5, 3, 2, True)
    assert (report.host_data, report.report_data, report.measurement) == (b"h" * 32, b"r" * 64, b"m" * 48)
    assert (report.product, report.signer, report.chip_id) == ("Genoa", "VCEK", amd.chip_id)
    assert SnpReport.from_bytes(make_report(amd, version=2)).product == ""


@pytest.mark.parametrize(
    "changes", [{"report_data": b"r"}, {"vmpl": 4}, {"version": 6}, {"guest_policy": 0}, {"measurement": b""}]
)
def test_values_that_no_report_has(amd, changes):
    with pytest.raises(EvidenceError):
        make_report(amd, **changes)


def test_certificate_table(amd):
    table = CertificateTable.from_bytes(amd.certificate_table())
    assert table.to_collateral("VCEK").certificates == amd.collateral(NOW).certificates
    assert table.to_collateral("VCEK").crl == b""


def test_lists_issued_within_an_hour_carry_one_date(amd):
    start = 1_800_000_300  # a whole hour, and the slack for clocks behind
    anchors = TrustAnchors.simulated(amd.root_der)

    def issued(now: int) -> int | None:
        evidence = Evidence(tee="snp", quote=make_report(amd), collateral=amd.collateral(now))
        return verify(evidence, anchors=anchors, now=now).collateral_issued

    assert issued(start) == issued(start + 3599) == start - 300
    assert issued(start + 3600) == start + 3300
