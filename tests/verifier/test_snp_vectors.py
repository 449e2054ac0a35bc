"""SEV-SNP evidence that AMD's processors really signed: what is genuine verifies, what is altered doesn't."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from functools import cache

import cbor2
import pytest
import snp_vectors as real
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.evidence import Evidence
from cloister.core.evidence.snp import SnpReport
from cloister.core.evidence.snp_table import make_collateral
from cloister.core.verifier import TrustAnchors
from cloister.core.verifier.certificates import AMD, load_certificate, load_crl
from cloister.core.verifier.chain import require_not_revoked, verify_crl
from cloister.core.verifier.roots import amd
from cloister.core.verifier.snp import verify
from cloister.errors import EvidenceError, EvidenceRefused
from cloister.sim import pki, snp_pki

pytestmark = pytest.mark.skipif(
    not real.FOLDER.is_dir(), reason="real SEV-SNP evidence (../shared/vectors/snp) is not on this machine"
)
ANCHORS = TrustAnchors.vendor()


def refused(evidence: Evidence, now: int = real.NOW) -> EvidenceRefused:
    with pytest.raises(EvidenceRefused) as caught:
        verify(evidence, anchors=ANCHORS, now=now)
    assert caught.value.claim
    assert caught.value.expected != caught.value.actual
    return caught.value


def with_chain(evidence: Evidence, *, vek: bytes, ask: bytes, ark: bytes) -> Evidence:
    return replace(evidence, collateral=make_collateral(vek=vek, ask=ask, ark=ark))


@pytest.mark.parametrize("load", real.GOOD, ids=lambda load: load.__name__)
def test_genuine_evidence_verifies(load):
    evidence = load()
    found = verify(evidence, anchors=ANCHORS, now=real.NOW)
    assert (found.tee, found.simulated) == ("snp", False)
    assert found.debug == (load is real.google)  # its policy, 0xb0000, has DEBUG set
    assert found.platform.signer == ("VLEK" if load is real.trustee_vlek else "VCEK")
    genoa = load in (real.azure_virtual_machine, real.veraison)
    assert found.platform.product == ("Genoa" if genoa else "Milan")
    assert SnpReport.from_bytes(evidence.quote).to_bytes() == evidence.quote
    assert (found.collateral_issued is None) == (load is real.veraison)  # it comes without a revocation list
    assert [step.name[0] for step in found.steps] == list("12345678")
    json.dumps(found.to_dict())


def test_report_signed_by_a_vlek():
    """AWS's key of a whole region; the processor is not named."""
    found = verify(real.trustee_vlek(), anchors=ANCHORS, now=real.NOW)
    assert found.platform.csp_id == "CN=cc-us-east-2.amazonaws.com"
    assert found.platform.chip_id == bytes(64)
    assert found.measurements["vmpl"] == 1
    assert dict(found.platform.tcb) == {"bootloader": 4, "tee": 0, "snp": 0x18, "microcode": 0xD9}


def test_result_of_a_genoa_report():
    found = verify(real.azure_virtual_machine(), anchors=ANCHORS, now=real.NOW)
    assert dict(found.platform.tcb) == {"bootloader": 10, "tee": 0, "snp": 0x17, "microcode": 0x54}
    assert found.platform.csp_id == ""
    assert found.platform.chip_id.hex().startswith("c70912d8d216bd3f")
    assert found.platform.platform_info == 0x24
    assert found.measurements["guest_svn"] == 0x10009
    assert found.measurements["report_version"] == 3
    assert found.collateral["CRL of ARK-Genoa"].number == 4
    assert found.not_after == 1762131600  # the revocation list's next update, before any certificate's end


def test_azure_binds_its_measurement_and_its_policy():
    """The measurement is the one that Microsoft's endorsement names."""
    data = json.loads(real.read("azure-aci-kms/snp.json"))
    found = verify(real.azure_container(), anchors=ANCHORS, now=real.NOW)
    payload = json.loads(cbor2.loads(base64.b64decode(data["uvm_endorsements"])).value[2])
    assert payload["x-ms-sevsnpvm-launchmeasurement"] == found.measurements["measurement"].hex()
    assert found.measurements["host_data"] != bytes(32)


def test_report_of_version_4_without_a_vcek():
    """GCE's: parses, and no other chip's VCEK verifies it."""
    raw = real.read("openpcc/gce_sevsnp_report.bin")
    report = SnpReport.from_bytes(raw)
    assert (report.version, report.product, report.to_bytes() == raw) == (4, "Milan", True)
    assert real.from_archive("openpcc/gce_sevsnp_report.txt", "test_gce_sevsnp_report") == raw
    assert refused(replace(real.trustee(), quote=raw)).code == "evidence.snp-signature"


@pytest.mark.parametrize("name", ["legacy", "new"])
def test_vcek_that_the_ask_did_not_sign(name):
    """Made by Trustee's authors: AMD's names, a key of their own."""
    vcek = real.read(f"trustee-snp/test-vcek-invalid-{name}.der")
    by = real.authority("milan")
    error = refused(with_chain(real.trustee(), vek=vcek, ask=by.ask, ark=by.ark))
    assert (error.code, error.claim) == ("evidence.snp-chain", "VCEK chain: issuer of SEV-VCEK")


@pytest.mark.parametrize("product", ["milan", "genoa"])
def test_revocation_list_is_the_roots(product):
    crl = load_crl(real.crl(product), AMD)
    ark = load_certificate(real.authority(product).ark, AMD)
    verify_crl(crl, ark, now=real.NOW, code="x", what="list")
    other = load_certificate(real.authority("turin_vcek").ark, AMD)
    with pytest.raises(EvidenceRefused, match="issuer of list"):
        verify_crl(crl, other, now=real.NOW, code="x", what="list")


def test_genoas_list_revokes_the_first_ask():
    crl = load_crl(real.crl("genoa"), AMD)
    require_not_revoked(load_certificate(real.authority("genoa").ask, AMD), crl)
    ark = snp_pki.issue_authority("ARK-Genoa", None, not_before=real.NOW, not_after=real.NOW + 1)
    builder = snp_pki._builder("SEV-Genoa", ark.key.public_key(), ark, real.NOW, real.NOW + 1)
    builder._serial_number = 0x020001  # that ASK itself is not among the vectors
    first = pki.Identity(key=ark.key, certificate=snp_pki._sign(builder, ark.key))
    with pytest.raises(EvidenceRefused) as caught:
        require_not_revoked(load_certificate(first.der, AMD), crl)
    assert caught.value.code == "evidence.revoked"
    assert caught.value.actual == "revoked on 2022-10-31T12:00:00Z"


def test_revocation_list_of_another_product():
    evidence = real.trustee()
    error = refused(replace(evidence, collateral=replace(evidence.collateral, crl=real.crl("genoa"))))
    assert (error.code, error.claim) == ("evidence.snp-crl", "issuer of AMD's revocation list")


def test_altered_revocation_list():
    evidence = real.trustee()
    crl = bytearray(evidence.collateral.crl)
    crl[-1] ^= 1
    error = refused(replace(evidence, collateral=replace(evidence.collateral, crl=bytes(crl))))
    assert (error.code, error.claim) == ("evidence.snp-crl", "signature of AMD's revocation list")


@pytest.mark.parametrize("name", ["milan", "genoa", "turin_vcek"])
@pytest.mark.parametrize("kind", ["ask", "asvk"])
def test_every_authority_of_amd_under_the_pinned_roots(name, kind):
    product = name.split("_")[0]
    by = real.authority(name if kind == "ask" else f"{product}_vlek")
    ark = load_certificate(by.ark, AMD)
    ANCHORS.require_root("snp", ark)
    assert ark.fingerprint == amd.FINGERPRINTS[product.capitalize()]
    ask = load_certificate(by.ask, AMD)
    ask.parsed.verify_directly_issued_by(ark.parsed)
    assert ask.common_name == f"SEV-{'' if kind == 'ask' else 'VLEK-'}{product.capitalize()}"


def test_ask_and_ark_swapped():
    by = real.authority("milan")
    vcek = real.read("trustee-snp/test-vcek.der")
    error = refused(with_chain(real.trustee(), vek=vcek, ask=by.ark, ark=by.ask))
    assert (error.code, error.claim) == ("evidence.root", "root certificate")


def test_ask_of_another_product():
    vcek = real.read("trustee-snp/test-vcek.der")
    mixed = with_chain(
        real.trustee(), vek=vcek, ask=real.authority("genoa").ask, ark=real.authority("milan").ark
    )
    error = refused(mixed)
    assert (error.code, error.claim) == ("evidence.snp-chain", "issuer of the VCEK")


def test_root_of_another_product():
    vcek = real.read("trustee-snp/test-vcek.der")
    by = real.authority("genoa")
    error = refused(with_chain(real.trustee(), vek=vcek, ask=by.ask, ark=by.ark))
    assert (error.code, error.claim) == ("evidence.snp-product", "root of the product")


def test_vcek_of_another_product():
    genoa = real.azure_virtual_machine()
    error = refused(replace(genoa, collateral=real.trustee().collateral))
    assert (error.code, error.claim) == ("evidence.snp-product", "product of the VCEK")


def test_vcek_of_another_chip():
    """Both are Milan, version 2: only the signature tells them apart."""
    error = refused(replace(real.trustee(), collateral=real.google().collateral))
    assert (error.code, error.claim) == ("evidence.snp-signature", "signature of the report")


def test_vlek_under_the_rules_of_a_vcek():
    """KEY_INFO decides: the VLEK's report says VCEK, and its ASVK is no ASK."""
    evidence = real.trustee_vlek()
    report = SnpReport.from_bytes(evidence.quote)
    error = refused(replace(evidence, quote=replace(report, key_info=0).to_bytes()))
    assert (error.code, error.claim) == ("evidence.snp-chain", "issuer of the VCEK")
    assert (error.expected, error.actual) == ("SEV-Milan", "SEV-VLEK-Milan")


def test_vcek_under_the_rules_of_a_vlek():
    evidence = real.trustee()
    report = SnpReport.from_bytes(evidence.quote)
    error = refused(replace(evidence, quote=replace(report, key_info=0b100).to_bytes()))
    assert (error.code, error.claim) == ("evidence.snp-chain", "issuer of the VLEK")


@pytest.mark.parametrize(
    ("now", "code", "of"),
    [
        (1_665_000_000, "evidence.not-yet-valid", "SEV-VCEK"),  # 2022-10
        (1_746_000_000, "evidence.not-yet-valid", "AMD's revocation list"),  # 2025-04
        (1_780_000_000, "evidence.expired", "AMD's revocation list"),  # 2026-05
        (1_900_000_000, "evidence.expired", "SEV-VCEK"),  # 2030-03
    ],
)
def test_dates(now, code, of):
    error = refused(real.trustee(), now)
    assert error.code == code
    assert error.claim.endswith(of)


# The lowest bit of a field flipped in a report of version 3, and the check that notices.
FIELDS = {
    "version": "evidence.format",  # version 2 has no CPUID
    "guest_svn": "evidence.snp-signature",
    "policy": "evidence.snp-signature",
    "family_id": "evidence.snp-signature",
    "image_id": "evidence.snp-signature",
    "vmpl": "evidence.snp-signature",
    "signature_algorithm": "evidence.snp-algorithm",
    "current_tcb": "evidence.snp-signature",
    "platform_info": "evidence.snp-signature",
    "key_info": "evidence.snp-signature",
    "report_data": "evidence.snp-signature",
    "measurement": "evidence.snp-signature",
    "host_data": "evidence.snp-signature",
    "id_key_digest": "evidence.snp-signature",
    "author_key_digest": "evidence.snp-signature",
    "report_id": "evidence.snp-signature",
    "report_id_ma": "evidence.snp-signature",
    "reported_tcb": "evidence.snp-signature",
    "cpuid_family": "evidence.snp-product",
    "cpuid_model": "evidence.snp-signature",
    "cpuid_stepping": "evidence.snp-signature",
    "chip_id": "evidence.snp-signature",
    "committed_tcb": "evidence.snp-signature",
    "current_version": "evidence.snp-signature",
    "committed_version": "evidence.snp-signature",
    "launch_tcb": "evidence.snp-signature",
    "launch_mitigation_vector": "evidence.format",
    "current_mitigation_vector": "evidence.format",
    "signature": "evidence.snp-signature",
}


def test_each_field_is_flipped_below():
    assert list(FIELDS) == list(SnpReport.__dataclass_fields__)


@pytest.mark.parametrize("name", FIELDS)
def test_field_that_was_flipped(name):
    evidence = real.azure_virtual_machine()
    report = SnpReport.from_bytes(evidence.quote)
    value = getattr(report, name)
    changed = value ^ 1 if isinstance(value, int) else value[:-1] + bytes([value[-1] ^ 1])
    with pytest.raises((EvidenceError, EvidenceRefused)) as caught:
        verify(
            replace(evidence, quote=replace(report, **{name: changed}).to_bytes()),
            anchors=ANCHORS,
            now=real.NOW,
        )
    assert caught.value.code == FIELDS[name]
    assert caught.value.claim


def test_every_byte_of_a_report_counts():
    evidence = real.trustee()
    for offset in range(len(evidence.quote)):
        changed = bytearray(evidence.quote)
        changed[offset] ^= 0x10
        with pytest.raises((EvidenceError, EvidenceRefused)):
            verify(replace(evidence, quote=bytes(changed)), anchors=ANCHORS, now=real.NOW)


def test_truncated_report():
    evidence = real.trustee()
    for size in (1, 671, 672, 1183):
        with pytest.raises(EvidenceError) as caught:
            verify(replace(evidence, quote=evidence.quote[:size]), anchors=ANCHORS, now=real.NOW)
        assert caught.value.claim == "SNP report"


@cache
def _collateral():
    return real.trustee().collateral


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_altered_collateral_gives_our_errors_or_the_same_keys(data):
    """A certificate can be cut, swapped or flipped; what still verifies has the genuine keys in it."""
    collateral = _collateral()
    field = data.draw(st.sampled_from(["certificates", "crl"]))
    raw = bytearray(getattr(collateral, field))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    evidence = replace(real.trustee(), collateral=replace(collateral, **{field: bytes(raw)}))
    try:
        found = verify(evidence, anchors=ANCHORS, now=real.NOW)
    except (EvidenceError, EvidenceRefused):
        return
    assert found.measurements["measurement"] == SnpReport.from_bytes(evidence.quote).measurement


def test_simulated_anchors_refuse_genuine_evidence():
    ark = snp_pki.issue_authority("ARK-Milan", None, not_before=real.NOW, not_after=real.NOW + 1)
    with pytest.raises(EvidenceRefused) as caught:
        verify(real.trustee(), anchors=TrustAnchors.simulated(ark.der), now=real.NOW)
    assert caught.value.code == "evidence.root"


def test_real_vceks_are_on_p384():
    for load in real.GOOD:
        leaf = load().collateral.certificates.split(b"-----END")[0].split(b"-----\n")[1]
        key = load_certificate(base64.b64decode(b"".join(leaf.split())), AMD).key
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == "secp384r1"


def test_azures_json_holds_the_report_beside_it():
    data = json.loads(real.read("azure-aci-kms/snp.json"))
    assert base64.b64decode(data["evidence"]) == real.read("azure-aci-kms/report.bin")
