"""Kinds of claims that a policy makes of evidence: how each is checked, and when one policy admits another.

These serve any TEE; those that only one family of TEEs has stand in `cloister.core.verifier.tee_kinds`. Which
claims a policy for a TEE has, `cloister.core.verifier.claims` lists; what their fields look like,
`cloister.core.verifier.forms` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from cloister.core.verifier.forms import invalid
from cloister.core.verifier.result import Step, VerifiedEvidence
from cloister.errors import AppraisalRefused

if TYPE_CHECKING:
    from cloister.core.verifier.policy import AppraisalPolicy

Get = Callable[[VerifiedEvidence], Any]
_ANY: Final = frozenset({"any"})


class Checks:
    """Comparisons in order: each becomes a step, at the end of the caller's list, or a refusal."""

    __slots__ = ("_steps",)

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps

    def require(
        self, claim: str, accepted: bool, expected: object, actual: object, *, detail: str = ""
    ) -> None:
        """Refuse with code ``appraisal.<claim>``, or note what was found."""
        if not accepted:
            raise AppraisalRefused(
                code=f"appraisal.{claim.replace(' ', '-')}", claim=claim, expected=expected, actual=actual
            )
        self._steps.append(Step(name=claim, outcome="ok", detail=detail or str(actual)))

    def equal(self, claim: str, expected: object, actual: object) -> None:
        """`require` that both are the same, of the same type."""
        self.require(claim, type(expected) is type(actual) and expected == actual, expected, actual)

    def note(self, claim: str, detail: str) -> None:
        """Record what is not compared."""
        self._steps.append(Step(name=claim, outcome="note", detail=detail))


class Claim(Protocol):
    """One claim of one TEE.

    Attributes:
        fields: The policy's fields that it goes by.
    """

    @property
    def fields(self) -> tuple[str, ...]:
        """The policy's fields that it goes by."""

    def check(self, policy: AppraisalPolicy) -> None:
        """Refuse a policy that says too little, or contradicts itself; raises UsageError."""

    def appraise(self, checks: Checks, policy: AppraisalPolicy, verified: VerifiedEvidence) -> None:
        """Compare evidence with the policy; raises AppraisalRefused."""

    def compare(self, broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
        """Check that ``broader`` admits what ``narrower`` admits; raises AppraisalRefused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The evidence's value is one of a set. An empty set admits any, unless the claim is ``required``."""

    name: str
    field: str
    get: Get
    required: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The set."""
        return (self.field,)

    def check(self, policy: AppraisalPolicy) -> None:
        """At least one value where it is required."""
        if self.required and not getattr(policy, self.field):
            raise invalid(self.field, "at least one", "none")

    def appraise(self, checks: Checks, policy: AppraisalPolicy, verified: VerifiedEvidence) -> None:
        """Is it in the set."""
        values, found = getattr(policy, self.field), self.get(verified)
        if values:
            checks.require(self.name, found in values, listed(values), plain(found))
        else:
            checks.note(self.name, f"any: {plain(found)}")

    def compare(self, broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
        """Is the narrower set within the broader one."""
        allowed, found = getattr(broader, self.field), getattr(narrower, self.field)
        if allowed:  # where nothing is listed, anything is admitted, which is more than any list
            require_within(self.field, allowed, found or _ANY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """The evidence's bits equal the policy's where its mask has a bit.

    Attributes:
        name: Of the claim, and of the field with the bits; the mask's field is named ``<name>_mask``.
        get: The bits.
        covers: Bits that the mask must have and the value must not, such as DEBUG.
    """

    name: str
    get: Get
    covers: int = 0

    @property
    def fields(self) -> tuple[str, ...]:
        """Value and mask."""
        return (self.name, f"{self.name}_mask")

    def check(self, policy: AppraisalPolicy) -> None:
        """The mask covers what must never vary, and the value has only bits of the mask."""
        value, mask = self._of(policy)
        if mask & self.covers != self.covers:
            raise invalid(f"{self.name}_mask", f"a mask that covers bits {_bits(self.covers)}", hex(mask))
        if value & self.covers:
            raise invalid(self.name, f"bits {_bits(self.covers)} clear", hex(value))
        if value & ~mask:
            raise invalid(self.name, f"only bits of {self.name}_mask", hex(value))

    def appraise(self, checks: Checks, policy: AppraisalPolicy, verified: VerifiedEvidence) -> None:
        """Are the masked bits the same."""
        value, mask = self._of(policy)
        found = number(self.get(verified))
        expected = f"{hex(value)} under mask {hex(mask)}"
        checks.require(self.name, found >= 0 and found & mask == value, expected, hex(found))

    def compare(self, broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
        """Does the narrower policy fix at least the same bits, to the same values."""
        value, mask = self._of(broader)
        theirs, their_mask = self._of(narrower)
        if mask & their_mask != mask or theirs & mask != value:
            raise not_subset(
                self.name,
                f"{hex(value)} under mask {hex(mask)}",
                f"{hex(theirs)} under mask {hex(their_mask)}",
            )

    def _of(self, policy: AppraisalPolicy) -> tuple[int, int]:
        return number(getattr(policy, self.name)), number(getattr(policy, f"{self.name}_mask"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The evidence's number is at least the policy's, or at most where ``upper`` is set."""

    name: str
    field: str
    get: Get
    upper: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The bound."""
        return (self.field,)

    def check(self, policy: AppraisalPolicy) -> None:
        """Any number will do."""

    def appraise(self, checks: Checks, policy: AppraisalPolicy, verified: VerifiedEvidence) -> None:
        """Is it within the bound."""
        limit, found = getattr(policy, self.field), self.get(verified)
        within = type(found) is int and (found <= limit if self.upper else found >= limit)
        checks.require(self.name, within, self._text(limit), str(found))

    def compare(self, broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
        """Is the narrower bound at least as tight."""
        limit, found = getattr(broader, self.field), getattr(narrower, self.field)
        if found > limit if self.upper else found < limit:
            raise not_subset(self.field, self._text(limit), found)

    def _text(self, limit: int) -> str:
        return f"{'at most' if self.upper else 'at least'} {limit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactly:
    """The evidence's number is the policy's."""

    name: str
    get: Get

    @property
    def fields(self) -> tuple[str, ...]:
        """The number."""
        return (self.name,)

    def check(self, policy: AppraisalPolicy) -> None:
        """Any number will do."""

    def appraise(self, checks: Checks, policy: AppraisalPolicy, verified: VerifiedEvidence) -> None:
        """Is it the same."""
        checks.equal(self.name, getattr(policy, self.name), self.get(verified))

    def compare(self, broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
        """Is it the same in both."""
        if getattr(broader, self.name) != getattr(narrower, self.name):
            raise not_subset(self.name, getattr(broader, self.name), getattr(narrower, self.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """Each of the evidence's security versions is at least the policy's."""

    name: str
    field: str
    get: Get

    @property
    def fields(self) -> tuple[str, ...]:
        """The least versions."""
        return (self.field,)

    def check(self, policy: AppraisalPolicy) -> None:
        """Any versions will do."""

    def appraise(self, checks: Checks, policy: AppraisalPolicy, verified: VerifiedEvidence) -> None:
        """Does none lie below."""
        least, found = getattr(policy, self.field), self.get(verified)
        known = type(found) is bytes and len(found) == len(least)
        reached = known and all(have >= need for have, need in zip(found, least, strict=True))
        checks.require(self.name, reached, f"at least {least.hex()}, each", plain(found))

    def compare(self, broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
        """Does none of the narrower policy's lie below."""
        least, found = getattr(broader, self.field), getattr(narrower, self.field)
        if any(have < need for have, need in zip(found, least, strict=True)):
            raise not_subset(self.field, f"at least {least.hex()}, each", found.hex())


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """The evidence's value is one of a set, or the policy says by a flag that any will do; never both."""

    name: str
    field: str
    flag: str
    get: Get

    @property
    def fields(self) -> tuple[str, ...]:
        """Set and flag."""
        return (self.field, self.flag)

    def check(self, policy: AppraisalPolicy) -> None:
        """Exactly one of both is stated."""
        values = getattr(policy, self.field)
        if getattr(policy, self.flag) == bool(values):
            raise invalid(self.field, f"{self.field}, or {self.flag} = true, not both", len(values))

    def appraise(self, checks: Checks, policy: AppraisalPolicy, verified: VerifiedEvidence) -> None:
        """Is it in the set."""
        found = self.get(verified)
        if getattr(policy, self.flag):
            checks.note(self.name, f"any: {plain(found)}")
        else:
            values = getattr(policy, self.field)
            checks.require(self.name, found in values, listed(values), plain(found))

    def compare(self, broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
        """Is the narrower set within the broader one."""
        if not getattr(broader, self.flag):
            require_within(self.field, getattr(broader, self.field), getattr(narrower, self.field) or _ANY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unless:
    """Something must hold, unless the policy's flag lets it go; without a flag it must hold always."""

    name: str
    holds: Callable[[VerifiedEvidence], bool]
    expected: str
    found: Callable[[VerifiedEvidence], str]
    flag: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        """The flag, where there is one."""
        return (self.flag,) if self.flag else ()

    def check(self, policy: AppraisalPolicy) -> None:
        """Either will do."""

    def appraise(self, checks: Checks, policy: AppraisalPolicy, verified: VerifiedEvidence) -> None:
        """Does it hold, or needn't it."""
        if self.flag and getattr(policy, self.flag) and not self.holds(verified):
            checks.note(self.name, f"{self.found(verified)}, which {self.flag} lets pass")
        else:
            checks.require(self.name, self.holds(verified), self.expected, self.found(verified))

    def compare(self, broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
        """Does the narrower policy let nothing more go."""
        if self.flag and getattr(narrower, self.flag) and not getattr(broader, self.flag):
            raise not_subset(self.flag, "false", "true")


def not_subset(claim: str, expected: object, actual: object) -> AppraisalRefused:
    """The error of a policy that admits more than another."""
    return AppraisalRefused(
        f"one policy admits more than the other: {claim}",
        code="appraisal.not-subset",
        claim=claim,
        expected=expected,
        actual=actual,
    )


def require_within(claim: str, allowed: frozenset[Any], found: frozenset[Any]) -> None:
    """Refuse a set that isn't within another; raises AppraisalRefused."""
    if not found <= allowed:
        raise not_subset(claim, listed(allowed) or "none", listed(found - allowed))


def number(value: Any) -> int:
    """Bits as a number: bytes are little-endian, as the vendors lay them out; -1 for what has no bits."""
    if type(value) is bytes:
        return int.from_bytes(value, "little")
    return value if type(value) is int else -1


def _bits(mask: int) -> str:
    return ", ".join(str(bit) for bit in range(mask.bit_length()) if mask >> bit & 1)


def listed(values: Iterable[Any]) -> str:
    """Values as an error shows them."""
    return ", ".join(sorted(plain(value) for value in values))


def plain(value: object) -> str:
    """A value as an error shows it."""
    return value.hex() if isinstance(value, bytes) else str(value)
