"""Kinds of claims (`cloister.core.verifier.kinds`) that only one family of TEEs has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloister.core.evidence.snp import tcb_layout
from cloister.core.verifier.forms import invalid
from cloister.core.verifier.kinds import Checks, listed, not_subset, plain, require_within
from cloister.core.verifier.result import DcapPlatform, SnpPlatform, VerifiedEvidence

if TYPE_CHECKING:
    from cloister.core.verifier.policy import AppraisalPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """None of the advisories that apply is one that the policy denies."""

    field: str = "denied_advisories"

    @property
    def fields(self) -> tuple[str, ...]:
        """The denied ones."""
        return (self.field,)

    def check(self, policy: AppraisalPolicy) -> None:
        """Any set will do."""

    def appraise(self, checks: Checks, policy: AppraisalPolicy, verified: VerifiedEvidence) -> None:
        """Does none apply."""
        denied = {name.casefold() for name in policy.denied_advisories}
        found = sorted(name for name in verified.advisories if name.casefold() in denied)
        applying = ", ".join(verified.advisories)
        detail = f"none that is denied; what applies: {applying}" if applying else "none applies"
        checks.require("advisories", not found, "none that is denied", ", ".join(found), detail=detail)

    def compare(self, broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
        """Does the narrower policy deny at least the same."""
        require_within(self.field, narrower.denied_advisories, broader.denied_advisories)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTd:
    """No service TD is bound to the TD (MRSERVICETD is zero), or it is one that the policy lists."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Service TDs that may be bound."""
        return ("mr_service_td",)

    def check(self, policy: AppraisalPolicy) -> None:
        """Any set will do."""

    def appraise(self, checks: Checks, policy: AppraisalPolicy, verified: VerifiedEvidence) -> None:
        """Is there none, or a listed one; TD 1.0 reports have no such field."""
        found = verified.measurements.get("mr_service_td", bytes(48))
        accepted = found == bytes(48) or found in policy.mr_service_td
        checks.require("mr_service_td", accepted, listed({bytes(48), *policy.mr_service_td}), plain(found))

    def compare(self, broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
        """Is the narrower set within the broader one."""
        require_within("mr_service_td", broader.mr_service_td, narrower.mr_service_td)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpTcb:
    """Each part of a SEV-SNP platform's TCB is at least the policy's; a policy names some, or ``any_tcb``.

    That goes for the reported TCB, for the one that launched the guest, and for the one that the platform
    can't go back behind: firmware that was updated under a running guest doesn't mend how it was launched.
    """

    PARTS = ("bootloader", "tee", "snp", "microcode", "fmc")

    @property
    def fields(self) -> tuple[str, ...]:
        """The least versions, and the flag."""
        return (*(f"min_{part}" for part in self.PARTS), "any_tcb")

    def check(self, policy: AppraisalPolicy) -> None:
        """Minimums or the flag, not both."""
        if policy.any_tcb == any(self._least(policy).values()):
            raise invalid("min_snp", "minimum TCB parts, or any_tcb = true, not both", self._least(policy))

    def appraise(self, checks: Checks, policy: AppraisalPolicy, verified: VerifiedEvidence) -> None:
        """Does no part lie below; a part that the processor lacks counts as 0."""
        if policy.any_tcb:
            checks.note("tcb", f"any: {_parts(snp_platform(verified).tcb)}")
            return
        least, layout = self._least(policy), tcb_layout(snp_platform(verified).product)
        for name in ("reported", "launch", "committed"):
            raw = verified.measurements.get(f"{name}_tcb")
            octets = raw if isinstance(raw, bytes) else b""
            found = {part: octets[index] for part, index in layout.items() if index < len(octets)}
            reached = all(found.get(part, 0) >= need for part, need in least.items())
            claim = "tcb" if name == "reported" else f"{name} tcb"
            checks.require(claim, reached, f"at least {_parts(least)}", _parts(found) or "none")

    def compare(self, broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
        """Does none of the narrower policy's lie below."""
        least, found = self._least(broader), self._least(narrower)
        if any(found[part] < need for part, need in least.items()):
            raise not_subset("tcb", f"at least {_parts(least)}", _parts(found))

    def _least(self, policy: AppraisalPolicy) -> dict[str, int]:
        return {part: getattr(policy, f"min_{part}") for part in self.PARTS}


def dcap_platform(verified: VerifiedEvidence) -> DcapPlatform:
    """The platform of SGX or TDX evidence."""
    assert isinstance(verified.platform, DcapPlatform)  # what verifies quotes makes no other
    return verified.platform


def snp_platform(verified: VerifiedEvidence) -> SnpPlatform:
    """The platform of SEV-SNP evidence."""
    assert isinstance(verified.platform, SnpPlatform)  # what verifies reports makes no other
    return verified.platform


def _parts(tcb: Mapping[str, int]) -> str:
    return ", ".join(f"{part} {number}" for part, number in tcb.items())
