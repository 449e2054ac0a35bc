"""One simulated vendor of each kind, what their TEEs sign, and a collateral folder as a host fills it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from cloister.core.evidence import Evidence
from cloister.core.evidence.bundle import AmdCollateral, Collateral
from cloister.core.verifier import TrustAnchors, dcap, nitro, snp
from cloister.core.verifier.certificates import AMD, load_chain
from cloister.core.verifier.collateral_key import DcapKey, SnpKey, crl_file
from cloister.core.verifier.result import VerifiedEvidence
from cloister.errors import CloisterError
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.nitro import SimulatedNitro
from cloister.sim.snp import SimulatedAmd
from support.realm import NOW, authority

REPORT_DATA: Final = bytes(range(64))
MR_ENCLAVE: Final = b"e" * 32
MR_TD: Final = b"t" * 48
MEASUREMENT: Final = b"m" * 48


def intel() -> SimulatedAuthority:
    return authority("main")


@cache
def amd() -> SimulatedAmd:
    return SimulatedAmd.create(now=NOW, product="Genoa")


@cache
def aws() -> SimulatedNitro:
    return SimulatedNitro.create(now=NOW)


@cache  # signatures are random, so another call gives other bytes
def intel_collateral(tee: str) -> Collateral:
    return intel().collateral(NOW, tee=tee)


@cache
def amd_collateral() -> AmdCollateral:
    return amd().collateral(NOW)


def sgx_quote(report_data: bytes = REPORT_DATA) -> bytes:
    return intel().quote(
        report_data=report_data, mr_enclave=MR_ENCLAVE, mr_signer=b"s" * 32, isv_prod_id=1, isv_svn=1, now=NOW
    )


def td_quote(report_data: bytes = REPORT_DATA, level: int = 0) -> tuple[bytes, bytes]:
    """A quote, and no auxiliary data."""
    assert level == 0
    return intel().td_quote(report_data=report_data, mr_td=MR_TD, now=NOW), b""


def snp_report(report_data: bytes = REPORT_DATA, level: int = 0) -> bytes:
    return amd().report(report_data=report_data, measurement=MEASUREMENT, vmpl=level)


def nitro_document(report_data: bytes = REPORT_DATA) -> bytes:
    return aws().document(report_data=report_data, pcrs={0: b"p" * 48}, now=NOW)


def shelve(folder: Path, *, certificates: bool = True, crl: bool = True) -> Path:
    """Fill a collateral folder for all the simulated TEEs."""
    for quote in (sgx_quote(), td_quote()[0]):
        key = DcapKey.from_quote(quote)
        write(folder / key.file, intel_collateral(key.tee).to_json().encode())
    collateral = amd_collateral()
    if certificates:
        key = SnpKey(chip_id=amd().chip_id, tcb=amd().tcb.to_bytes())
        write(folder / key.file, collateral.certificates)
    if crl:
        ark = load_chain(collateral.certificates, AMD)[-1]
        write(folder / crl_file(ark.der), collateral.crl)
    return folder


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def anchors() -> TrustAnchors:
    return TrustAnchors.simulated(intel().root_der + amd().root_der + aws().root_der)


def told(error: CloisterError) -> tuple[str, str]:
    """Code and claim."""
    return error.code, error.claim


def verified(evidence: Evidence) -> VerifiedEvidence:
    """What a relying party makes of it, under the simulated roots."""
    checks = {"sgx": dcap.verify, "tdx": dcap.verify, "snp": snp.verify, "nitro": nitro.verify}
    return checks[evidence.tee](evidence, anchors=anchors(), now=NOW)
