"""Steps 2 to 7 of DCAP verification: chains, revocation lists, TCB info, QE identity.

The steps are numbered in `cloister.core.verifier.dcap`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloister.core.evidence.bundle import Collateral
from cloister.core.evidence.dcap import QuoteSignature
from cloister.core.evidence.pck import EXTENSION_OID, PckExtension
from cloister.core.times import time_text
from cloister.core.verifier.anchors import TrustAnchors, described
from cloister.core.verifier.certificates import Certificate, RevocationList, load_chain, load_crl
from cloister.core.verifier.chain import (
    require_dates,
    require_not_revoked,
    require_signed_by,
    verify_chain,
    verify_crl,
)
from cloister.core.verifier.collateral_key import pck_extension
from cloister.core.verifier.qe import QeIdentity
from cloister.core.verifier.result import CollateralMark, Step
from cloister.core.verifier.tcb import TcbInfo
from cloister.errors import EvidenceRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """The certificates and lists of one piece of evidence, root last; all roots are the pinned one."""

    pck: tuple[Certificate, ...]
    crl: tuple[Certificate, ...]
    tcb: tuple[Certificate, ...]
    qe: tuple[Certificate, ...]
    root_crl: RevocationList
    pck_crl: RevocationList

    @property
    def root(self) -> Certificate:
        """The pinned root, once `require_roots` has passed."""
        return self.pck[-1]


def load_chains(signature: QuoteSignature, collateral: Collateral) -> Chains:
    """Parse every chain and list; nothing is believed yet.

    Raises:
        EvidenceError: one does not parse.
        EvidenceRefused: a chain has another length than it must have.
    """
    chains = Chains(
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


def require_roots(chains: Chains, anchors: TrustAnchors, steps: list[Step]) -> None:
    """Step 2: each root is byte-equal to the pinned one; a simulated one is named as such."""
    for chain in (chains.pck, chains.crl, chains.tcb, chains.qe):
        anchors.require_root("dcap", chain[-1])
    steps.append(passed("2 root certificate", described(chains.root)))


def verify_pck(chains: Chains, now: int, steps: list[Step]) -> PckExtension:
    """Step 3: the PCK chain; returns what the PCK says of its platform."""
    leaf, issuer, _root = chains.pck
    _require_name(leaf, "SGX PCK Certificate", "evidence.pck-chain")
    _require_name(issuer, "SGX PCK", "evidence.pck-chain")
    verify_chain(chains.pck, now=now, code="evidence.pck-chain", what="PCK chain")
    platform = pck_extension(leaf)
    if platform is None:
        raise EvidenceRefused(
            code="evidence.pck-chain",
            claim="SGX extension of the PCK",
            expected=EXTENSION_OID,
            actual="absent",
        )
    steps.append(
        passed("3 PCK chain", f"{leaf.common_name} < {issuer.common_name}, FMSPC {platform.fmspc.hex()}")
    )
    return platform


def verify_collateral_chains(chains: Chains, now: int, steps: list[Step]) -> None:
    """Step 4: the chains of CRL issuer, TCB info and QE identity."""
    # That chain needs no verification of its own: it is the end of the PCK's, which step 3 has verified.
    if chains.crl[0].der != chains.pck[1].der:
        raise EvidenceRefused(
            code="evidence.crl-chain",
            claim="issuer of the PCK CRL",
            expected=f"{chains.pck[1].common_name} sha256:{chains.pck[1].fingerprint.hex()}",
            actual=f"{chains.crl[0].common_name} sha256:{chains.crl[0].fingerprint.hex()}",
        )
    _require_name(chains.tcb[0], "SGX TCB Signing", "evidence.tcb-chain")
    _require_name(chains.qe[0], "SGX TCB Signing", "evidence.qe-chain")
    verify_chain(chains.tcb, now=now, code="evidence.tcb-chain", what="TCB signing chain")
    if chains.qe != chains.tcb:
        verify_chain(chains.qe, now=now, code="evidence.qe-chain", what="QE identity signing chain")
    steps.append(passed("4 collateral chains", f"{chains.crl[0].common_name}; {chains.tcb[0].common_name}"))


def verify_revocation(chains: Chains, now: int, steps: list[Step]) -> None:
    """Step 5: both revocation lists, and that neither names a certificate in use."""
    leaf, issuer, root = chains.pck
    verify_crl(chains.root_crl, root, now=now, code="evidence.root-crl", what="root CRL")
    verify_crl(chains.pck_crl, issuer, now=now, code="evidence.pck-crl", what="PCK CRL")
    for certificate in (issuer, chains.tcb[0], chains.qe[0]):
        require_not_revoked(certificate, chains.root_crl)
    require_not_revoked(leaf, chains.pck_crl)
    steps.append(
        passed(
            "5 revocation",
            f"root CRL {time_text(chains.root_crl.issued)}, PCK CRL {time_text(chains.pck_crl.issued)}",
        )
    )


def verify_tcb_info(
    collateral: Collateral,
    signer: Certificate,
    platform: PckExtension,
    now: int,
    steps: list[Step],
    *,
    name: str,
) -> TcbInfo:
    """Step 6: TCB info, signed, in force, with this ``name`` as its id, and about this very platform."""
    code = "evidence.tcb-info"
    require_signed_by(signer, collateral.tcb_info_signature, collateral.tcb_info, code=code, what="TCB info")
    info = TcbInfo.from_bytes(collateral.tcb_info)
    require_dates("TCB info", info.issued, info.next_update, now=now)
    require_equal(code, "TCB info id", name, info.id)
    require_equal(code, "TCB info version", 3, info.version)
    require_equal(code, "FMSPC", platform.fmspc.hex(), info.fmspc.hex())
    require_equal(code, "PCEID", platform.pce_id.hex(), info.pce_id.hex())
    steps.append(
        passed(
            "6 TCB info",
            f"{info.id} of {time_text(info.issued)}, evaluation {info.evaluation_number}, {info.fmspc.hex()}",
        )
    )
    return info


def verify_qe_identity(
    collateral: Collateral, signer: Certificate, now: int, steps: list[Step], *, name: str
) -> QeIdentity:
    """Step 7: QE identity, signed, in force, and with this ``name`` as its id."""
    code = "evidence.qe-identity"
    require_signed_by(
        signer, collateral.qe_identity_signature, collateral.qe_identity, code=code, what="QE identity"
    )
    identity = QeIdentity.from_bytes(collateral.qe_identity)
    require_dates("QE identity", identity.issued, identity.next_update, now=now)
    require_equal(code, "QE identity id", name, identity.id)
    require_equal(code, "QE identity version", 2, identity.version)
    steps.append(
        passed(
            "7 QE identity",
            f"{identity.id} of {time_text(identity.issued)}, evaluation {identity.evaluation_number}",
        )
    )
    return identity


def collateral_marks(chains: Chains, tcb_info: TcbInfo, identity: QeIdentity) -> dict[str, CollateralMark]:
    """Marks by name; names tell apart what may lawfully differ in age: another PCK CA, family or TEE."""
    issuer = chains.pck[1].fingerprint.hex()[:16]
    family = f"{tcb_info.fmspc.hex()}-{tcb_info.pce_id.hex()}"
    tdx = "TDX " if tcb_info.modules else ""
    return {
        "root CRL": CollateralMark(issued=chains.root_crl.issued, number=chains.root_crl.number),
        f"PCK CRL {issuer}": CollateralMark(issued=chains.pck_crl.issued, number=chains.pck_crl.number),
        f"{tdx}TCB info {family}": CollateralMark(issued=tcb_info.issued, number=tcb_info.evaluation_number),
        f"{tdx}QE identity": CollateralMark(issued=identity.issued, number=identity.evaluation_number),
    }


def _require_name(certificate: Certificate, part: str, code: str) -> None:
    if part not in certificate.common_name:
        raise EvidenceRefused(
            code=code, claim="certificate name", expected=f"one with {part!r}", actual=certificate.common_name
        )


def require_equal(code: str, claim: str, expected: object, actual: object) -> None:
    """Refuse, with ``code``, a claim that is not as expected."""
    if expected != actual:
        raise EvidenceRefused(code=code, claim=claim, expected=expected, actual=actual)


def passed(name: str, detail: str) -> Step:
    """A step that passed."""
    return Step(name=name, outcome="ok", detail=detail)
