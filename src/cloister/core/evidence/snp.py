"""AMD SEV-SNP attestation reports, versions 2 to 5: bytes to frozen values and back.

A report has 1184 bytes, little-endian (AMD 56860, "SEV Secure Nested Paging Firmware ABI Specification",
ATTESTATION_REPORT). Bytes 0 to 0x29F are signed; from 0x2A0 on follow R and S, 72 B little-endian each, and
zeros. Version 3 added the CPUID fields, version 5 the mitigation vectors; before, both are zero. No trust
decision is taken here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from cloister.core.evidence.layout import require_size, require_zero
from cloister.errors import EvidenceError

REPORT_SIZE: Final = 0x4A0  # bytes
SIGNED_SIZE: Final = 0x2A0  # bytes
TCB_SIZE: Final = 8  # bytes
VERSIONS: Final = (2, 3, 4, 5)
PRODUCTS: Final = ("Milan", "Genoa", "Turin")
ALGORITHM_ECDSA_P384: Final = 1  # with SHA-384
VCEK, VLEK = "VCEK", "VLEK"
HOST_VMPL: Final = 0xFFFFFFFF  # of a report that the host asked for, without the guest

_DEBUG: Final = 1 << 19  # of POLICY
_POLICY_RESERVED_ONE: Final = 1 << 17
_POLICY_BITS: Final = (1 << 26) - 1
_PLATFORM_BITS: Final = 0b1011_1111  # SMT, TSME, ECC, RAPL, ciphertext hiding, alias check; SEV-TIO
_KEY_INFO_BITS: Final = 0b1_1111
_SIGNERS: Final = {0: VCEK, 1: VLEK}  # bits 2 to 4 of KEY_INFO; 7 means that the report is not signed
_COMPONENT, _COMPONENT_FIELD = 48, 72  # bytes of R or S, and of the field that holds it

# Product, family, first and last model of CPUID leaf 1; Bergamo and Siena (0xA0 on) have Genoa's keys.
_CPUS: Final = (
    ("Milan", 0x19, 0x00, 0x0F),
    ("Genoa", 0x19, 0x10, 0x1F),
    ("Genoa", 0x19, 0xA0, 0xAF),
    ("Turin", 0x1A, 0x00, 0x11),
)
_TCB_BYTES: Final[Mapping[str, int]] = {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7}
_TURIN_TCB_BYTES: Final[Mapping[str, int]] = {
    "fmc": 0,
    "bootloader": 1,
    "tee": 2,
    "snp": 3,
    "microcode": 7,
}

# Every field but the signature: offset, size in bytes, and whether it is a number. The rest is reserved.
_FIELDS: Final[Mapping[str, tuple[int, int, bool]]] = {
    "version": (0x000, 4, True),
    "guest_svn": (0x004, 4, True),
    "policy": (0x008, 8, True),
    "family_id": (0x010, 16, False),
    "image_id": (0x020, 16, False),
    "vmpl": (0x030, 4, True),
    "signature_algorithm": (0x034, 4, True),
    "current_tcb": (0x038, 8, False),
    "platform_info": (0x040, 8, True),
    "key_info": (0x048, 4, True),
    "report_data": (0x050, 64, False),
    "measurement": (0x090, 48, False),
    "host_data": (0x0C0, 32, False),
    "id_key_digest": (0x0E0, 48, False),
    "author_key_digest": (0x110, 48, False),
    "report_id": (0x140, 32, False),
    "report_id_ma": (0x160, 32, False),
    "reported_tcb": (0x180, 8, False),
    "cpuid_family": (0x188, 1, True),
    "cpuid_model": (0x189, 1, True),
    "cpuid_stepping": (0x18A, 1, True),
    "chip_id": (0x1A0, 64, False),
    "committed_tcb": (0x1E0, 8, False),
    "current_version": (0x1E8, 3, False),
    "committed_version": (0x1EC, 3, False),
    "launch_tcb": (0x1F0, 8, False),
    "launch_mitigation_vector": (0x1F8, 8, True),
    "current_mitigation_vector": (0x200, 8, True),
}
_RESERVED: Final = (
    (0x04C, 0x050),
    (0x18B, 0x1A0),
    (0x1EB, 0x1EC),
    (0x1EF, 0x1F0),
    (0x208, 0x2A0),
    (0x2D0, 0x2E8),  # R above its 48 B
    (0x318, 0x4A0),  # S above its 48 B, and the rest
)
_SINCE: Final = {  # other fields are in every version
    "cpuid_family": 3,
    "cpuid_model": 3,
    "cpuid_stepping": 3,
    "launch_mitigation_vector": 5,
    "current_mitigation_vector": 5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpTcb:
    """A TCB version, 8 B: security version numbers from 0 to 255.

    Attributes:
        bootloader: Of the security processor.
        tee: Of its operating system.
        snp: Of the SNP firmware.
        microcode: Lowest patch level of all cores.
        fmc: Of the first mutable code; None before Turin, whose layout is another.
    """

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.parts.items():
            if type(value) is not int or not 0 <= value <= 0xFF:
                raise EvidenceError(
                    "a TCB part is out of range", claim=name, expected="0 to 255", actual=repr(value)[:40]
                )

    @property
    def parts(self) -> Mapping[str, int]:
        """Its numbers by name; ``"fmc"`` on Turin only."""
        found = {
            "bootloader": self.bootloader,
            "tee": self.tee,
            "snp": self.snp,
            "microcode": self.microcode,
        }
        return MappingProxyType(found if self.fmc is None else {"fmc": self.fmc, **found})

    @classmethod
    def from_bytes(cls, data: bytes, product: str) -> SnpTcb:
        """Parse exactly 8 bytes in the layout of a product.

        Raises:
            EvidenceError: another length, an unknown product, or a reserved byte that isn't zero.
        """
        require_size("TCB version", data, TCB_SIZE)
        layout = tcb_layout(product)
        tcb = cls(**{name: data[index] for name, index in layout.items()})
        if tcb.to_bytes() != data:
            raise EvidenceError(
                "a reserved byte of a TCB version is not zero",
                claim="TCB version",
                expected=tcb.to_bytes().hex(),
                actual=data.hex(),
            )
        return tcb

    def to_bytes(self) -> bytes:
        """The 8 bytes that `from_bytes` reads."""
        data = bytearray(TCB_SIZE)
        layout = _TCB_BYTES if self.fmc is None else _TURIN_TCB_BYTES
        for name, value in self.parts.items():
            data[layout[name]] = value
        return bytes(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpReport:
    """An attestation report; AMD's names, a TCB version as its 8 B.

    Attributes:
        version: 2 to 5.
        guest_svn: Version of the guest, by its owner's ID block.
        policy: Guest policy; bit 19 opens the guest to a debugger.
        family_id: 16 B, by the ID block.
        image_id: 16 B, by the ID block.
        vmpl: Privilege level that asked, 0 to 3, or `HOST_VMPL`.
        signature_algorithm: 1 is ECDSA on P-384 with SHA-384.
        current_tcb: 8 B.
        platform_info: Bits 0 to 5 and 7.
        key_info: Bit 0: an author key is in use; 1: the chip key is masked; 2 to 4: which key signs.
        report_data: 64 B that the guest binds.
        measurement: 48 B digest of what was launched.
        host_data: 32 B that the host chose at launch.
        id_key_digest: 48 B.
        author_key_digest: 48 B.
        report_id: 32 B identifier of the guest.
        report_id_ma: 32 B identifier of its migration agent; all ones without one.
        reported_tcb: 8 B; the one that the signing key was derived for.
        cpuid_family: With the extended family added; 0 in version 2, as the two below.
        cpuid_model: With the extended model.
        cpuid_stepping: Of the processor.
        chip_id: 64 B; zeros where the platform masks it.
        committed_tcb: 8 B; the firmware can't go back behind it.
        current_version: 3 B build, minor, major of the firmware.
        committed_version: 3 B likewise.
        launch_tcb: 8 B; when the guest was launched.
        launch_mitigation_vector: 64 bits; 0 before version 5.
        current_mitigation_vector: 64 bits; 0 before version 5.
        signature: 96 B raw r || s, big-endian.
    """

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algorithm: int
    current_tcb: bytes
    platform_info: int
    key_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid_family: int
    cpuid_model: int
    cpuid_stepping: int
    chip_id: bytes
    committed_tcb: bytes
    current_version: bytes
    committed_version: bytes
    launch_tcb: bytes
    launch_mitigation_vector: int
    current_mitigation_vector: int
    signature: bytes

    def __post_init__(self) -> None:
        for name, (_offset, size, is_number) in _FIELDS.items():
            value = getattr(self, name)
            if not is_number:
                require_size(name, value, size)
            elif not 0 <= value < 1 << 8 * size:
                raise _field_error(name, f"0 to {(1 << 8 * size) - 1}", value)
        require_size("signature", self.signature, 2 * _COMPONENT)
        if self.version not in VERSIONS:
            raise _field_error("version", "2 to 5", self.version)
        for name, since in _SINCE.items():
            if self.version < since and getattr(self, name):
                raise _field_error(name, f"0 in version {self.version}", getattr(self, name))
        if self.policy & ~_POLICY_BITS or not self.policy & _POLICY_RESERVED_ONE:
            raise _field_error("policy", "bit 17 and none above 25", hex(self.policy))
        if self.platform_info & ~_PLATFORM_BITS:
            raise _field_error("platform_info", "bits 0 to 5 and 7 only", hex(self.platform_info))
        if self.key_info & ~_KEY_INFO_BITS:
            raise _field_error("key_info", "bits 0 to 4 only", hex(self.key_info))
        if self.vmpl > 3 and self.vmpl != HOST_VMPL:
            raise _field_error("vmpl", f"0 to 3 or {HOST_VMPL}", self.vmpl)

    @property
    def debug(self) -> bool:
        """Whether the host may read the guest's memory (POLICY bit 19)."""
        return bool(self.policy & _DEBUG)

    @property
    def signer(self) -> str:
        """``"VCEK"``, ``"VLEK"``, or empty for another value of KEY_INFO."""
        return _SIGNERS.get(self.key_info >> 2, "")

    @property
    def product(self) -> str:
        """One of `PRODUCTS` by CPUID; empty for version 2, which has none, and for other processors."""
        return product_of(self.cpuid_family, self.cpuid_model) if self.version > 2 else ""

    @property
    def signed_bytes(self) -> bytes:
        """What the signature covers, 672 B."""
        return self.to_bytes()[:SIGNED_SIZE]

    @classmethod
    def from_bytes(cls, data: bytes) -> SnpReport:
        """Parse exactly 1184 bytes; ``to_bytes`` gives them back.

        Raises:
            EvidenceError: another length or version, or a reserved bit or byte that isn't as it must be.
        """
        require_size("SNP report", data, REPORT_SIZE)
        for start, end in _RESERVED:
            require_zero("the SNP report", data, start, end)
        values: dict[str, Any] = {}
        for name, (offset, size, is_number) in _FIELDS.items():
            raw = data[offset : offset + size]
            values[name] = int.from_bytes(raw, "little") if is_number else bytes(raw)
        signature = b"".join(data[start : start + _COMPONENT][::-1] for start in _COMPONENTS)
        return cls(signature=signature, **values)

    def to_bytes(self) -> bytes:
        """The 1184 bytes that `from_bytes` reads."""
        data = bytearray(REPORT_SIZE)
        for name, (offset, size, is_number) in _FIELDS.items():
            value = getattr(self, name)
            data[offset : offset + size] = value.to_bytes(size, "little") if is_number else value
        for index, start in enumerate(_COMPONENTS):
            component = self.signature[_COMPONENT * index : _COMPONENT * (index + 1)]
            data[start : start + _COMPONENT] = component[::-1]
        return bytes(data)


_COMPONENTS: Final = (SIGNED_SIZE, SIGNED_SIZE + _COMPONENT_FIELD)


def product_of(family: int, model: int) -> str:
    """One of `PRODUCTS` by combined CPUID family and model; empty for another processor."""
    for product, of_family, first, last in _CPUS:
        if family == of_family and first <= model <= last:
            return product
    return ""


def tcb_layout(product: str) -> Mapping[str, int]:
    """Which byte of a TCB version is which part.

    Raises:
        EvidenceError: the product is none of `PRODUCTS`.
    """
    if product not in PRODUCTS:
        raise EvidenceError("unknown product", claim="product", expected=", ".join(PRODUCTS), actual=product)
    return _TURIN_TCB_BYTES if product == "Turin" else _TCB_BYTES


def _field_error(claim: str, expected: str, actual: object) -> EvidenceError:
    return EvidenceError(
        f"{claim} is not as the SNP ABI has it", claim=claim, expected=expected, actual=actual
    )
