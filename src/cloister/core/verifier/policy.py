"""The appraisal policy: reference values and limits that verified evidence must meet (RFC 9334).

People write it in TOML; peers exchange it as deterministic CBOR, whose digest names it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Final

from cloister.core import encoding
from cloister.core.verifier.anchors import MAX_SIMULATED_ROOTS, TrustAnchors, split_certificates
from cloister.core.verifier.chain import read_pem, to_pem
from cloister.core.verifier.documents import STATUSES
from cloister.core.verifier.subset import require_subset
from cloister.errors import EvidenceError, UsageError

MAX_POLICY: Final = 64 << 10  # characters of TOML, bytes of CBOR
MAX_VALUES: Final = 256  # entries of one set
DEFAULT_MAX_AGE: Final = 31 * 86400  # seconds; Intel's collateral is in force for 30 days

SGX_DEBUG: Final = 0x02  # bit 1 of the first byte of ATTRIBUTES
SGX_ATTRIBUTES_MASK: Final = bytes.fromhex("ff" * 8 + "00" * 8)  # every flag, no XFRM bit

_KIND: Final = "cloister/v1/appraisal-policy"
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})+", re.ASCII)
_ADVISORY: Final = re.compile(r"[A-Za-z0-9-]{1,64}", re.ASCII)
_U16: Final = 0xFFFF
_U32: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class AppraisalPolicy:
    """What evidence must say to be accepted; ``AppraisalPolicy()`` is empty and refuses everything.

    Attributes:
        tee: ``"sgx"``.
        mr_enclave: Accepted measurements, 32 B each; at least one.
        attributes: 16 B that ATTRIBUTES must equal where ``attributes_mask`` has a bit; never DEBUG.
        attributes_mask: 16 B; covers DEBUG.
        mr_signer: Accepted signers, 32 B each; empty: ``mr_enclave`` alone identifies the code.
        isv_prod_id: The product id, exactly.
        min_isv_svn: Least security version of the enclave.
        allowed_tcb: Accepted TCB statuses; at least one, never ``"Revoked"``.
        denied_advisories: Advisories that must not apply.
        min_tcb_evaluation: Least TCB evaluation data number.
        platforms: Accepted platform families (FMSPC, 6 B each); none where ``any_platform`` is set.
        any_platform: Accept every platform family.
        max_age: Oldest accepted TCB info, QE identity or PCK CRL, in seconds.
        dangerous_simulated_roots: A simulated platform's roots (see `TrustAnchors.simulated`), then the only
            ones accepted.
            ``None``, the strict value, accepts the vendors' roots only.

    Raises:
        UsageError: code ``policy.<field>``, for a value that is missing, malformed or contradictory.
    """

    tee: str = ""
    mr_enclave: frozenset[bytes] = frozenset()
    attributes: bytes = b""
    attributes_mask: bytes = b""
    mr_signer: frozenset[bytes] = frozenset()
    isv_prod_id: int = 0
    min_isv_svn: int = 0
    allowed_tcb: frozenset[str] = frozenset()
    denied_advisories: frozenset[str] = frozenset()
    min_tcb_evaluation: int = 0
    platforms: frozenset[bytes] = frozenset()
    any_platform: bool = False
    max_age: int = DEFAULT_MAX_AGE
    dangerous_simulated_roots: bytes | None = None

    def __post_init__(self) -> None:
        if not self.is_empty:
            _check(self)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was stated at all."""
        return all(getattr(self, field.name) == field.default for field in fields(self))

    @property
    def anchors(self) -> TrustAnchors:
        """What evidence must be verified under: the vendors' roots or the one simulated root."""
        if self.dangerous_simulated_roots is None:
            return TrustAnchors.vendor()
        return TrustAnchors.simulated(self.dangerous_simulated_roots)

    @property
    def digest(self) -> bytes:
        """SHA-256 (32 B) of the deterministic encoding of `to_data`: the policy's name."""
        return _digest(self)

    def admits(self, narrower: AppraisalPolicy) -> None:
        """Check, claim by claim, that this policy admits everything that ``narrower`` admits.

        Raises:
            AppraisalRefused: code ``appraisal.not-subset``, naming the claim.
        """
        require_subset(self, narrower)

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`: every field, sets as sorted lists.

        Raises:
            UsageError: the policy is empty.
        """
        if self.is_empty:
            raise _empty()
        data: dict[str, Any] = {"kind": _KIND}
        for field in fields(self):
            value = getattr(self, field.name)
            data[field.name] = sorted(value) if isinstance(value, frozenset) else value
        return data

    @classmethod
    def from_data(cls, data: Any) -> AppraisalPolicy:
        """Read exactly what `to_data` gave, so that one policy has one encoding.

        Raises:
            UsageError: any other data.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names | {"kind"} or data["kind"] != _KIND:
            raise UsageError("this is no appraisal policy", code="policy.format", expected=_KIND)
        values: dict[str, Any] = {}
        for name in names:
            value = data[name]
            if name in _SETS:
                value = _set(name, value)
                if sorted(value) != data[name]:
                    raise _invalid(name, "sorted", "another order")
            values[name] = value
        policy = cls(**values)
        if policy.is_empty:
            raise _empty()
        return policy

    @classmethod
    def from_toml(cls, text: str) -> AppraisalPolicy:
        """Read a policy file: bytes in hex, the simulated root in PEM.

        Raises:
            UsageError: not TOML, an unknown key, a wrong type, a missing or contradictory value, or empty.
        """
        if len(text) > MAX_POLICY:
            raise UsageError(
                "the policy is too long", code="policy.format", expected=MAX_POLICY, actual=len(text)
            )
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the policy is not TOML: {error}"[:200], code="policy.format") from error
        return cls.from_table(table)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> AppraisalPolicy:
        """Read a policy that is a table of a larger TOML file; as `from_toml`.

        Raises:
            UsageError: an unknown key, a wrong type, a missing or contradictory value, or empty.
        """
        if not table:
            raise _empty()
        known = {field.name for field in fields(cls)}
        for name in table:
            if name not in known:
                raise UsageError(
                    "unknown key in the policy",
                    code="policy.unknown-key",
                    expected=sorted(known),
                    actual=name[:64],
                )
        policy = cls(**{name: _from_text(name, value) for name, value in table.items()})
        if policy.is_empty:
            raise _empty()
        return policy

    def to_toml(self) -> str:
        """The form that `from_toml` reads, with every field that has a value.

        Raises:
            UsageError: the policy is empty.
        """
        if self.is_empty:
            raise _empty()
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and field.name != "dangerous_simulated_roots":
                lines.append(f"{field.name} = {_to_text(value)}")
        if self.dangerous_simulated_roots is not None:
            pem = "".join(map(to_pem, split_certificates(self.dangerous_simulated_roots)))
            lines.append(f'dangerous_simulated_roots = """\n{pem}"""')
        return "\n".join(lines) + "\n"


_BYTE_SETS: Final = {"mr_enclave": 32, "mr_signer": 32, "platforms": 6}
_SETS: Final = frozenset({*_BYTE_SETS, "allowed_tcb", "denied_advisories"})
_INTEGERS: Final = {
    "isv_prod_id": (0, _U16),
    "min_isv_svn": (0, _U16),
    "min_tcb_evaluation": (0, _U32),
    "max_age": (1, 366 * 86400),
}


@lru_cache(maxsize=64)
def _digest(policy: AppraisalPolicy) -> bytes:
    return encoding.digest(policy.to_data())


def _check(policy: AppraisalPolicy) -> None:
    if policy.tee != "sgx":
        raise _invalid("tee", "sgx", repr(policy.tee)[:40])
    for name, (least, most) in _INTEGERS.items():
        number = getattr(policy, name)
        if type(number) is not int or not least <= number <= most:
            raise _invalid(name, f"{least} to {most}", repr(number)[:40])
    if type(policy.any_platform) is not bool:
        raise _invalid("any_platform", "true or false", repr(policy.any_platform)[:40])
    _check_sets(policy)
    _check_attributes(policy)
    if policy.any_platform == bool(policy.platforms):
        raise _invalid("platforms", "platforms, or any_platform = true, not both", len(policy.platforms))
    if policy.dangerous_simulated_roots is not None:
        if type(policy.dangerous_simulated_roots) is not bytes:
            raise _invalid("dangerous_simulated_roots", "DER bytes", "another type")
        TrustAnchors.simulated(policy.dangerous_simulated_roots)


def _check_sets(policy: AppraisalPolicy) -> None:
    for name in sorted(_SETS):
        values = getattr(policy, name)
        if type(values) is not frozenset or len(values) > MAX_VALUES:
            raise _invalid(name, f"a set of at most {MAX_VALUES}", type(values).__name__)
        size = _BYTE_SETS.get(name)
        for value in values:
            if size is not None and (type(value) is not bytes or len(value) != size):
                raise _invalid(name, f"{size} B each", repr(value)[:80])
    for status in policy.allowed_tcb:
        if status not in STATUSES or status == "Revoked":
            raise _invalid("allowed_tcb", sorted(STATUSES - {"Revoked"}), repr(status)[:80])
    for advisory in policy.denied_advisories:
        if type(advisory) is not str or not _ADVISORY.fullmatch(advisory):
            raise _invalid("denied_advisories", "advisory names", repr(advisory)[:80])
    for name in ("mr_enclave", "allowed_tcb"):
        if not getattr(policy, name):
            raise _invalid(name, "at least one", "none")


def _check_attributes(policy: AppraisalPolicy) -> None:
    for name in ("attributes", "attributes_mask"):
        value = getattr(policy, name)
        if type(value) is not bytes or len(value) != 16:
            raise _invalid(name, "16 B", repr(value)[:80])
    if not policy.attributes_mask[0] & SGX_DEBUG:
        raise _invalid("attributes_mask", "a mask that covers DEBUG (bit 1)", policy.attributes_mask.hex())
    if policy.attributes[0] & SGX_DEBUG:
        raise _invalid("attributes", "no DEBUG (bit 1)", policy.attributes.hex())
    if any(value & ~mask for value, mask in zip(policy.attributes, policy.attributes_mask, strict=True)):
        raise _invalid("attributes", "only bits of attributes_mask", policy.attributes.hex())


def _set(name: str, value: Any) -> frozenset[Any]:
    if type(value) is not list or len(value) > MAX_VALUES:
        raise _invalid(name, f"a list of at most {MAX_VALUES}", type(value).__name__)
    kind = bytes if name in _BYTE_SETS else str
    if any(type(entry) is not kind for entry in value):
        raise _invalid(name, f"a list of {kind.__name__}", "another type")
    values = frozenset(value)
    if len(values) != len(value):
        raise _invalid(name, "each value once", "a value occurs twice")
    return values


def _from_text(name: str, value: Any) -> Any:
    """One TOML value as the field's own type; what is left to check, the constructor checks."""
    if name == "dangerous_simulated_roots":
        return _roots(value)
    if name in _BYTE_SETS:
        if type(value) is not list or len(value) > MAX_VALUES:
            raise _invalid(name, f"a list of at most {MAX_VALUES}", type(value).__name__)
        return _set(name, [_octets(name, entry) for entry in value])
    if name in _SETS:
        return _set(name, value)
    if name in ("attributes", "attributes_mask"):
        return _octets(name, value)
    return value


def _octets(name: str, value: Any) -> bytes:
    if type(value) is not str or not _HEX.fullmatch(value):
        raise _invalid(name, "hex", repr(value)[:80])
    return bytes.fromhex(value)


def _roots(value: Any) -> bytes:
    try:
        return b"".join(read_pem(value.encode(), most=MAX_SIMULATED_ROOTS))
    except (EvidenceError, UnicodeError, AttributeError) as error:
        raise _invalid(
            "dangerous_simulated_roots", f"1 to {MAX_SIMULATED_ROOTS} certificates in PEM", "other text"
        ) from error


def _to_text(value: Any) -> str:
    if type(value) is bool:
        return "true" if value else "false"
    if isinstance(value, frozenset):
        return "[" + ", ".join(_to_text(entry) for entry in sorted(value)) + "]"
    if isinstance(value, bytes):
        return f'"{value.hex()}"'
    return f'"{value}"' if isinstance(value, str) else str(value)


def _invalid(name: str, expected: object, actual: object) -> UsageError:
    return UsageError(
        f"{name} of the appraisal policy is invalid",
        code=f"policy.{name}",
        claim=name,
        expected=expected,
        actual=actual,
    )


def _empty() -> UsageError:
    return UsageError("the appraisal policy is empty: it would refuse everything", code="policy.empty")
