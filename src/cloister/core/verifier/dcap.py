"""Verification of SGX quotes under DCAP, by the rules of Intel's QVL.

Steps, cited by number below:

1. The quote parses, carries a PEM chain, and comes from Intel's quoting enclave.
2. Each chain (PCK, PCK CRL issuer, TCB signing twice) ends in a root byte-equal to the pinned one.
3. PCK leaf, PCK CA, root: signatures, CA bits, dates, names.
4. The other chains likewise; the PCK CRL's issuer is the PCK's issuer.
5. The root CRL covers the CAs and the TCB signers, the PCK CRL covers the PCK; nothing is revoked.
6. TCB info: signature over its exact text, dates, id, version, FMSPC and PCEID of the PCK.
7. QE identity: signature over its exact text, dates, id, version.
8. The PCK signed the report of the quoting enclave, and the report binds the attestation key.
9. The quoting enclave's report matches the QE identity; its ISVSVN gives its status.
10. The attestation key signed header and body.
11. The first TCB level that the platform reaches gives its status; both statuses merge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.core.evidence.bundle import Collateral, Evidence
from cloister.core.evidence.dcap import CERTIFICATION_PEM_CHAIN, Quote, QuoteSignature, SgxReportBody
from cloister.core.evidence.pck import EXTENSION_OID, PckExtension
from cloister.core.verifier.anchors import TrustAnchors, announces_simulation
from cloister.core.verifier.chain import (
    Certificate,
    RevocationList,
    load_certificate,
    load_chain,
    load_crl,
    require_dates,
    require_not_revoked,
    require_signature,
    time_text,
    verify_chain,
    verify_crl,
)
from cloister.core.verifier.qe import QeIdentity, QeLevel
from cloister.core.verifier.result import CollateralMark, Platform, Step, VerifiedEvidence
from cloister.core.verifier.tcb import TcbInfo, TcbLevel, merge_status
from cloister.errors import EvidenceRefused

QE_VENDOR_INTEL: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chains:
    """The certificates and lists of one piece of evidence, root last; all roots are the pinned one."""

    pck: tuple[Certificate, ...]
    crl: tuple[Certificate, ...]
    tcb: tuple[Certificate, ...]
    qe: tuple[Certificate, ...]
    root_crl: RevocationList
    pck_crl: RevocationList

    @property
    def root(self) -> Certificate:
        return self.pck[-1]


def verify(evidence: Evidence, *, anchors: TrustAnchors, now: int) -> VerifiedEvidence:
    """Verify an SGX quote and its collateral.

    Args:
        evidence: The quote with stapled collateral.
        anchors: What to believe; decides whether the result is simulated.
        now: Unix seconds.

    Raises:
        EvidenceError: something does not parse.
        EvidenceRefused: a check failed; ``code``, ``claim``, ``expected`` and ``actual`` say which.
    """
    steps: list[Step] = []
    quote = Quote.from_bytes(evidence.quote)
    _require_quote(quote, steps)
    chains = _load_chains(quote.signature, evidence.collateral)
    _require_roots(chains, anchors, steps)
    platform = _verify_pck(chains, now, steps)
    _verify_collateral_chains(chains, now, steps)
    _verify_revocation(chains, now, steps)
    tcb_info = _verify_tcb_info(evidence.collateral, chains.tcb[0], platform, now, steps)
    identity = _verify_qe_identity(evidence.collateral, chains.qe[0], now, steps)
    _verify_qe_report(quote.signature, chains.pck[0], steps)
    qe_level = identity.appraise(quote.signature.qe_report)
    steps.append(_ok("9 quoting enclave", f"ISVSVN {quote.signature.qe_report.isv_svn}, {qe_level.status}"))
    _verify_quote_signature(quote, steps)
    level = tcb_info.select(platform)
    status = merge_status(level.status, qe_level.status)
    steps.append(_ok("11 TCB level", f"platform {level.status}, quoting enclave {qe_level.status}: {status}"))
    return _result(
        quote=quote,
        anchors=anchors,
        chains=chains,
        platform=platform,
        tcb_info=tcb_info,
        identity=identity,
        level=level,
        qe_level=qe_level,
        status=status,
        steps=steps,
    )


def _require_quote(quote: Quote, steps: list[Step]) -> None:
    """Step 1."""
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
    steps.append(_ok("1 quote", f"SGX version {quote.header.version}, {len(quote.to_bytes())} B"))


def _load_chains(signature: QuoteSignature, collateral: Collateral) -> _Chains:
    chains = _Chains(
        pck=load_chain(signature.certification_data),
        crl=load_chain(collateral.pck_crl_issuer_chain),
        tcb=load_chain(collateral.tcb_info_issuer_chain),
        qe=load_chain(collateral.qe_identity_issuer_chain),
        root_crl=load_crl(collateral.root_ca_crl),
        pck_crl=load_crl(collateral.pck_crl),
    )
    for code, chain, size in (
        ("evidence.pck-chain", chains.pck, 3),
        ("evidence.crl-chain", chains.crl, 2),
        ("evidence.tcb-chain", chains.tcb, 2),
        ("evidence.qe-chain", chains.qe, 2),
    ):
        if len(chain) != size:
            raise EvidenceRefused(
                code=code, claim="certificates in the chain", expected=size, actual=len(chain)
            )
    return chains


def _require_roots(chains: _Chains, anchors: TrustAnchors, steps: list[Step]) -> None:
    """Step 2."""
    pinned = load_certificate(anchors.dcap_root)
    for chain in (chains.pck, chains.crl, chains.tcb, chains.qe):
        root = chain[-1]
        if root.der == pinned.der:
            continue
        if announces_simulation(root) and not anchors.is_simulated:
            raise EvidenceRefused(
                "the evidence comes from a simulated platform",
                code="evidence.simulated",
                claim="simulated",
                expected=False,
                actual=True,
            )
        raise EvidenceRefused(
            code="evidence.root",
            claim="root certificate",
            expected=f"{pinned.common_name} sha256:{pinned.fingerprint.hex()}",
            actual=f"{root.common_name} sha256:{root.fingerprint.hex()}",
        )
    steps.append(_ok("2 root certificate", f"{pinned.common_name} sha256:{pinned.fingerprint.hex()}"))


def _verify_pck(chains: _Chains, now: int, steps: list[Step]) -> PckExtension:
    """Step 3."""
    leaf, issuer, _root = chains.pck
    _require_name(leaf, "SGX PCK Certificate", "evidence.pck-chain")
    _require_name(issuer, "SGX PCK", "evidence.pck-chain")
    verify_chain(chains.pck, now=now, code="evidence.pck-chain", what="PCK chain")
    platform = _extension(leaf)
    steps.append(
        _ok("3 PCK chain", f"{leaf.common_name} < {issuer.common_name}, FMSPC {platform.fmspc.hex()}")
    )
    return platform


def _extension(leaf: Certificate) -> PckExtension:
    for extension in leaf.parsed.extensions:
        if extension.oid.dotted_string == EXTENSION_OID:
            return PckExtension.from_bytes(extension.value.public_bytes())
    raise EvidenceRefused(
        code="evidence.pck-chain", claim="SGX extension of the PCK", expected=EXTENSION_OID, actual="absent"
    )


def _verify_collateral_chains(chains: _Chains, now: int, steps: list[Step]) -> None:
    """Step 4."""
    _require_name(chains.tcb[0], "SGX TCB Signing", "evidence.tcb-chain")
    _require_name(chains.qe[0], "SGX TCB Signing", "evidence.qe-chain")
    verify_chain(chains.crl, now=now, code="evidence.crl-chain", what="PCK CRL issuer chain", leaf_is_ca=True)
    verify_chain(chains.tcb, now=now, code="evidence.tcb-chain", what="TCB signing chain")
    if chains.qe != chains.tcb:
        verify_chain(chains.qe, now=now, code="evidence.qe-chain", what="QE identity signing chain")
    if chains.crl[0].der != chains.pck[1].der:
        raise EvidenceRefused(
            code="evidence.crl-chain",
            claim="issuer of the PCK CRL",
            expected=f"{chains.pck[1].common_name} sha256:{chains.pck[1].fingerprint.hex()}",
            actual=f"{chains.crl[0].common_name} sha256:{chains.crl[0].fingerprint.hex()}",
        )
    steps.append(_ok("4 collateral chains", f"{chains.crl[0].common_name}; {chains.tcb[0].common_name}"))


def _verify_revocation(chains: _Chains, now: int, steps: list[Step]) -> None:
    """Step 5."""
    leaf, issuer, root = chains.pck
    verify_crl(chains.root_crl, root, now=now, code="evidence.root-crl", what="root CRL")
    verify_crl(chains.pck_crl, issuer, now=now, code="evidence.pck-crl", what="PCK CRL")
    for certificate in (issuer, chains.tcb[0], chains.qe[0]):
        require_not_revoked(certificate, chains.root_crl)
    require_not_revoked(leaf, chains.pck_crl)
    steps.append(
        _ok(
            "5 revocation",
            f"root CRL {time_text(chains.root_crl.issued)}, PCK CRL {time_text(chains.pck_crl.issued)}",
        )
    )


def _verify_tcb_info(
    collateral: Collateral, signer: Certificate, platform: PckExtension, now: int, steps: list[Step]
) -> TcbInfo:
    """Step 6."""
    code = "evidence.tcb-info"
    require_signature(
        signer.key,
        collateral.tcb_info_signature,
        collateral.tcb_info,
        code=code,
        what="TCB info",
        by=signer.common_name,
    )
    info = TcbInfo.from_bytes(collateral.tcb_info)
    require_dates("TCB info", info.issued, info.next_update, now=now)
    _require(code, "TCB info id", "SGX", info.id)
    _require(code, "TCB info version", 3, info.version)
    _require(code, "FMSPC", platform.fmspc.hex(), info.fmspc.hex())
    _require(code, "PCEID", platform.pce_id.hex(), info.pce_id.hex())
    steps.append(
        _ok(
            "6 TCB info",
            f"of {time_text(info.issued)}, evaluation {info.evaluation_number}, {info.fmspc.hex()}",
        )
    )
    return info


def _verify_qe_identity(
    collateral: Collateral, signer: Certificate, now: int, steps: list[Step]
) -> QeIdentity:
    """Step 7."""
    code = "evidence.qe-identity"
    require_signature(
        signer.key,
        collateral.qe_identity_signature,
        collateral.qe_identity,
        code=code,
        what="QE identity",
        by=signer.common_name,
    )
    identity = QeIdentity.from_bytes(collateral.qe_identity)
    require_dates("QE identity", identity.issued, identity.next_update, now=now)
    _require(code, "QE identity id", "QE", identity.id)
    _require(code, "QE identity version", 2, identity.version)
    steps.append(_ok("7 QE identity", f"{time_text(identity.issued)}, number {identity.evaluation_number}"))
    return identity


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
    _require(
        "evidence.attestation-key",
        "attestation key in the quoting enclave's report",
        bound.hex(),
        signature.qe_report.report_data.hex(),
    )
    steps.append(_ok("8 attestation key", "bound by the quoting enclave's report, which the PCK signed"))


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
    steps.append(_ok("10 quote signature", "header and body are signed by the attestation key"))


def _result(
    *,
    quote: Quote,
    anchors: TrustAnchors,
    chains: _Chains,
    platform: PckExtension,
    tcb_info: TcbInfo,
    identity: QeIdentity,
    level: TcbLevel,
    qe_level: QeLevel,
    status: str,
    steps: Sequence[Step],
) -> VerifiedEvidence:
    certificates = {*chains.pck, *chains.crl, *chains.tcb, *chains.qe}
    expiries = [certificate.not_after for certificate in certificates]
    expiries += [
        chains.root_crl.next_update,
        chains.pck_crl.next_update,
        tcb_info.next_update,
        identity.next_update,
    ]
    return VerifiedEvidence(
        tee="sgx",
        anchors_digest=anchors.digest,
        simulated=anchors.is_simulated,
        debug=quote.body.debug,
        tcb_status=status,
        tcb_date=min(level.date, qe_level.date),
        advisories=tuple(sorted({*level.advisories, *qe_level.advisories})),
        tcb_evaluation_number=min(tcb_info.evaluation_number, identity.evaluation_number),
        measurements=MappingProxyType(_measurements(quote.body)),
        report_data=quote.body.report_data,
        platform=Platform(
            fmspc=platform.fmspc,
            pce_id=platform.pce_id,
            ppid=platform.ppid,
            platform_instance_id=platform.platform_instance_id,
            tcb_components=platform.tcb_components,
            pce_svn=platform.pce_svn,
            sgx_type=platform.sgx_type,
        ),
        collateral=MappingProxyType(_marks(chains, tcb_info, identity)),
        collateral_issued=min(tcb_info.issued, identity.issued, chains.pck_crl.issued),
        not_after=min(expiries),
        steps=tuple(steps),
    )


def _measurements(body: SgxReportBody) -> dict[str, bytes | int]:
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


def _marks(chains: _Chains, tcb_info: TcbInfo, identity: QeIdentity) -> dict[str, CollateralMark]:
    """Names tell apart what may lawfully differ in age: another PCK CA or another platform family."""
    issuer = chains.pck[1].fingerprint.hex()[:16]
    family = f"{tcb_info.fmspc.hex()}-{tcb_info.pce_id.hex()}"
    return {
        "root CRL": CollateralMark(issued=chains.root_crl.issued, number=chains.root_crl.number),
        f"PCK CRL {issuer}": CollateralMark(issued=chains.pck_crl.issued, number=chains.pck_crl.number),
        f"TCB info {family}": CollateralMark(issued=tcb_info.issued, number=tcb_info.evaluation_number),
        "QE identity": CollateralMark(issued=identity.issued, number=identity.evaluation_number),
    }


def _require_name(certificate: Certificate, part: str, code: str) -> None:
    if part not in certificate.common_name:
        raise EvidenceRefused(
            code=code, claim="certificate name", expected=f"one with {part!r}", actual=certificate.common_name
        )


def _require(code: str, claim: str, expected: object, actual: object) -> None:
    if expected != actual:
        raise EvidenceRefused(code=code, claim=claim, expected=expected, actual=actual)


def _ok(name: str, detail: str) -> Step:
    return Step(name=name, outcome="ok", detail=detail)
