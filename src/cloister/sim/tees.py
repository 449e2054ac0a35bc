"""Evidence of one enclave as each kind of TEE would give it, and the reference values that go with it.

The simulated platform has one measurement of what it launches, MRENCLAVE. Where it plays another TEE, that
TEE's registers follow from it, so that they change when the code does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final, Protocol

from cloister.core.evidence.bundle import AmdCollateral, Collateral, Evidence
from cloister.errors import UsageError
from cloister.sim.measurement import Measurement
from cloister.sim.quote import TD_ATTRIBUTES
from cloister.sim.snp import GUEST_POLICY

TEES: Final = ("sgx", "tdx", "snp", "nitro")
_REGISTERS: Final[Mapping[str, tuple[str, ...]]] = {
    "tdx": ("mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3"),
    "snp": ("measurement",),
    "nitro": ("pcr0", "pcr1", "pcr2"),
}


class _Amd(Protocol):
    def report(self, *, report_data: bytes, measurement: bytes, guest_policy: int) -> bytes: ...

    def collateral(self, now: int) -> AmdCollateral: ...


class _Nitro(Protocol):
    def document(self, *, report_data: bytes | None, pcrs: Mapping[int, bytes], now: int) -> bytes: ...


class Authority(Protocol):
    """What signs evidence: `cloister.sim.authority.SimulatedAuthority`."""

    @property
    def amd(self) -> _Amd:
        """Signs SEV-SNP reports."""

    @property
    def nitro(self) -> _Nitro:
        """Signs Nitro documents."""

    def collateral(self, now: int, *, tee: str = "sgx") -> Collateral:
        """Collateral that verifies the quotes made around ``now``."""

    def quote(
        self,
        *,
        report_data: bytes,
        mr_enclave: bytes,
        mr_signer: bytes,
        isv_prod_id: int,
        isv_svn: int,
        debug: bool = False,
        now: int,
    ) -> bytes:
        """A signed SGX quote over these values."""

    def td_quote(
        self,
        *,
        report_data: bytes,
        mr_td: bytes,
        rtmrs: tuple[bytes, ...],
        td_attributes: bytes,
        version: int,
        now: int,
    ) -> bytes:
        """A signed TDX quote over these values."""


def require_tee(tee: str) -> str:
    """Refuse a TEE that the simulated platform doesn't play; raises UsageError."""
    if tee not in TEES:
        raise UsageError(
            "the simulated platform plays no such TEE",
            code="usage.tee",
            claim="TEE",
            expected=", ".join(TEES),
            actual=tee[:40],
        )
    return tee


def registers(measured: Measurement, tee: str) -> dict[str, bytes]:
    """The registers of a TEE other than SGX (48 B each) for what was measured."""
    return {
        name: hashlib.sha384(b"cloister/v1/simulated " + name.encode() + measured.mr_enclave).digest()
        for name in _REGISTERS[tee]
    }


def evidence(authority: Authority, measured: Measurement, tee: str, report_data: bytes, now: int) -> Evidence:
    """What the simulated TEE says of an enclave.

    Args:
        authority: Signs it.
        measured: The enclave.
        tee: One of `TEES`.
        report_data: 64 B that the enclave binds.
        now: Unix seconds.
    """
    if tee == "sgx":
        quote = authority.quote(
            report_data=report_data,
            mr_enclave=measured.mr_enclave,
            mr_signer=measured.mr_signer,
            isv_prod_id=measured.isv_prod_id,
            isv_svn=measured.isv_svn,
            now=now,
        )
        return Evidence(tee=tee, quote=quote, collateral=authority.collateral(now))
    found = registers(measured, tee)
    if tee == "tdx":
        quote = authority.td_quote(
            report_data=report_data,
            mr_td=found["mr_td"],
            rtmrs=tuple(found[f"rtmr{index}"] for index in range(4)),
            td_attributes=TD_ATTRIBUTES,
            version=5,
            now=now,
        )
        return Evidence(tee=tee, quote=quote, collateral=authority.collateral(now, tee="tdx"))
    if tee == "snp":
        report = authority.amd.report(
            report_data=report_data, measurement=found["measurement"], guest_policy=GUEST_POLICY
        )
        return Evidence(tee=tee, quote=report, collateral=authority.amd.collateral(now))
    pcrs = {index: found[f"pcr{index}"] for index in range(3)}
    document = authority.nitro.document(report_data=report_data, pcrs=pcrs, now=now)
    return Evidence(tee=tee, quote=document, collateral=None)
