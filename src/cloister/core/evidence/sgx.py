"""SGX enclave reports: bytes to frozen values and back.

Layout, little-endian (Intel SDM volume 3D, REPORT structure)::

    CPUSVN 0 | MISCSELECT 16 | ISVEXTPRODID 32 | ATTRIBUTES 48 | MRENCLAVE 64 | MRSIGNER 128 | CONFIGID 192
    | ISVPRODID 256 | ISVSVN 258 | CONFIGSVN 260 | ISVFAMILYID 304 | REPORTDATA 320 | end 384
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cloister.core.evidence.layout import require_size, require_zero, u16

SIZE: Final = 384  # bytes

# Ranges that the processor leaves zero; what lies between them has a name below.
_RESERVED: Final = ((20, 32), (96, 128), (160, 192), (262, 304))


@dataclass(frozen=True, slots=True, kw_only=True)
class SgxReportBody:
    """Body of an SGX enclave report, 384 B (Intel SDM volume 3D, REPORT structure); the vendor's names."""

    cpu_svn: bytes  # 16
    misc_select: int  # u32
    isv_ext_prod_id: bytes  # 16
    attributes: bytes  # 16: flags 8, XFRM 8
    mr_enclave: bytes  # 32
    mr_signer: bytes  # 32
    config_id: bytes  # 64
    isv_prod_id: int  # u16
    isv_svn: int  # u16
    config_svn: int  # u16
    isv_family_id: bytes  # 16
    report_data: bytes  # 64

    def __post_init__(self) -> None:
        for name, size in _BODY_SIZES:
            require_size(name, getattr(self, name), size)

    @property
    def debug(self) -> bool:
        """Whether the enclave's memory is open to a debugger (ATTRIBUTES bit 1)."""
        return bool(self.attributes[0] & 0x02)

    @classmethod
    def from_bytes(cls, data: bytes) -> SgxReportBody:
        """Parse exactly 384 bytes.

        Raises:
            EvidenceError: another length, or a reserved byte that isn't zero.
        """
        require_size("SGX report", data, SIZE)
        for start, end in _RESERVED:
            require_zero("the SGX report", data, start, end)
        return cls(
            cpu_svn=data[0:16],
            misc_select=int.from_bytes(data[16:20], "little"),
            isv_ext_prod_id=data[32:48],
            attributes=data[48:64],
            mr_enclave=data[64:96],
            mr_signer=data[128:160],
            config_id=data[192:256],
            isv_prod_id=u16(data, 256),
            isv_svn=u16(data, 258),
            config_svn=u16(data, 260),
            isv_family_id=data[304:320],
            report_data=data[320:384],
        )

    def to_bytes(self) -> bytes:
        """The 384 bytes that `from_bytes` reads."""
        return b"".join(
            (
                self.cpu_svn,
                self.misc_select.to_bytes(4, "little"),
                bytes(12),
                self.isv_ext_prod_id,
                self.attributes,
                self.mr_enclave,
                bytes(32),
                self.mr_signer,
                bytes(32),
                self.config_id,
                self.isv_prod_id.to_bytes(2, "little"),
                self.isv_svn.to_bytes(2, "little"),
                self.config_svn.to_bytes(2, "little"),
                bytes(42),
                self.isv_family_id,
                self.report_data,
            )
        )


_BODY_SIZES: Final = (
    ("cpu_svn", 16),
    ("isv_ext_prod_id", 16),
    ("attributes", 16),
    ("mr_enclave", 32),
    ("mr_signer", 32),
    ("config_id", 64),
    ("isv_family_id", 16),
    ("report_data", 64),
)
