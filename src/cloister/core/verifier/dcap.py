"""Verification of SGX and TDX quotes under DCAP, by the rules of Intel's QVL.

Steps, cited by number below:

1. The quote parses, is of the TEE that the evidence names, carries a PEM chain, and comes from Intel's
   quoting enclave.
2. Each chain (PCK, PCK CRL issuer, TCB signing twice) ends in a root byte-equal to the pinned one.
3. PCK leaf, PCK CA, root: signatures, CA bits, dates, names.
4. The PCK CRL's issuer is the PCK's issuer; the other chains likewise.
5. The root CRL covers the CAs and the TCB signers, the PCK CRL covers the PCK; nothing is revoked.
6. TCB info: signature over its exact text, dates, id of the TEE, version, FMSPC and PCEID of the PCK.
7. QE identity: signature over its exact text, dates, id of the TEE, version.
8. The PCK signed the report of the quoting enclave, and the report binds the attestation key.
9. The quoting enclave's report matches the QE identity; its ISVSVN gives its status.
10. The attestation key signed header and body.
11. TDX: signer and attributes of the TDX module that launched the TD are those that TCB info lists for its
    major version.
12. The first TCB level that the platform reaches gives its status (TDX: that it reaches with the TD's
    TEE_TCB_SVN, whose first two bytes, from TDX 1.5 on, give the module's own level instead); the statuses of
    platform, module and quoting enclave merge. Nothing is revoked.
13. TDX 1.5: the same with TEE_TCB_SVN2, the module that runs now; where the TD was launched out of date and
    is not any more, its relaunch is advised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import MappingProxyType
from typing import Final, cast

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.core.evidence.bundle import Collateral, Evidence
from cloister.core.evidence.dcap import (
    CERTIFICATION_PEM_CHAIN,
    TEES,
    Body,
    Quote,
    QuoteSignature,
)
from cloister.core.evidence.pck import PckExtension
from cloister.core.evidence.sgx import SgxReportBody
from cloister.core.evidence.tdx import TdReport
from cloister.core.verifier.anchors import TrustAnchors
from cloister.core.verifier.certificates import Certificate
from cloister.core.verifier.chain import require_signature
from cloister.core.verifier.collateral import (
    Chains,
    collateral_marks,
    load_chains,
    passed,
    require_equal,
    require_roots,
    verify_collateral_chains,
    verify_pck,
    verify_qe_identity,
    verify_revocation,
    verify_tcb_info,
)
from cloister.core.verifier.qe import QeIdentity
from cloister.core.verifier.result import DcapPlatform, Step, VerifiedEvidence
from cloister.core.verifier.tcb import IsvLevel, TcbInfo, TcbLevel, merge_status, require_good
from cloister.core.verifier.tdx import appraise_td
from cloister.errors import EvidenceRefused

QE_VENDOR_INTEL: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")

# Ids of TCB info and QE identity by TEE.
DOCUMENTS: Final = MappingProxyType({"sgx": ("SGX", "QE"), "tdx": ("TDX", "TD_QE")})


def verify(
    evidence: Evidence, *, anchors: TrustAnchors, now: int, steps: list[Step] | None = None
) -> VerifiedEvidence:
    """Verify an SGX or TDX quote and its collateral.

    Args:
        evidence: The quote with stapled collateral.
        anchors: What to believe; decides whether the result is simulated.
        now: Unix seconds.
        steps: Gets every check as it is passed, so that a refusal shows how far it came.

    Raises:
        EvidenceError: something does not parse.
        EvidenceRefused: a check failed; ``code``, ``claim``, ``expected`` and ``actual`` say which.
    """
    steps = [] if steps is None else steps
    quote = Quote.from_bytes(evidence.quote)
    _require_quote(quote, evidence, steps)
    collateral = cast(Collateral, evidence.collateral)  # a quote comes with no other
    chains = load_chains(quote.signature, collateral)
    require_roots(chains, anchors, steps)
    platform = verify_pck(chains, now, steps)
    verify_collateral_chains(chains, now, steps)
    verify_revocation(chains, now, steps)
    info_id, identity_id = DOCUMENTS[evidence.tee]
    tcb_info = verify_tcb_info(collateral, chains.tcb[0], platform, now, steps, name=info_id)
    identity = verify_qe_identity(collateral, chains.qe[0], now, steps, name=identity_id)
    _verify_qe_report(quote.signature, chains.pck[0], steps)
    qe = identity.appraise(quote.signature.qe_report)
    steps.append(passed("9 quoting enclave", f"ISVSVN {quote.signature.qe_report.isv_svn}, {qe.status}"))
    _verify_quote_signature(quote, steps)
    if isinstance(quote.body, TdReport):
        status, levels = appraise_td(quote.body, platform, tcb_info, qe, steps)
    else:
        status, levels = _appraise_enclave(platform, tcb_info, qe, steps)
    return _result(
        evidence=evidence,
        quote=quote,
        anchors=anchors,
        chains=chains,
        platform=platform,
        tcb_info=tcb_info,
        identity=identity,
        status=status,
        levels=levels,
        steps=steps,
    )


def _require_quote(quote: Quote, evidence: Evidence, steps: list[Step]) -> None:
    """Step 1."""
    require_equal("evidence.tee", "TEE of the quote", evidence.tee, TEES[quote.header.tee_type])
    if quote.header.qe_vendor_id != QE_VENDOR_INTEL:
        raise EvidenceRefused(
            code="evidence.qe-vendor",
            claim="vendor of the quoting enclave",
            expected=QE_VENDOR_INTEL.hex(),
            actual=quote.header.qe_vendor_id.hex(),
        )
    if quote.signature.certification_type != CERTIFICATION_PEM_CHAIN:
        raise EvidenceRefused(
            code="evidence.certification-type",
            claim="certification data type",
            expected=CERTIFICATION_PEM_CHAIN,
            actual=quote.signature.certification_type,
        )
    steps.append(
        passed("1 quote", f"{evidence.tee.upper()} version {quote.header.version}, {len(evidence.quote)} B")
    )
    if any(quote.padding):
        detail = f"{len(quote.padding)} B behind the quote, which nobody signed"
        steps.append(Step(name="1 padding", outcome="note", detail=detail))


def _verify_qe_report(signature: QuoteSignature, pck: Certificate, steps: list[Step]) -> None:
    """Step 8."""
    require_signature(
        pck.key,
        signature.qe_report_signature,
        signature.qe_report.to_bytes(),
        code="evidence.qe-report",
        what="the quoting enclave's report",
        by=pck.common_name,
    )
    bound = hashlib.sha256(signature.attestation_key + signature.qe_auth_data).digest() + bytes(32)
    require_equal(
        "evidence.attestation-key",
        "attestation key in the quoting enclave's report",
        bound.hex(),
        signature.qe_report.report_data.hex(),
    )
    steps.append(passed("8 attestation key", "bound by the quoting enclave's report, which the PCK signed"))


def _verify_quote_signature(quote: Quote, steps: list[Step]) -> None:
    """Step 10."""
    point = quote.signature.attestation_key
    try:
        key = ec.EllipticCurvePublicNumbers(
            int.from_bytes(point[:32], "big"), int.from_bytes(point[32:], "big"), ec.SECP256R1()
        ).public_key()
    except ValueError as error:
        raise EvidenceRefused(
            code="evidence.attestation-key",
            claim="attestation key",
            expected="a point on P-256",
            actual="none",
        ) from error
    require_signature(
        key,
        quote.signature.signature,
        quote.signed_bytes,
        code="evidence.quote-signature",
        what="the quote",
        by="the attestation key",
    )
    steps.append(passed("10 quote signature", "header and body are signed by the attestation key"))


def _appraise_enclave(
    platform: PckExtension, tcb_info: TcbInfo, qe: IsvLevel, steps: list[Step]
) -> tuple[str, tuple[TcbLevel | IsvLevel, ...]]:
    """Step 12 for SGX."""
    level = tcb_info.select(platform)
    require_good("platform", level.status)
    require_good("quoting enclave", qe.status)
    status = merge_status(level.status, qe.status)
    steps.append(passed("12 TCB level", f"platform {level.status}, quoting enclave {qe.status}: {status}"))
    return status, (level, qe)


def _result(
    *,
    evidence: Evidence,
    quote: Quote,
    anchors: TrustAnchors,
    chains: Chains,
    platform: PckExtension,
    tcb_info: TcbInfo,
    identity: QeIdentity,
    status: str,
    levels: Sequence[TcbLevel | IsvLevel],
    steps: Sequence[Step],
) -> VerifiedEvidence:
    certificates = {*chains.pck, *chains.tcb, *chains.qe}  # the CRL's issuers are the PCK's
    expiries = [certificate.not_after for certificate in certificates]
    expiries += [
        chains.root_crl.next_update,
        chains.pck_crl.next_update,
        tcb_info.next_update,
        identity.next_update,
    ]
    return VerifiedEvidence(
        tee=evidence.tee,
        anchors_digest=anchors.digest,
        simulated=anchors.is_simulated,
        debug=quote.body.debug,
        tcb_status=status,
        tcb_date=min(level.date for level in levels),
        advisories=tuple(sorted({name for level in levels for name in level.advisories})),
        tcb_evaluation_number=min(tcb_info.evaluation_number, identity.evaluation_number),
        measurements=MappingProxyType(_measurements(quote.body)),
        report_data=quote.body.report_data,
        platform=DcapPlatform(
            fmspc=platform.fmspc,
            pce_id=platform.pce_id,
            ppid=platform.ppid,
            platform_instance_id=platform.platform_instance_id,
            tcb_components=platform.tcb_components,
            pce_svn=platform.pce_svn,
            sgx_type=platform.sgx_type,
        ),
        collateral=MappingProxyType(collateral_marks(chains, tcb_info, identity)),
        collateral_issued=min(tcb_info.issued, identity.issued, chains.pck_crl.issued),
        not_after=min(expiries),
        steps=tuple(steps),
    )


def _measurements(body: Body) -> dict[str, bytes | int]:
    if isinstance(body, TdReport):
        return {name: getattr(body, name) for name, _size in body.FIELDS if name != "report_data"}
    return _measurements_of_enclave(body)


def _measurements_of_enclave(body: SgxReportBody) -> dict[str, bytes | int]:
    return {
        "mr_enclave": body.mr_enclave,
        "mr_signer": body.mr_signer,
        "attributes": body.attributes,
        "misc_select": body.misc_select,
        "isv_prod_id": body.isv_prod_id,
        "isv_svn": body.isv_svn,
        "isv_ext_prod_id": body.isv_ext_prod_id,
        "isv_family_id": body.isv_family_id,
        "config_id": body.config_id,
        "config_svn": body.config_svn,
    }
