"""Fixed layouts: what the parsers of vendors' binary formats have in common."""

from __future__ import annotations

from cloister.errors import EvidenceError


def u16(data: bytes, offset: int) -> int:
    """16 bits, little-endian."""
    return int.from_bytes(data[offset : offset + 2], "little")


def u32(data: bytes, offset: int) -> int:
    """32 bits, little-endian."""
    return int.from_bytes(data[offset : offset + 4], "little")


def require_size(claim: str, data: bytes, size: int) -> None:
    """Raise `EvidenceError` unless ``data`` has exactly ``size`` bytes."""
    if len(data) != size:
        raise length_error(claim, f"{size} B", len(data))


def require_zero(what: str, data: bytes, start: int, end: int) -> None:
    """Raise `EvidenceError` unless the reserved bytes from ``start`` to before ``end`` are zero."""
    if any(data[start:end]):
        raise EvidenceError(
            f"a reserved range of {what} is not zero",
            claim=f"reserved bytes {start} to {end - 1}",
            expected="zero",
            actual=data[start:end].hex(),
        )


def length_error(claim: str, expected: str, actual: int) -> EvidenceError:
    """The error of a part with ``actual`` bytes."""
    return EvidenceError(f"{claim} has a wrong length", claim=claim, expected=expected, actual=f"{actual} B")
