"""The fields of an appraisal policy: the values that they take, and how those are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Protocol

from cloister.core.evidence.pem import to_pem
from cloister.core.evidence.snp import PRODUCTS
from cloister.core.verifier.anchors import MAX_SIMULATED_ROOTS, TrustAnchors, split_certificates
from cloister.core.verifier.certificates import read_pem
from cloister.core.verifier.documents import STATUSES
from cloister.errors import EvidenceError, UsageError

MAX_VALUES: Final = 256  # entries of one set
SECONDS_PER_YEAR: Final = 366 * 86400

_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})+", re.ASCII)
_U8, _U16, _U32, _U64 = 0xFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


class Form(Protocol):
    """One kind of field. ``name`` is the field's, for errors; all raise UsageError with ``policy.<name>``."""

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that the field can't have."""

    def read(self, name: str, value: Any) -> Any:
        """A field's value from TOML, or from plain data."""

    def plain(self, value: Any) -> Any:
        """Plain data for `cloister.core.encoding`."""

    def text(self, value: Any) -> str:
        """A TOML value."""


@dataclass(frozen=True, slots=True)
class Octets:
    """``size`` bytes, in hex; empty where the policy doesn't have the field."""

    size: int

    def check(self, name: str, value: Any) -> None:
        """Exactly that many bytes."""
        if type(value) is not bytes or len(value) != self.size:
            raise invalid(name, f"{self.size} B ({2 * self.size} hex digits)", _shown(value))

    def read(self, name: str, value: Any) -> bytes:
        """From hex, or bytes as they are."""
        return _octets(name, value, self.size)

    def plain(self, value: bytes) -> bytes:
        """The bytes."""
        return value

    def text(self, value: bytes) -> str:
        """In hex."""
        return f'"{value.hex()}"'


@dataclass(frozen=True, slots=True)
class OctetSet:
    """A set of byte strings of one size, in hex."""

    size: int

    def check(self, name: str, value: Any) -> None:
        """A set of at most `MAX_VALUES`."""
        _check_set(name, value)
        for each in value:
            if type(each) is not bytes or len(each) != self.size:
                raise invalid(name, f"{self.size} B ({2 * self.size} hex digits) each", _shown(each))

    def read(self, name: str, value: Any) -> frozenset[bytes]:
        """From a list of hex, or of bytes, each once."""
        return _set(name, [_octets(name, each, self.size) for each in _list(name, value)])

    def plain(self, value: frozenset[bytes]) -> list[bytes]:
        """Sorted."""
        return sorted(value)

    def text(self, value: frozenset[bytes]) -> str:
        """A list of hex."""
        return "[" + ", ".join(f'"{each.hex()}"' for each in sorted(value)) + "]"


@dataclass(frozen=True, slots=True)
class Names:
    """A set of names: of ``allowed`` alone, or of any that match ``pattern``."""

    allowed: frozenset[str] = frozenset()
    pattern: str = ""

    def check(self, name: str, value: Any) -> None:
        """A set of at most `MAX_VALUES` such names."""
        _check_set(name, value)
        for each in value:
            known = each in self.allowed if self.allowed else type(each) is str and self._matches(each)
            if not known:
                raise invalid(name, sorted(self.allowed) or "names", _shown(each))

    def read(self, name: str, value: Any) -> frozenset[str]:
        """From a list of text, each once."""
        names = _list(name, value)
        if any(type(each) is not str for each in names):
            raise invalid(name, "a list of text", "another type")
        return _set(name, names)

    def plain(self, value: frozenset[str]) -> list[str]:
        """Sorted."""
        return sorted(value)

    def text(self, value: frozenset[str]) -> str:
        """A list of text."""
        return "[" + ", ".join(f'"{each}"' for each in sorted(value)) + "]"

    def _matches(self, text: str) -> bool:
        return re.fullmatch(self.pattern, text, re.ASCII) is not None


@dataclass(frozen=True, slots=True)
class Number:
    """A whole number from ``least`` to ``most``."""

    least: int
    most: int

    def check(self, name: str, value: Any) -> None:
        """In range, and no bool."""
        if type(value) is not int or not self.least <= value <= self.most:
            raise invalid(name, f"{self.least} to {self.most}", _shown(value))

    def read(self, name: str, value: Any) -> Any:
        """As it is."""
        return value

    def plain(self, value: int) -> int:
        """As it is."""
        return value

    def text(self, value: int) -> str:
        """In decimal."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""

    def check(self, name: str, value: Any) -> None:
        """Nothing but a bool."""
        if type(value) is not bool:
            raise invalid(name, "true or false", _shown(value))

    def read(self, name: str, value: Any) -> Any:
        """As it is."""
        return value

    def plain(self, value: bool) -> bool:  # the value itself
        """As it is."""
        return value

    def text(self, value: bool) -> str:  # the value itself
        """As TOML spells it."""
        return "true" if value else "false"


@dataclass(frozen=True, slots=True)
class Roots:
    """A simulated platform's roots: PEM, or DER one after the other; None for the vendors'."""

    def check(self, name: str, value: Any) -> None:
        """Roots that `TrustAnchors.simulated` takes."""
        if value is not None:
            if type(value) is not bytes:
                raise invalid(name, "DER bytes", "another type")
            TrustAnchors.simulated(value)

    def read(self, name: str, value: Any) -> Any:
        """From PEM; plain data as it is."""
        if type(value) is not str:
            return value
        try:
            return b"".join(read_pem(value.encode(), most=MAX_SIMULATED_ROOTS))
        except (EvidenceError, UnicodeError) as error:
            expected = f"1 to {MAX_SIMULATED_ROOTS} certificates in PEM"
            raise invalid(name, expected, "other text") from error

    def plain(self, value: bytes | None) -> bytes | None:
        """As it is."""
        return value

    def text(self, value: bytes) -> str:
        """In PEM."""
        return '"""\n' + "".join(map(to_pem, split_certificates(value))) + '"""'


FORMS: Final[Mapping[str, Form]] = MappingProxyType(
    {
        # of every policy
        "max_age": Number(1, SECONDS_PER_YEAR),
        "any_platform": Flag(),
        "dangerous_simulated_roots": Roots(),
        # DCAP: SGX and TDX
        "allowed_tcb": Names(allowed=STATUSES - {"Revoked"}),
        "denied_advisories": Names(pattern="[A-Za-z0-9-]{1,64}"),
        "min_tcb_evaluation": Number(0, _U32),
        "platforms": OctetSet(6),
        # SGX
        "mr_enclave": OctetSet(32),
        "attributes": Octets(16),
        "attributes_mask": Octets(16),
        "mr_signer": OctetSet(32),
        "isv_prod_id": Number(0, _U16),
        "min_isv_svn": Number(0, _U16),
        # TDX
        "mr_td": OctetSet(48),
        "rtmr0": OctetSet(48),
        "rtmr1": OctetSet(48),
        "rtmr2": OctetSet(48),
        "rtmr3": OctetSet(48),
        "mr_config_id": OctetSet(48),
        "mr_owner": OctetSet(48),
        "mr_owner_config": OctetSet(48),
        "mr_seam": OctetSet(48),
        "mr_service_td": OctetSet(48),
        "td_attributes": Octets(8),
        "td_attributes_mask": Octets(8),
        "xfam": Octets(8),
        "xfam_mask": Octets(8),
        "min_tee_tcb_svn": Octets(16),
        # SEV-SNP
        "measurement": OctetSet(48),
        "guest_policy": Number(0, _U64),
        "guest_policy_mask": Number(0, _U64),
        "platform_info": Number(0, _U64),
        "platform_info_mask": Number(0, _U64),
        "max_vmpl": Number(0, 3),
        "min_guest_svn": Number(0, _U32),
        "host_data": OctetSet(32),
        "family_id": OctetSet(16),
        "image_id": OctetSet(16),
        "id_key_digest": OctetSet(48),
        "author_key_digest": OctetSet(48),
        "products": Names(allowed=frozenset(PRODUCTS)),
        "chip_ids": OctetSet(64),
        "min_bootloader": Number(0, _U8),
        "min_tee": Number(0, _U8),
        "min_snp": Number(0, _U8),
        "min_microcode": Number(0, _U8),
        "min_fmc": Number(0, _U8),
        "any_tcb": Flag(),
        "allow_vlek": Flag(),
        "allow_missing_crl": Flag(),
        # Nitro
        **{f"pcr{index}": OctetSet(48) for index in (0, 1, 2, 3, 4, 8)},
    }
)


def invalid(name: str, expected: object, actual: object) -> UsageError:
    """The error of a field that has another value than it can have."""
    return UsageError(
        f"{name} of the appraisal policy is invalid",
        code=f"policy.{name}",
        claim=name,
        expected=expected,
        actual=actual,
    )


def _check_set(name: str, value: Any) -> None:
    if type(value) is not frozenset or len(value) > MAX_VALUES:
        raise invalid(name, f"a set of at most {MAX_VALUES}", type(value).__name__)


def _list(name: str, value: Any) -> list[Any]:
    if type(value) is not list or len(value) > MAX_VALUES:
        raise invalid(name, f"a list of at most {MAX_VALUES}", type(value).__name__)
    return value


def _set(name: str, values: list[Any]) -> frozenset[Any]:
    found = frozenset(values)
    if len(found) != len(values):
        raise invalid(name, "each value once", "a value occurs twice")
    return found


def _octets(name: str, value: Any, size: int) -> bytes:
    if type(value) is bytes:
        return value
    if type(value) is not str or not _HEX.fullmatch(value):
        raise invalid(name, f"{2 * size} hex digits", _shown(value))
    if len(value) != 2 * size:
        raise invalid(name, f"{2 * size} hex digits", f"{len(value)} characters: {value[:80]}")
    return bytes.fromhex(value)


def _shown(value: object) -> str:
    return repr(value)[:80]
