"""Quotes of the simulated platform: the DCAP formats of versions 3 to 5, signed under its own root."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.core.evidence.dcap import (
    CERTIFICATION_PEM_CHAIN,
    KEY_TYPE_ECDSA_P256,
    TEE_SGX,
    TEE_TDX,
    Body,
    Header,
    Quote,
    QuoteSignature,
    signed_bytes,
)
from cloister.core.evidence.sgx import SgxReportBody
from cloister.core.evidence.tdx import TdReport, TdReport15
from cloister.sim.pki import raw_sign
from cloister.sim.tcb import (
    MR_SIGNER_SEAM,
    QE_ATTRIBUTES,
    QE_MR_SIGNER,
    QE_PROD_ID,
    QE_SVN,
    TD_QE_PROD_ID,
)

ATTRIBUTES: Final = bytes.fromhex("0500000000000000e700000000000000")  # initialised, 64 bit
DEBUG_ATTRIBUTES: Final = bytes.fromhex("0700000000000000e700000000000000")
TD_ATTRIBUTES: Final = bytes.fromhex("0000001000000000")  # SEPT_VE_DISABLE
XFAM: Final = bytes.fromhex("e700060000000000")  # x87, SSE, AVX, AVX-512, PKRU, CET, AMX
MR_SEAM: Final = hashlib.sha384(b"Cloister Simulated TDX module").digest()

# The header names Intel's quoting enclave, as verifiers of the genuine format demand.
_QE_VENDOR: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_USER_DATA: Final = b"Cloister Simulated".ljust(20, b"\0")
_QE_MR_ENCLAVE: Final = hashlib.sha256(b"Cloister Simulated SGX quoting enclave").digest()
_TD_QE_MR_ENCLAVE: Final = hashlib.sha256(b"Cloister Simulated TD quoting enclave").digest()
_QE_AUTH_DATA: Final = bytes(range(32))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotingEnclave:
    """The simulated quoting enclave: an attestation key that the platform's PCK vouches for.

    Attributes:
        attestation_key: Signs quotes.
        pck_key: Signs the quoting enclave's report.
        certification_data: PEM: PCK leaf, PCK CA, root.
        cpu_svn: 16 B.
        pce_svn: Version of the PCE.
        isv_svn: Version that the quoting enclave reports of itself.
    """

    attestation_key: ec.EllipticCurvePrivateKey
    pck_key: ec.EllipticCurvePrivateKey
    certification_data: bytes
    cpu_svn: bytes
    pce_svn: int
    isv_svn: int = QE_SVN

    def sign(self, body: Body, *, version: int = 3) -> bytes:
        """The quote of ``version`` over ``body``; 3 takes an enclave's only."""
        tdx = isinstance(body, TdReport)
        header = Header(
            version=version,
            attestation_key_type=KEY_TYPE_ECDSA_P256,
            tee_type=TEE_TDX if tdx else TEE_SGX,
            qe_svn=self.isv_svn if version == 3 else 0,
            pce_svn=self.pce_svn if version == 3 else 0,
            qe_vendor_id=_QE_VENDOR,
            user_data=_USER_DATA,
        )
        point = public_point(self.attestation_key)
        bound = hashlib.sha256(point + _QE_AUTH_DATA).digest() + bytes(32)
        qe_report = report(
            cpu_svn=self.cpu_svn,
            attributes=QE_ATTRIBUTES,
            mr_enclave=_TD_QE_MR_ENCLAVE if tdx else _QE_MR_ENCLAVE,
            mr_signer=QE_MR_SIGNER,
            isv_prod_id=TD_QE_PROD_ID if tdx else QE_PROD_ID,
            isv_svn=self.isv_svn,
            report_data=bound,
        )
        signature = QuoteSignature(
            signature=raw_sign(self.attestation_key, signed_bytes(header, body)),
            attestation_key=point,
            qe_report=qe_report,
            qe_report_signature=raw_sign(self.pck_key, qe_report.to_bytes()),
            qe_auth_data=_QE_AUTH_DATA,
            certification_type=CERTIFICATION_PEM_CHAIN,
            certification_data=self.certification_data,
        )
        return Quote(header=header, body=body, signature=signature).to_bytes()


def report(
    *,
    cpu_svn: bytes,
    attributes: bytes,
    mr_enclave: bytes,
    mr_signer: bytes,
    isv_prod_id: int,
    isv_svn: int,
    report_data: bytes,
) -> SgxReportBody:
    """A report without the fields that only key separation and sharing use; those are zero."""
    return SgxReportBody(
        cpu_svn=cpu_svn,
        misc_select=0,
        isv_ext_prod_id=bytes(16),
        attributes=attributes,
        mr_enclave=mr_enclave,
        mr_signer=mr_signer,
        config_id=bytes(64),
        isv_prod_id=isv_prod_id,
        isv_svn=isv_svn,
        config_svn=0,
        isv_family_id=bytes(16),
        report_data=report_data,
    )


def td_report(
    *,
    report_data: bytes,
    mr_td: bytes,
    rtmrs: Sequence[bytes],
    mr_config_id: bytes,
    td_attributes: bytes,
    xfam: bytes,
    tee_tcb_svn: bytes,
) -> TdReport:
    """A TDX 1.0 report of a TD that the simulated module launched; MROWNER and MROWNERCONFIG are zero."""
    rtmr0, rtmr1, rtmr2, rtmr3 = rtmrs
    return TdReport(
        tee_tcb_svn=tee_tcb_svn,
        mr_seam=MR_SEAM,
        mr_signer_seam=MR_SIGNER_SEAM,
        seam_attributes=bytes(8),
        td_attributes=td_attributes,
        xfam=xfam,
        mr_td=mr_td,
        mr_config_id=mr_config_id,
        mr_owner=bytes(48),
        mr_owner_config=bytes(48),
        rtmr0=rtmr0,
        rtmr1=rtmr1,
        rtmr2=rtmr2,
        rtmr3=rtmr3,
        report_data=report_data,
    )


def td_report_15(report: TdReport, *, tee_tcb_svn2: bytes, mr_service_td: bytes) -> TdReport15:
    """The TDX 1.5 form of a report."""
    fields = {name: getattr(report, name) for name, _size in report.FIELDS}
    return TdReport15(**fields, tee_tcb_svn2=tee_tcb_svn2, mr_service_td=mr_service_td)


def public_point(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public key as 64 B raw x || y."""
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
