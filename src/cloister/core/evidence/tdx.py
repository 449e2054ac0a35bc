"""TD reports: what a TDX quote says of a trust domain; bytes to frozen values and back.

Layout (Intel, "TDX DCAP Quoting Library API", appendix A.3.2; TDX 1.5 adds the last two fields)::

    TEE_TCB_SVN 0 | MRSEAM 16 | MRSIGNERSEAM 64 | SEAMATTRIBUTES 112 | TDATTRIBUTES 120 | XFAM 128 | MRTD 136
    | MRCONFIGID 184 | MROWNER 232 | MROWNERCONFIG 280 | RTMR0 to RTMR3 328, 376, 424, 472 | REPORTDATA 520
    | TEE_TCB_SVN2 584 | MRSERVICETD 600 | end 648
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Self

from cloister.core.evidence.layout import require_size
from cloister.errors import EvidenceError

SIZE_10: Final = 584  # bytes
SIZE_15: Final = 648  # bytes

# Bits of TDATTRIBUTES that the TDX module defines (its ABI specification, ATTRIBUTES; names as in Linux,
# arch/x86/include/asm/shared/tdx.h): DEBUG 0, HGS_PLUS_PROF 4, PERF_PROF 5, PMT_PROF 6, ICSSD 16, LASS 27,
# SEPT_VE_DISABLE 28, MIGRATABLE 29, PKS 30, KL 31, TPA 62, PERFMON 63.
_DEFINED_BITS: Final = sum(1 << bit for bit in (0, 4, 5, 6, 16, 27, 28, 29, 30, 31, 62, 63))

_FIELDS_10: Final = (
    ("tee_tcb_svn", 16),
    ("mr_seam", 48),
    ("mr_signer_seam", 48),
    ("seam_attributes", 8),
    ("td_attributes", 8),
    ("xfam", 8),
    ("mr_td", 48),
    ("mr_config_id", 48),
    ("mr_owner", 48),
    ("mr_owner_config", 48),
    ("rtmr0", 48),
    ("rtmr1", 48),
    ("rtmr2", 48),
    ("rtmr3", 48),
    ("report_data", 64),
)
_FIELDS_15: Final = (*_FIELDS_10, ("tee_tcb_svn2", 16), ("mr_service_td", 48))


@dataclass(frozen=True, slots=True, kw_only=True)
class TdReport:
    """The report of a trust domain (TDX 1.0), 584 B; the vendor's names.

    Attributes:
        tee_tcb_svn: 16 B. ISVSVN of the TDX module that launched the TD, its major version, SVN of the SEAM
            loader; the rest is zero.
        mr_seam: 48 B, measurement of the TDX module.
        mr_signer_seam: 48 B, its signer; zero for Intel.
        seam_attributes: 8 B.
        td_attributes: 8 B.
        xfam: 8 B, extended features that the TD may use.
        mr_td: 48 B, measurement of the TD's initial contents.
        mr_config_id: 48 B that the host set at launch, as the next two.
        mr_owner: 48 B.
        mr_owner_config: 48 B.
        rtmr0: 48 B, as ``rtmr1`` to ``rtmr3``: registers that the guest extends.
        report_data: 64 B that the guest bound.
    """

    SIZE: ClassVar[int] = SIZE_10
    FIELDS: ClassVar[tuple[tuple[str, int], ...]] = _FIELDS_10

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: bytes
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmr0: bytes
    rtmr1: bytes
    rtmr2: bytes
    rtmr3: bytes
    report_data: bytes

    def __post_init__(self) -> None:
        for name, size in self.FIELDS:
            require_size(name, getattr(self, name), size)
        undefined = int.from_bytes(self.td_attributes, "little") & ~_DEFINED_BITS
        if undefined:
            raise EvidenceError(
                "a reserved bit of the TD report is set",
                claim="td_attributes",
                expected="reserved bits zero",
                actual=f"{undefined:#018x}",
            )

    @property
    def debug(self) -> bool:
        """Whether the TD is open to a debugger (TDATTRIBUTES bit 0) or a profiler (bits 4 to 6)."""
        return self.td_attributes[0] != 0

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse exactly 584 bytes, or 648 of a TDX 1.5 report.

        Raises:
            EvidenceError: another length, or a reserved bit is set.
        """
        require_size("TD report", data, cls.SIZE)
        values, offset = {}, 0
        for name, size in cls.FIELDS:
            values[name] = data[offset : offset + size]
            offset += size
        return cls(**values)

    def to_bytes(self) -> bytes:
        """The bytes that `from_bytes` reads."""
        return b"".join(getattr(self, name) for name, _size in self.FIELDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class TdReport15(TdReport):
    """The report of a trust domain under TDX 1.5, 648 B.

    Attributes:
        tee_tcb_svn2: 16 B, like ``tee_tcb_svn``, of the TDX module that runs now, as it can be updated.
        mr_service_td: 48 B, measurements of the service TDs bound to this one; zero for none.
    """

    SIZE: ClassVar[int] = SIZE_15
    FIELDS: ClassVar[tuple[tuple[str, int], ...]] = _FIELDS_15

    tee_tcb_svn2: bytes
    mr_service_td: bytes
