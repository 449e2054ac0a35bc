"""AMD's extensions of a VCEK or VLEK certificate (below 1.3.6.1.4.1.3704.1): DER values to a frozen value.

They name the product, the TCB version that the key was derived for, and the chip or the cloud provider.
Source: AMD 57230, "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface
Specification".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from cloister.core.evidence.snp import PRODUCTS, SnpTcb, tcb_layout
from cloister.errors import EvidenceError

ARC: Final = "1.3.6.1.4.1.3704.1."
PRODUCT_NAME, CHIP_ID, PROVIDER = "2", "4", "5"  # below ARC
TCB_PARTS: Final = MappingProxyType(
    {"bootloader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8", "fmc": "3.9"}
)
CHIP_ID_SIZE: Final = 64  # bytes
TURIN_CHIP_ID_SIZE: Final = 8  # bytes

_INTEGER, _OCTETS, _IA5 = 0x02, 0x04, 0x16
_KEYS_OF: Final = MappingProxyType({"Bergamo": "Genoa", "Siena": "Genoa"})  # sold by other names


@dataclass(frozen=True, slots=True, kw_only=True)
class VekExtensions:
    """What a VCEK or VLEK says.

    Attributes:
        product: One of `PRODUCTS`.
        tcb: TCB version that the key was derived for.
        chip_id: 64 B, on Turin 8; empty in a VLEK.
        csp_id: The cloud provider that a VLEK belongs to; empty in a VCEK.
    """

    product: str
    tcb: SnpTcb
    chip_id: bytes
    csp_id: str

    @classmethod
    def from_values(cls, values: Mapping[str, bytes]) -> VekExtensions:
        """Read the extensions' values, by the arcs below `ARC`; others than those above don't matter.

        Raises:
            EvidenceError: one is missing, malformed, or names an unknown product; code ``evidence.snp-vek``.
        """
        name = _text(values, PRODUCT_NAME)
        line = name.split("-")[0]  # "Milan-B0" names a stepping, too
        product = _KEYS_OF.get(line, line)
        if product not in PRODUCTS:
            raise _malformed(PRODUCT_NAME, ", ".join(PRODUCTS), name)
        return cls(
            product=product,
            tcb=SnpTcb(**{part: _number(values, TCB_PARTS[part]) for part in tcb_layout(product)}),
            chip_id=_chip_id(values, TURIN_CHIP_ID_SIZE if product == "Turin" else CHIP_ID_SIZE),
            csp_id=_text(values, PROVIDER) if PROVIDER in values else "",
        )


def _chip_id(values: Mapping[str, bytes], size: int) -> bytes:
    """AMD writes the bytes themselves; others put them into an octet string, as DER wants it."""
    value = values.get(CHIP_ID, b"")
    if len(value) in (0, size):
        return value
    content = _content(values, CHIP_ID, _OCTETS)
    if len(content) != size:
        raise _malformed(CHIP_ID, f"{size} B", f"{len(content)} B")
    return content


def _number(values: Mapping[str, bytes], arc: str) -> int:
    content = _content(values, arc, _INTEGER)
    number = int.from_bytes(content, "big", signed=True)
    if not 0 <= number <= 0xFF or len(content) > 2:
        raise _malformed(arc, "0 to 255", content.hex()[:80])
    return number


def _text(values: Mapping[str, bytes], arc: str) -> str:
    content = _content(values, arc, _IA5)
    if any(not 0x20 <= byte < 0x7F for byte in content):
        raise _malformed(arc, "printable text", content.hex()[:80])
    return content.decode("ascii")


def _content(values: Mapping[str, bytes], arc: str, tag: int) -> bytes:
    """The content of one short DER element that isn't empty."""
    value = values.get(arc, b"")
    if len(value) < 3 or value[0] != tag or value[1] >= 0x80 or value[1] != len(value) - 2:
        raise _malformed(arc, "present and of AMD's type", value.hex()[:80] or "absent")
    return value[2:]


def _malformed(arc: str, expected: str, actual: str) -> EvidenceError:
    return EvidenceError(
        "an extension of the VCEK or VLEK is malformed",
        code="evidence.snp-vek",
        claim=f"extension {ARC}{arc}",
        expected=expected,
        actual=actual,
    )
