"""Quotes of the simulated platform: the DCAP version 3 format, signed under its own root."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from cloister.core.evidence.dcap import (
    CERTIFICATION_PEM_CHAIN,
    KEY_TYPE_ECDSA_P256,
    TEE_SGX,
    Header,
    Quote,
    QuoteSignature,
    SgxReportBody,
)
from cloister.sim.tcb import QE_ATTRIBUTES, QE_MR_SIGNER, QE_PROD_ID, QE_SVN

ATTRIBUTES: Final = bytes.fromhex("0500000000000000e700000000000000")  # initialised, 64 bit
DEBUG_ATTRIBUTES: Final = bytes.fromhex("0700000000000000e700000000000000")

# The header names Intel's quoting enclave, as verifiers of the genuine format demand.
_QE_VENDOR: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_USER_DATA: Final = b"Cloister Simulated".ljust(20, b"\0")
_QE_MR_ENCLAVE: Final = hashlib.sha256(b"Cloister Simulated SGX quoting enclave").digest()
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

    def sign(self, body: SgxReportBody) -> bytes:
        """The quote over ``body``."""
        header = Header(
            version=3,
            attestation_key_type=KEY_TYPE_ECDSA_P256,
            tee_type=TEE_SGX,
            qe_svn=self.isv_svn,
            pce_svn=self.pce_svn,
            qe_vendor_id=_QE_VENDOR,
            user_data=_USER_DATA,
        )
        point = public_point(self.attestation_key)
        bound = hashlib.sha256(point + _QE_AUTH_DATA).digest() + bytes(32)
        qe_report = report(
            cpu_svn=self.cpu_svn,
            attributes=QE_ATTRIBUTES,
            mr_enclave=_QE_MR_ENCLAVE,
            mr_signer=QE_MR_SIGNER,
            isv_prod_id=QE_PROD_ID,
            isv_svn=self.isv_svn,
            report_data=bound,
        )
        signature = QuoteSignature(
            signature=raw_sign(self.attestation_key, header.to_bytes() + body.to_bytes()),
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


def raw_sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """ECDSA on P-256 with SHA-256, as 64 B raw r || s."""
    r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def public_point(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public key as 64 B raw x || y."""
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
