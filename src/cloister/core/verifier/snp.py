"""Verification of AMD SEV-SNP attestation reports.

Steps, cited by number below:

1. The report parses, announces ECDSA on P-384, and says whether a VCEK or a VLEK signs it (in KEY_INFO).
2. The ARK is byte-equal to a pinned one.
3. VEK and ARK belong to the report's product, by CPUID; in version 2, which has none, to that of the VEK.
4. VEK, ASK (ASVK for a VLEK, whatever the VEK is called), ARK: signatures, CA bits, dates, the ASK's name.
5. The ARK's revocation list, where the sender has one: signature, dates, neither ASK nor ARK is on it.
6. The VEK signed the report.
7. The VEK was made for the report's REPORTED_TCB.
8. A VCEK was made for the report's CHIP_ID, unless the platform masks it; a VLEK names its cloud provider.

What the owner has to decide is left to appraisal: guest policy, privilege level, lowest TCB, measurement.
Sources: AMD 56860 (the report) and 57230 (chain and extensions of the VCEK).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, cast

from cloister.core.evidence.bundle import AmdCollateral, Evidence
from cloister.core.evidence.snp import ALGORITHM_ECDSA_P384, PRODUCTS, VCEK, VLEK, SnpReport, SnpTcb
from cloister.core.evidence.vek import ARC, VekExtensions
from cloister.core.times import time_text
from cloister.core.verifier.anchors import TrustAnchors, described
from cloister.core.verifier.certificates import AMD, Certificate, RevocationList, load_chain, load_crl
from cloister.core.verifier.chain import require_not_revoked, require_signature, verify_chain, verify_crl
from cloister.core.verifier.collateral import passed, require_equal
from cloister.core.verifier.result import CollateralMark, SnpPlatform, Step, VerifiedEvidence
from cloister.errors import EvidenceRefused

_MASKED: Final = bytes(64)  # in place of a chip's identifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The certificates of one report."""

    vek: Certificate
    ask: Certificate
    ark: Certificate

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        """Leaf first."""
        return self.vek, self.ask, self.ark


def verify(
    evidence: Evidence, *, anchors: TrustAnchors, now: int, steps: list[Step] | None = None
) -> VerifiedEvidence:
    """Verify an SNP report and its collateral.

    Args:
        evidence: The report with stapled collateral.
        anchors: What to believe; decides whether the result is simulated.
        now: Unix seconds.
        steps: Gets every check as it is passed, so that a refusal shows how far it came.

    Raises:
        EvidenceError: something does not parse.
        EvidenceRefused: a check failed; ``code``, ``claim``, ``expected`` and ``actual`` say which.
    """
    steps = [] if steps is None else steps
    report = SnpReport.from_bytes(evidence.quote)
    _require_report(report, steps)
    collateral = cast(AmdCollateral, evidence.collateral)  # a report comes with no other
    chain = _load_chain(collateral)
    anchors.require_root("snp", chain.ark)  # a simulated one is named as such
    steps.append(passed("2 root certificate", described(chain.ark)))
    vek = read_extensions(chain.vek)
    product = _require_product(report, chain, vek, steps)
    _verify_chain(chain, report.signer, product, now, steps)
    crl = _verify_revocation(collateral, chain, now, steps)
    _verify_signature(report, chain.vek, steps)
    _verify_tcb(report, product, vek, steps)
    _verify_place(report, vek, steps)
    platform = SnpPlatform(
        product=product,
        signer=report.signer,
        chip_id=report.chip_id,
        csp_id=vek.csp_id if report.signer == VLEK else "",
        tcb=vek.tcb.parts,
        platform_info=report.platform_info,
    )
    return _result(report=report, anchors=anchors, chain=chain, crl=crl, platform=platform, steps=steps)


def _require_report(report: SnpReport, steps: list[Step]) -> None:
    """Step 1."""
    require_equal(
        "evidence.snp-algorithm", "signature algorithm", ALGORITHM_ECDSA_P384, report.signature_algorithm
    )
    if not report.signer:
        raise EvidenceRefused(
            code="evidence.snp-signer",
            claim="key that signs the report",
            expected=f"{VCEK} or {VLEK}",
            actual=f"KEY_INFO {report.key_info:#x}",
        )
    steps.append(passed("1 report", f"SNP version {report.version}, to be signed by a {report.signer}"))


def _load_chain(collateral: AmdCollateral) -> Chain:
    certificates = load_chain(collateral.certificates, AMD)
    if len(certificates) != 3:
        raise EvidenceRefused(
            code="evidence.snp-chain",
            claim="certificates in the chain",
            expected=3,
            actual=len(certificates),
        )
    vek, ask, ark = certificates
    return Chain(vek=vek, ask=ask, ark=ark)


def _require_product(report: SnpReport, chain: Chain, vek: VekExtensions, steps: list[Step]) -> str:
    """Step 3; the product."""
    by_cpu = report.version > 2
    product = report.product if by_cpu else vek.product
    if not product:
        raise EvidenceRefused(
            code="evidence.snp-product",
            claim="processor",
            expected=", ".join(PRODUCTS),
            actual=f"CPUID family {report.cpuid_family:#x}, model {report.cpuid_model:#x}",
        )
    code = "evidence.snp-product"
    require_equal(code, f"product of the {report.signer}", product, vek.product)
    require_equal(code, "root of the product", f"ARK-{product}", _key_name(chain.ark))
    steps.append(passed("3 product", f"{product}, by {'CPUID' if by_cpu else report.signer}"))
    return product


def _verify_chain(chain: Chain, signer: str, product: str, now: int, steps: list[Step]) -> None:
    """Step 4."""
    # A VEK's own name is no evidence of its kind; who issued it is.
    issuer = f"SEV-VLEK-{product}" if signer == VLEK else f"SEV-{product}"
    require_equal("evidence.snp-chain", f"issuer of the {signer}", issuer, _key_name(chain.ask))
    verify_chain(
        chain.certificates,
        now=now,
        code="evidence.snp-chain",
        what=f"{signer} chain",
        leaf_states_usage=False,
    )
    steps.append(passed(f"4 {signer} chain", f"{chain.vek.common_name} < {chain.ask.common_name}"))


def _verify_revocation(
    collateral: AmdCollateral, chain: Chain, now: int, steps: list[Step]
) -> RevocationList | None:
    """Step 5; None where the sender has no list."""
    if not collateral.crl:
        detail = f"not checked: the sender has no revocation list of {chain.ark.common_name}"
        steps.append(Step(name="5 revocation", outcome="note", detail=detail))
        return None
    crl = load_crl(collateral.crl, AMD)
    verify_crl(crl, chain.ark, now=now, code="evidence.snp-crl", what="AMD's revocation list")
    for certificate in (chain.ask, chain.ark):
        require_not_revoked(certificate, crl)
    steps.append(passed("5 revocation", f"list of {time_text(crl.issued)}, number {crl.number}"))
    return crl


def _verify_signature(report: SnpReport, vek: Certificate, steps: list[Step]) -> None:
    """Step 6."""
    require_signature(
        vek.key,
        report.signature,
        report.signed_bytes,
        code="evidence.snp-signature",
        what="the report",
        by=f"the {report.signer}",
    )
    steps.append(passed("6 report signature", f"the report is signed by the {report.signer}"))


def _verify_tcb(report: SnpReport, product: str, vek: VekExtensions, steps: list[Step]) -> None:
    """Step 7."""
    reported = SnpTcb.from_bytes(report.reported_tcb, product)
    claim = f"TCB that the {report.signer} was made for"
    require_equal("evidence.snp-tcb", claim, _parts_text(reported), _parts_text(vek.tcb))
    steps.append(passed("7 TCB", _parts_text(reported)))


def _verify_place(report: SnpReport, vek: VekExtensions, steps: list[Step]) -> None:
    """Step 8."""
    if report.signer == VLEK:
        _require_stated("cloud provider of the VLEK", vek.csp_id)
        steps.append(passed("8 cloud provider", vek.csp_id))
        return
    _require_stated("chip of the VCEK", vek.chip_id)
    if report.chip_id == _MASKED:
        steps.append(Step(name="8 chip", outcome="note", detail="not compared: the report masks it"))
        return
    chip_id = vek.chip_id.ljust(len(_MASKED), b"\0")
    claim = "chip that the VCEK was made for"
    require_equal("evidence.snp-chip", claim, report.chip_id.hex(), chip_id.hex())
    steps.append(passed("8 chip", vek.chip_id.hex()))


def _require_stated(claim: str, value: str | bytes) -> None:
    if not value:
        raise EvidenceRefused(code="evidence.snp-vek", claim=claim, expected="stated", actual="absent")


def _key_name(certificate: Certificate) -> str:
    """What AMD calls a key; a simulated one has words before it."""
    return certificate.common_name.rpartition(" ")[2]


def _parts_text(tcb: SnpTcb) -> str:
    return ", ".join(f"{name} {number}" for name, number in tcb.parts.items())


def read_extensions(vek: Certificate) -> VekExtensions:
    """What a VCEK or VLEK says of its processor; raises EvidenceError."""
    return VekExtensions.from_values(
        {
            extension.oid.dotted_string.removeprefix(ARC): extension.value.public_bytes()
            for extension in vek.parsed.extensions
            if extension.oid.dotted_string.startswith(ARC)
        }
    )


def _result(
    *,
    report: SnpReport,
    anchors: TrustAnchors,
    chain: Chain,
    crl: RevocationList | None,
    platform: SnpPlatform,
    steps: Sequence[Step],
) -> VerifiedEvidence:
    expiries = [certificate.not_after for certificate in chain.certificates]
    mark = CollateralMark(issued=0, number=0)  # no list is older than any
    if crl is not None:
        expiries.append(crl.next_update)
        mark = CollateralMark(issued=crl.issued, number=crl.number)
    marks = {f"CRL of {chain.ark.common_name}": mark}
    return VerifiedEvidence(
        tee="snp",
        anchors_digest=anchors.digest,
        simulated=anchors.is_simulated,
        debug=report.debug,
        tcb_status=None,
        tcb_date=None,
        advisories=(),
        tcb_evaluation_number=None,
        measurements=MappingProxyType(_measurements(report)),
        report_data=report.report_data,
        platform=platform,
        collateral=MappingProxyType(marks),
        collateral_issued=None if crl is None else crl.issued,
        not_after=min(expiries),
        steps=tuple(steps),
    )


def _measurements(report: SnpReport) -> dict[str, bytes | int]:
    return {
        "measurement": report.measurement,
        "host_data": report.host_data,
        "guest_policy": report.policy,
        "vmpl": report.vmpl,
        "guest_svn": report.guest_svn,
        "family_id": report.family_id,
        "image_id": report.image_id,
        "id_key_digest": report.id_key_digest,
        "author_key_digest": report.author_key_digest,
        "report_id": report.report_id,
        "report_id_ma": report.report_id_ma,
        "report_version": report.version,
        "current_tcb": report.current_tcb,
        "reported_tcb": report.reported_tcb,
        "committed_tcb": report.committed_tcb,
        "launch_tcb": report.launch_tcb,
        "platform_info": report.platform_info,
    }
