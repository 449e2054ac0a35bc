"""Verification of SEV-SNP reports step by step: simulated evidence that is wrong in exactly one place."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.core import encoding
from cloister.core.evidence import Evidence
from cloister.core.evidence.snp import PRODUCTS, SnpReport, SnpTcb
from cloister.core.evidence.snp_table import make_collateral
from cloister.core.evidence.vek import ARC
from cloister.core.verifier import TrustAnchors
from cloister.core.verifier.result import CollateralMark, CollateralMemory, SnpPlatform
from cloister.core.verifier.snp import verify
from cloister.errors import EvidenceError, EvidenceRefused
from cloister.sim import pki, snp_pki
from cloister.sim.snp import FLAWLESS, PROVIDER, SimulatedAmd, SnpFlaws, platform_tcb

NOW = 1_800_000_000
DATES = {"not_before": NOW - 86400, "not_after": NOW + 86400}


@pytest.fixture(scope="module")
def makers() -> dict[str, SimulatedAmd]:
    return {product: SimulatedAmd.create(now=NOW, product=product) for product in PRODUCTS}


@pytest.fixture(scope="module")
def amd(makers) -> SimulatedAmd:
    return makers["Genoa"]


@pytest.fixture(scope="module")
def other() -> SimulatedAmd:
    """Another Genoa, with the same names."""
    return SimulatedAmd.create(now=NOW, product="Genoa")


def bundle(amd: SimulatedAmd, *, flaws: SnpFlaws = FLAWLESS, change=None, crl=None, **report) -> Evidence:
    """Evidence; ``change`` alters the report's fields before it is signed again."""
    raw = amd.report(report_data=b"r" * 64, measurement=b"m" * 48, **report)
    if change:
        raw = amd.sign(replace(SnpReport.from_bytes(raw), **change))
    collateral = amd.collateral(NOW, flaws=flaws)
    return Evidence(
        tee="snp", quote=raw, collateral=collateral if crl is None else replace(collateral, crl=crl)
    )


def with_chain(amd: SimulatedAmd, *, vek=None, ask=None, ark=None, **report) -> Evidence:
    evidence = bundle(amd, **report)
    parts = {"vek": vek or amd._vcek, "ask": ask or amd._ask, "ark": ark or amd._ark}
    return replace(
        evidence,
        collateral=make_collateral(
            crl=evidence.collateral.crl, **{name: identity.der for name, identity in parts.items()}
        ),
    )


def check(amd: SimulatedAmd, evidence: Evidence, *, now: int = NOW):
    return verify(evidence, anchors=TrustAnchors.simulated(amd.root_der), now=now)


def refused(amd: SimulatedAmd, evidence: Evidence, *, now: int = NOW) -> tuple[str, str]:
    """Code and claim."""
    with pytest.raises(EvidenceRefused) as caught:
        check(amd, evidence, now=now)
    assert caught.value.expected != caught.value.actual
    return caught.value.code, caught.value.claim


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize("vlek", [False, True])
def test_flawless(makers, product, version, vlek):
    amd = makers[product]
    found = check(amd, bundle(amd, flaws=SnpFlaws(vlek=vlek), version=version, vlek=vlek))
    assert (found.tee, found.simulated, found.debug) == ("snp", True, False)
    assert found.platform == SnpPlatform(
        product=product,
        signer="VLEK" if vlek else "VCEK",
        chip_id=amd.chip_id,
        csp_id=PROVIDER if vlek else "",
        tcb=amd.tcb.parts,
        platform_info=0x25,
    )
    assert ("fmc" in found.platform.tcb) == (product == "Turin")
    assert [step.outcome for step in found.steps] == ["ok"] * 8


def test_result(amd):
    found = check(amd, bundle(amd, host_data=b"h" * 32, vmpl=2, guest_svn=9, version=5, debug=True))
    assert found.debug
    assert found.report_data == b"r" * 64
    tcb = amd.tcb.to_bytes()
    assert dict(found.measurements) == {
        "measurement": b"m" * 48,
        "host_data": b"h" * 32,
        "guest_policy": 0xB0000,
        "vmpl": 2,
        "guest_svn": 9,
        "family_id": bytes(16),
        "image_id": bytes(16),
        "id_key_digest": bytes(48),
        "author_key_digest": bytes(48),
        "report_id": found.measurements["report_id"],
        "report_id_ma": b"\xff" * 32,
        "report_version": 5,
        "current_tcb": tcb,
        "reported_tcb": tcb,
        "committed_tcb": tcb,
        "launch_tcb": tcb,
        "platform_info": 0x25,
    }
    assert (found.tcb_status, found.tcb_date, found.tcb_evaluation_number) == (None, None, None)
    assert found.advisories == ()
    mark = found.collateral["CRL of Cloister Simulated ARK-Genoa"]
    assert found.collateral_issued == mark.issued
    assert NOW - 3900 <= mark.issued <= NOW
    assert found.not_after == mark.issued + 30 * 86400
    assert found.anchors_digest == TrustAnchors.simulated(amd.root_der).digest
    assert found.measurement == encoding.digest(["cloister/v1/measurement", "snp", [b"m" * 48]])


@pytest.mark.parametrize("role", ["vek", "ask", "ark"])
@pytest.mark.parametrize("no_crl", [False, True])
def test_result_ends_with_each_certificate(amd, role, no_crl):
    ends = dict.fromkeys(("vek", "ask", "ark"), NOW + 99 * 86400) | {role: NOW + 86400}
    start = NOW - 86400
    ark = snp_pki.issue_authority("ARK-Genoa", None, not_before=start, not_after=ends["ark"])
    ask = snp_pki.issue_authority("SEV-Genoa", ark, not_before=start, not_after=ends["ask"], path_length=0)
    vek = endorser(amd, issuer=ask, not_after=ends["vek"])
    made = SimulatedAmd(ark, ask, vek)
    collateral = made.collateral(NOW, flaws=SnpFlaws(no_crl=no_crl))
    report = made.sign(SnpReport.from_bytes(bundle(amd).quote))  # the chip that the VEK names
    assert check(made, Evidence(tee="snp", quote=report, collateral=collateral)).not_after == NOW + 86400


def test_result_ends_with_the_list(amd):
    crl = snp_pki.revoke([], amd._ark, issued=NOW, next_update=NOW + 86400, number=1)
    assert check(amd, bundle(amd, crl=crl)).not_after == NOW + 86400


def test_production_refuses_every_simulated_report(makers):
    for amd in makers.values():
        for flaws in (FLAWLESS, SnpFlaws(vlek=True)):
            evidence = bundle(amd, flaws=flaws, vlek=flaws.vlek)
            with pytest.raises(EvidenceRefused) as caught:
                verify(evidence, anchors=TrustAnchors.vendor(), now=NOW)
            assert (caught.value.code, caught.value.claim) == ("evidence.simulated", "simulated")


# 1 report


@pytest.mark.parametrize("algorithm", [0, 2])
def test_signature_algorithm(amd, algorithm):
    evidence = bundle(amd, change={"signature_algorithm": algorithm})
    assert refused(amd, evidence) == ("evidence.snp-algorithm", "signature algorithm")


@pytest.mark.parametrize("signer", [2, 6, 7])
def test_key_that_is_neither_vcek_nor_vlek(amd, signer):
    evidence = bundle(amd, change={"key_info": signer << 2})
    assert refused(amd, evidence) == ("evidence.snp-signer", "key that signs the report")


def test_other_bits_of_key_info_do_not_matter(amd):
    """An author key, and a masked chip key."""
    assert check(amd, bundle(amd, change={"key_info": 0b11})).platform.signer == "VCEK"


# 2 root


def test_root_of_another_platform(amd, other):
    assert refused(other, bundle(amd)) == ("evidence.root", "root certificate")


def test_anchors_without_a_root_for_snp(amd):
    key = ec.generate_private_key(ec.SECP256R1())
    root = pki.issue(pki.ROOT_NAME, key.public_key(), issuer=None, issuer_key=key, path_length=1, **DATES)
    with pytest.raises(EvidenceRefused) as caught:
        verify(bundle(amd), anchors=TrustAnchors.simulated(root.public_bytes(Encoding.DER)), now=NOW)
    assert (caught.value.code, caught.value.claim) == ("evidence.root", "root certificate")


# 3 product


def test_unknown_processor(amd):
    for family, model in ((0x19, 0x20), (0x17, 0x31), (0x1A, 0x12)):
        evidence = bundle(amd, change={"cpuid_family": family, "cpuid_model": model})
        assert refused(amd, evidence) == ("evidence.snp-product", "processor")


def test_product_of_the_vcek(amd):
    evidence = bundle(amd, change={"cpuid_model": 0x01})  # Milan
    assert refused(amd, evidence) == ("evidence.snp-product", "product of the VCEK")


def test_product_of_the_root(makers):
    """A VCEK that says Milan under Genoa's root, and a report of version 2 that can't contradict it."""
    amd = makers["Genoa"]
    vcek = endorser(amd, extensions=snp_pki.vcek_extensions("Milan-B0", amd.tcb, amd.chip_id))
    evidence = with_chain(amd, vek=vcek, version=2)
    assert refused(amd, evidence) == ("evidence.snp-product", "root of the product")


@pytest.mark.parametrize("name", ["Bergamo-A1", "Siena"])
def test_products_with_genoas_keys(amd, name):
    vcek = endorser(amd, extensions=snp_pki.vcek_extensions(name, amd.tcb, amd.chip_id))
    assert check(amd, with_chain(amd, vek=vcek)).platform.product == "Genoa"


def endorser(amd: SimulatedAmd, *, issuer=None, key=None, extensions=None, name="SEV-VCEK", **dates):
    """A VCEK of ``amd``, like its own unless told otherwise."""
    if extensions is None:
        extensions = snp_pki.vcek_extensions("Genoa", amd.tcb, amd.chip_id)
    return snp_pki.issue_endorser(
        name,
        issuer or amd._ask,
        key=key or amd._vcek.key,
        extensions=extensions,
        **{**DATES, **dates},
    )


# 4 chain


def test_chain_of_another_length(amd):
    evidence = bundle(amd)
    pem = evidence.collateral.certificates
    end = b"-----END CERTIFICATE-----\n"
    shorter = replace(evidence.collateral, certificates=pem[pem.index(end) + len(end) :])
    assert refused(amd, replace(evidence, collateral=shorter)) == (
        "evidence.snp-chain",
        "certificates in the chain",
    )
    longer = replace(evidence.collateral, certificates=pem + pem)
    with pytest.raises(EvidenceError, match="certificate chain"):
        check(amd, replace(evidence, collateral=longer))


def test_vlek_under_the_rules_of_a_vcek(amd):
    """The name of the VEK doesn't matter, only who issued it."""
    evidence = bundle(amd, flaws=SnpFlaws(vlek=True))
    assert refused(amd, evidence) == ("evidence.snp-chain", "issuer of the VCEK")
    renamed = endorser(amd, issuer=amd._asvk)
    evidence = with_chain(amd, vek=renamed, ask=amd._asvk)
    assert refused(amd, evidence) == ("evidence.snp-chain", "issuer of the VCEK")


def test_vcek_under_the_rules_of_a_vlek(amd):
    evidence = bundle(amd, vlek=True)
    assert refused(amd, evidence) == ("evidence.snp-chain", "issuer of the VLEK")


def test_vcek_that_has_another_name(amd):
    assert check(amd, with_chain(amd, vek=endorser(amd, name="SEV-VLEK"))).platform.signer == "VCEK"


def test_vcek_of_another_ask(amd, other):
    evidence = with_chain(amd, vek=endorser(amd, issuer=other._ask))
    claim = "VCEK chain: issuer of Cloister Simulated SEV-VCEK"
    assert refused(amd, evidence) == ("evidence.snp-chain", claim)


def test_ask_of_another_root(amd, other):
    evidence = with_chain(amd, vek=endorser(amd, issuer=other._ask), ask=other._ask)
    claim = "VCEK chain: issuer of Cloister Simulated SEV-Genoa"
    assert refused(amd, evidence) == ("evidence.snp-chain", claim)


def test_ask_that_is_no_ca(amd):
    key = rsa.generate_private_key(65537, 2048)
    ask = endorser(amd, issuer=amd._ark, key=key, name="SEV-Genoa", extensions={})
    evidence = with_chain(amd, ask=ask, vek=endorser(amd, issuer=ask))
    assert refused(amd, evidence) == ("evidence.snp-chain", "VCEK chain: Cloister Simulated SEV-Genoa")


def test_ask_in_place_of_a_vcek(amd):
    """A CA can't sign reports, even one that says all that a VCEK says."""
    key = rsa.generate_private_key(65537, 2048)
    builder = snp_pki._builder("SEV-VCEK", key.public_key(), amd._ask, NOW - 1, NOW + 1)
    for arc, value in snp_pki.vcek_extensions("Genoa", amd.tcb, amd.chip_id).items():
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(ARC + arc), value)
        builder = builder.add_extension(extension, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    ca = pki.Identity(key=key, certificate=snp_pki._sign(builder, amd._ask.key))
    claim = "VCEK chain: Cloister Simulated SEV-VCEK"
    assert refused(amd, with_chain(amd, vek=ca)) == ("evidence.snp-chain", claim)


def test_expired_vcek(amd):
    claim = "validity of VCEK chain: Cloister Simulated SEV-VCEK"
    assert refused(amd, bundle(amd, flaws=SnpFlaws(expired=True))) == ("evidence.expired", claim)


def test_vcek_that_is_not_yet_valid(amd):
    claim = "validity of VCEK chain: Cloister Simulated SEV-VCEK"
    evidence = with_chain(amd, vek=endorser(amd, not_before=NOW + 1))
    assert refused(amd, evidence) == ("evidence.not-yet-valid", claim)


def test_before_the_certificates(amd):
    assert refused(amd, bundle(amd), now=NOW - 90000)[0] == "evidence.not-yet-valid"


# 5 revocation


@pytest.mark.parametrize(("flaw", "name"), [("ask_revoked", "SEV-Genoa"), ("ark_revoked", "ARK-Genoa")])
def test_revoked(amd, flaw, name):
    claim = f"revocation of Cloister Simulated {name}"
    assert refused(amd, bundle(amd, flaws=SnpFlaws(**{flaw: True}))) == ("evidence.revoked", claim)


def test_revoked_issuer_of_a_vlek(amd):
    evidence = bundle(amd, flaws=SnpFlaws(vlek=True, ask_revoked=True), vlek=True)
    claim = "revocation of Cloister Simulated SEV-VLEK-Genoa"
    assert refused(amd, evidence) == ("evidence.revoked", claim)


def test_without_a_revocation_list(amd):
    found = check(amd, bundle(amd, flaws=SnpFlaws(no_crl=True)))
    assert list(found.collateral.values()) == [CollateralMark(issued=0, number=0)]  # older than any list
    assert found.collateral_issued is None
    seen = CollateralMemory()
    seen.admit(check(amd, bundle(amd)).collateral)
    with pytest.raises(EvidenceRefused) as caught:  # who left a list out after we saw one
        seen.admit(found.collateral)
    assert caught.value.code == "evidence.collateral-older"
    assert [step.name for step in found.steps if step.outcome == "note"] == ["5 revocation"]
    assert found.not_after > NOW + 365 * 86400  # the certificates' own


def test_list_of_another_root(amd, other, makers):
    evidence = bundle(amd, crl=other.collateral(NOW).crl)
    assert refused(amd, evidence) == ("evidence.snp-crl", "signature of AMD's revocation list")
    evidence = bundle(amd, crl=makers["Milan"].collateral(NOW).crl)
    assert refused(amd, evidence) == ("evidence.snp-crl", "issuer of AMD's revocation list")


def test_dates_of_the_list(amd):
    claim = "validity of AMD's revocation list"
    assert refused(amd, bundle(amd, flaws=SnpFlaws(age=31 * 86400))) == ("evidence.expired", claim)
    assert refused(amd, bundle(amd, flaws=SnpFlaws(age=-86400))) == ("evidence.not-yet-valid", claim)


def test_list_that_does_not_parse(amd):
    with pytest.raises(EvidenceError) as caught:
        check(amd, bundle(amd, crl=b"no list"))
    assert caught.value.code == "evidence.certificate"


# 6 signature


def test_altered_report(amd):
    evidence = bundle(amd)
    report = replace(SnpReport.from_bytes(evidence.quote), measurement=b"x" * 48)
    altered = replace(evidence, quote=report.to_bytes())
    assert refused(amd, altered) == ("evidence.snp-signature", "signature of the report")


@pytest.mark.parametrize("signature", [bytes(96), b"\xff" * 96, bytes(95) + b"\1"])
def test_signature_out_of_range(amd, signature):
    evidence = bundle(amd)
    report = replace(SnpReport.from_bytes(evidence.quote), signature=signature)
    altered = replace(evidence, quote=report.to_bytes())
    assert refused(amd, altered) == ("evidence.snp-signature", "signature of the report")


def test_report_of_another_platform(amd, other):
    evidence = replace(bundle(other), collateral=amd.collateral(NOW))
    assert refused(amd, evidence) == ("evidence.snp-signature", "signature of the report")


def test_vcek_with_an_rsa_key(amd):
    evidence = with_chain(amd, vek=endorser(amd, key=rsa.generate_private_key(65537, 2048)))
    assert refused(amd, evidence) == ("evidence.snp-signature", "signature of the report")


# 7 TCB


@pytest.mark.parametrize(
    ("product", "part"), [(product, part) for product in PRODUCTS for part in platform_tcb(product).parts]
)
def test_tcb_of_the_vcek(makers, product, part):
    amd = makers[product]
    for step in (1, -1) if amd.tcb.parts[part] else (1,):
        tcb = replace(amd.tcb, **{part: amd.tcb.parts[part] + step})
        evidence = bundle(amd, flaws=SnpFlaws(tcb=tcb))
        assert refused(amd, evidence) == ("evidence.snp-tcb", "TCB that the VCEK was made for")


def test_tcb_of_the_vlek(amd):
    """Only REPORTED_TCB counts; it may lie below the current one."""
    lower = replace(amd.tcb, snp=22).to_bytes()
    flaws = SnpFlaws(vlek=True)
    evidence = bundle(amd, flaws=flaws, vlek=True, change={"reported_tcb": lower})
    assert refused(amd, evidence) == ("evidence.snp-tcb", "TCB that the VLEK was made for")
    higher = replace(amd.tcb, snp=24).to_bytes()
    evidence = bundle(amd, flaws=flaws, vlek=True, change={"current_tcb": higher})
    assert check(amd, evidence).platform.tcb["snp"] == 23


@pytest.mark.parametrize(("product", "offset"), [("Genoa", 2), ("Genoa", 5), ("Turin", 4), ("Turin", 6)])
def test_reserved_byte_of_the_tcb(makers, product, offset):
    amd = makers[product]
    tcb = bytearray(amd.tcb.to_bytes())
    tcb[offset] = 1
    with pytest.raises(EvidenceError) as caught:
        check(amd, bundle(amd, change={"reported_tcb": bytes(tcb)}))
    assert (caught.value.code, caught.value.claim) == ("evidence.format", "TCB version")


def test_turins_layout_differs(makers):
    """The same bytes mean other versions on Turin."""
    turin = makers["Turin"]
    genoa = SnpTcb(bootloader=1, tee=10, snp=0, microcode=200)
    assert turin.tcb.to_bytes()[:2] == genoa.to_bytes()[:2]
    with pytest.raises(EvidenceError):
        check(turin, bundle(turin, flaws=SnpFlaws(tcb=genoa)))


# 8 chip or cloud provider


@pytest.mark.parametrize("product", PRODUCTS)
def test_vcek_of_another_chip(makers, product):
    amd = makers[product]
    evidence = bundle(amd, flaws=SnpFlaws(chip_id=b"c" * (8 if product == "Turin" else 64)))
    assert refused(amd, evidence) == ("evidence.snp-chip", "chip that the VCEK was made for")


def test_turin_chip_with_more_than_8_bytes(makers):
    amd = makers["Turin"]
    evidence = bundle(amd, change={"chip_id": amd.chip_id[:8] + bytes(55) + b"\1"})
    assert refused(amd, evidence) == ("evidence.snp-chip", "chip that the VCEK was made for")


def test_masked_chip(amd):
    found = check(amd, bundle(amd, masked=True))
    assert found.platform.chip_id == bytes(64)
    assert [step.name for step in found.steps if step.outcome == "note"] == ["8 chip"]


def test_vcek_that_names_no_chip(amd):
    extensions = snp_pki.vcek_extensions("Genoa", amd.tcb, b"")
    for masked in (False, True):
        evidence = with_chain(amd, vek=endorser(amd, extensions=extensions), masked=masked)
        assert refused(amd, evidence) == ("evidence.snp-vek", "chip of the VCEK")


def test_vlek_that_names_no_provider(amd):
    vlek = endorser(amd, issuer=amd._asvk, key=amd._vlek.key)  # it names a chip, as a VCEK does
    evidence = with_chain(amd, vek=vlek, ask=amd._asvk, vlek=True)
    assert refused(amd, evidence) == ("evidence.snp-vek", "cloud provider of the VLEK")


@pytest.mark.parametrize("arc", ["2", "3.1", "3.2", "3.3", "3.8"])
def test_vcek_without_an_extension(amd, arc):
    extensions = snp_pki.vcek_extensions("Genoa", amd.tcb, amd.chip_id)
    del extensions[arc]
    with pytest.raises(EvidenceError) as caught:
        check(amd, with_chain(amd, vek=endorser(amd, extensions=extensions)))
    assert caught.value.code == "evidence.snp-vek"
    assert caught.value.claim == f"extension 1.3.6.1.4.1.3704.1.{arc}"
