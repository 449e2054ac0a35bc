"""Which collateral a piece of evidence needs, and the file in which a host keeps it.

A host fills a folder from the vendors' services, an enclave reads it; both take the names from here::

    sgx/<FMSPC>-<CA>.json          DCAP collateral of a platform family, as `Collateral.to_json` writes it
    tdx/<FMSPC>-<CA>.json          the same for TDX
    snp/<chip id>-<TCB>.pem        VCEK, ASK and ARK of one processor at one reported TCB
    snp/<SHA-256 of the ARK>.crl   the revocation list of one ARK, DER

The evidence chooses what it needs; that is no trust decision, since a verifier checks that both fit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cloister.core.evidence.dcap import TEES, Quote
from cloister.core.evidence.pck import EXTENSION_OID, PckExtension
from cloister.core.evidence.snp import TCB_SIZE
from cloister.core.evidence.vek import CHIP_ID_SIZE
from cloister.core.verifier.certificates import Certificate, load_chain
from cloister.errors import EvidenceError

FMSPC_SIZE: Final = 6  # bytes
CAS: Final = ("processor", "platform")  # Intel's two intermediate CAs, as its service names them


@dataclass(frozen=True, slots=True, kw_only=True)
class DcapKey:
    """What selects DCAP collateral.

    Attributes:
        tee: ``"sgx"`` or ``"tdx"``.
        fmspc: 6 B of the platform's PCK certificate.
        ca: ``"processor"`` or ``"platform"``: who issued that certificate.
    """

    tee: str
    fmspc: bytes
    ca: str

    def __post_init__(self) -> None:
        for claim, actual, known in (("tee", self.tee, tuple(TEES.values())), ("ca", self.ca, CAS)):
            if actual not in known:
                raise EvidenceError(claim=claim, expected=", ".join(known), actual=repr(actual)[:40])
        _require_size("fmspc", self.fmspc, FMSPC_SIZE)

    @property
    def file(self) -> str:
        """Name of the file, relative to the folder."""
        return f"{self.tee}/{self.fmspc.hex()}-{self.ca}.json"

    @classmethod
    def from_quote(cls, raw: bytes) -> DcapKey:
        """Read a quote's header and its own PCK certificate.

        Raises:
            EvidenceError: either does not parse, or the chain isn't a PCK, its CA and a root.
        """
        quote = Quote.from_bytes(raw)
        chain = load_chain(quote.signature.certification_data)
        names = [name for name in CAS if len(chain) == 3 and name in chain[1].common_name.lower()]
        if len(names) != 1:
            raise EvidenceError(
                "the quote names no PCK CA",
                claim="PCK CA",
                expected=" or ".join(CAS),
                actual=", ".join(certificate.common_name for certificate in chain)[:120],
            )
        platform = pck_extension(chain[0])
        if platform is None:
            raise EvidenceError("the PCK certificate has no SGX extension", claim="SGX extension")
        return cls(tee=TEES[quote.header.tee_type], fmspc=platform.fmspc, ca=names[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpKey:
    """What selects a processor's certificates.

    Attributes:
        chip_id: 64 B; zero where the host masks it.
        tcb: 8 B, the reported TCB as the report has it.
    """

    chip_id: bytes
    tcb: bytes

    def __post_init__(self) -> None:
        _require_size("chip id", self.chip_id, CHIP_ID_SIZE)
        _require_size("TCB", self.tcb, TCB_SIZE)

    @property
    def file(self) -> str:
        """Name of the file, relative to the folder."""
        return f"snp/{self.chip_id.hex()}-{self.tcb.hex()}.pem"


def pck_extension(leaf: Certificate) -> PckExtension | None:
    """What a PCK certificate says of its platform; None where it says nothing; raises EvidenceError."""
    for extension in leaf.parsed.extensions:
        if extension.oid.dotted_string == EXTENSION_OID:
            return PckExtension.from_bytes(extension.value.public_bytes())
    return None


def crl_file(ark: bytes) -> str:
    """Name of the file with the revocation list of an ARK (DER), relative to the folder."""
    return f"snp/{hashlib.sha256(ark).hexdigest()}.crl"


def _require_size(claim: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise EvidenceError(claim=claim, expected=f"{size} B", actual=f"{len(value)} B")
