"""What verification found out, as values that appraisal, people and ``--json`` can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from cloister.core import encoding
from cloister.core.times import time_text
from cloister.errors import BindingRefused, EvidenceRefused

MAX_AHEAD: Final = 300  # seconds that the clock of whoever dated evidence or collateral may be ahead of ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One check that was made: its name, its outcome and what was compared.

    Outcomes: ``"ok"``, ``"note"`` for what nobody compares; a refusal is an error, which those who list steps
    show as ``"refused"``.
    """

    name: str
    outcome: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """The form that ``--json`` prints."""
        return {"name": self.name, "outcome": self.outcome, "detail": self.detail}

    def line(self) -> str:
        """One line for people."""
        return f"[{self.outcome}] {self.name}: {self.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DcapPlatform:
    """The machine that a quote comes from, as its PCK certificate describes it.

    Attributes:
        fmspc: 6 B platform family.
        pce_id: 2 B.
        ppid: 16 B identifier of the processor.
        platform_instance_id: 16 B on multi-package platforms, else empty.
        tcb_components: 16 security version numbers.
        pce_svn: Version of the PCE.
        sgx_type: 0 standard, 1 scalable, 2 scalable with integrity.
    """

    fmspc: bytes
    pce_id: bytes
    ppid: bytes
    platform_instance_id: bytes
    tcb_components: tuple[int, ...]
    pce_svn: int
    sgx_type: int

    def to_dict(self) -> dict[str, Any]:
        """The form that ``--json`` prints."""
        return {
            "fmspc": self.fmspc.hex(),
            "pce_id": self.pce_id.hex(),
            "ppid": self.ppid.hex(),
            "platform_instance_id": self.platform_instance_id.hex(),
            "tcb_components": list(self.tcb_components),
            "pce_svn": self.pce_svn,
            "sgx_type": self.sgx_type,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpPlatform:
    """The machine that a SEV-SNP report comes from.

    Attributes:
        product: ``"Milan"``, ``"Genoa"`` or ``"Turin"``.
        signer: ``"VCEK"`` or ``"VLEK"``.
        chip_id: 64 B identifier of the processor; zeros where the platform masks it.
        csp_id: The cloud provider that a VLEK belongs to; empty for a VCEK.
        tcb: Security versions that the signing key vouches for (REPORTED_TCB), by part: ``"bootloader"``,
            ``"tee"``, ``"snp"``, ``"microcode"`` and, on Turin, ``"fmc"``.
        platform_info: PLATFORM_INFO, 64 bits.
    """

    product: str
    signer: str
    chip_id: bytes
    csp_id: str
    tcb: Mapping[str, int]
    platform_info: int

    def to_dict(self) -> dict[str, Any]:
        """The form that ``--json`` prints."""
        return {
            "product": self.product,
            "signer": self.signer,
            "chip_id": self.chip_id.hex(),
            "csp_id": self.csp_id,
            "tcb": dict(self.tcb),
            "platform_info": self.platform_info,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class NitroPlatform:
    """The instance that a Nitro document comes from.

    Attributes:
        module_id: Of the enclave, as the hypervisor names it.
        timestamp: When the document was made, unix seconds.
    """

    module_id: str
    timestamp: int

    def to_dict(self) -> dict[str, Any]:
        """The form that ``--json`` prints."""
        return {"module_id": self.module_id, "timestamp": self.timestamp}


Platform: TypeAlias = DcapPlatform | SnpPlatform | NitroPlatform


@dataclass(frozen=True, slots=True, kw_only=True)
class CollateralMark:
    """How recent one piece of collateral is.

    Attributes:
        issued: Issue date, unix seconds.
        number: CRL number or TCB evaluation data number.
    """

    issued: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedEvidence:
    """Genuine evidence. Whether it is *acceptable* is for `cloister.core.verifier.appraisal` to say.

    Attributes:
        tee: ``"sgx"``, ``"tdx"``, ``"snp"`` or ``"nitro"``.
        anchors_digest: 32 B; the `TrustAnchors` that it was verified under.
        simulated: Whether those anchors are a simulated platform's.
        debug: Whether the enclave's memory is open to a debugger.
        tcb_status: Intel's status of platform, TDX module and quoting enclave together; None for TEEs whose
            vendor gives none.
        tcb_date: Unix seconds; issues published before it are fixed on this platform; None likewise.
        advisories: Intel's advisories that apply to platform, TDX module or quoting enclave, sorted.
        tcb_evaluation_number: The lower one of TCB info and QE identity; None likewise.
        measurements: Fields of the report by name: bytes, or integers for versions.
        report_data: What the enclave bound to its report: 64 B of REPORTDATA, or Nitro's user_data.
        platform: The machine.
        collateral: `CollateralMark` per signed object; names include the issuer or family that they speak of.
        collateral_issued: Oldest issue date of what says whether the platform is still good: TCB info, QE
            identity and PCK CRL; AMD's CRL; for Nitro, of the document itself. Unix seconds; None for none.
        not_after: Earliest expiry of anything relied on, unix seconds.
        steps: Every check made, in order.
    """

    tee: str
    anchors_digest: bytes
    simulated: bool
    debug: bool
    tcb_status: str | None
    tcb_date: int | None
    advisories: tuple[str, ...]
    tcb_evaluation_number: int | None
    measurements: Mapping[str, bytes | int]
    report_data: bytes
    platform: Platform
    collateral: Mapping[str, CollateralMark]
    collateral_issued: int | None
    not_after: int
    steps: tuple[Step, ...]

    @property
    def measurement(self) -> bytes:
        """What runs there, in 32 B: MRENCLAVE for SGX, else a digest of the registers that measure it."""
        names = _MEASURING[self.tee]
        found = [self.measurements[name] for name in names]
        if self.tee == "sgx" and isinstance(found[0], bytes):
            return found[0]
        return encoding.digest(["cloister/v1/measurement", self.tee, found])

    def require_report_data(self, expected: bytes) -> None:
        """Check what the enclave bound: without it, evidence of a good enclave says nothing of its sender.

        Raises:
            BindingRefused: code ``binding.report-data``.
        """
        if self.report_data != expected:
            raise BindingRefused(
                "the evidence was made for another message, key or configuration",
                code="binding.report-data",
                claim="user_data" if self.tee == "nitro" else "REPORTDATA",
                expected=expected.hex(),
                actual=self.report_data.hex(),
            )

    def to_dict(self) -> dict[str, Any]:
        """The form that ``--json`` prints: bytes in hex, times in unix seconds."""
        return {
            "tee": self.tee,
            "anchors": self.anchors_digest.hex(),
            "simulated": self.simulated,
            "debug": self.debug,
            "tcb_status": self.tcb_status,
            "tcb_date": self.tcb_date,
            "advisories": list(self.advisories),
            "tcb_evaluation_number": self.tcb_evaluation_number,
            "measurements": {name: _plain(value) for name, value in self.measurements.items()},
            "report_data": self.report_data.hex(),
            "platform": self.platform.to_dict(),
            "collateral": {
                name: {"issued": mark.issued, "number": mark.number} for name, mark in self.collateral.items()
            },
            "collateral_issued": self.collateral_issued,
            "not_after": self.not_after,
            "steps": [step.to_dict() for step in self.steps],
        }

    def lines(self) -> list[str]:
        """The result for people, step by step, as plain text."""
        origin = "SIMULATED, protects nothing" if self.simulated else "genuine hardware"
        found = [f"{self.tee} evidence ({origin})", *(f"  {step.line()}" for step in self.steps)]
        found += [f"  {name} = {_plain(value)}" for name, value in self.measurements.items()]
        found.append(f"  valid until {time_text(self.not_after)}")
        return found


_MEASURING: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "sgx": ("mr_enclave",),
        "tdx": ("mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_config_id"),
        "snp": ("measurement",),
        "nitro": ("pcr0", "pcr1", "pcr2"),
    }
)


class CollateralMemory:
    """The newest collateral seen. Older collateral could hide a revocation or a new TCB level (DESIGN, 4.7).

    It grows by one mark for each issuer and platform family that a trust anchor vouches for.

    Args:
        marks: What was seen before, by name.
    """

    def __init__(self, marks: Mapping[str, CollateralMark] = MappingProxyType({})) -> None:
        self._marks = dict(marks)

    @property
    def marks(self) -> Mapping[str, CollateralMark]:
        """Per name the latest issue date and the highest number."""
        return MappingProxyType(self._marks)

    def admit(self, found: Mapping[str, CollateralMark]) -> None:
        """Remember the marks of accepted evidence.

        Raises:
            EvidenceRefused: code ``evidence.collateral-older``; nothing is remembered of it.
        """
        merged = {}
        for name, mark in found.items():
            known = self._marks.get(name, mark)
            if mark.issued < known.issued or mark.number < known.number:
                raise EvidenceRefused(
                    "the collateral is older than what was seen before",
                    code="evidence.collateral-older",
                    claim=f"age of {name}",
                    expected=f"{time_text(known.issued)}, number {known.number} or newer",
                    actual=f"{time_text(mark.issued)}, number {mark.number}",
                    hint="Its host staples old collateral; have it fetched anew",
                )
            merged[name] = mark
        self._marks.update(merged)


def _plain(value: bytes | int) -> str | int:
    return value.hex() if isinstance(value, bytes) else value
