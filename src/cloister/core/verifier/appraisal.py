"""Appraisal: does verified evidence meet a policy, claim by claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from cloister.core.times import time_text
from cloister.core.verifier.claims import CLAIMS, Checks
from cloister.core.verifier.policy import AllOf, AnyOf, AppraisalPolicy
from cloister.core.verifier.result import MAX_AHEAD, Step, VerifiedEvidence
from cloister.errors import AppraisalRefused

__all__ = ["SGX_ATTRIBUTES_MASK", "AllOf", "AnyOf", "AppraisalPolicy", "AppraisalResult", "appraise"]

# All of SGX ATTRIBUTES' flags count (Intel SDM, volume 3D, section 35.7.1); XFRM depends on the processor, so
# it is left open. DEBUG is refused whatever a policy says.
SGX_ATTRIBUTES_MASK: Final = bytes.fromhex("ff" * 8 + "00" * 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppraisalResult:
    """Accepted evidence.

    Attributes:
        evidence: What was accepted.
        policy_digest: 32 B name of the policy that accepted it.
        not_after: Unix seconds; from then on the evidence has to be appraised anew.
        steps: Every comparison made, in order.
    """

    evidence: VerifiedEvidence
    policy_digest: bytes
    not_after: int
    steps: tuple[Step, ...]

    def to_dict(self) -> dict[str, Any]:
        """The form that ``--json`` prints."""
        return {
            "policy": self.policy_digest.hex(),
            "not_after": self.not_after,
            "steps": [step.to_dict() for step in self.steps],
            "evidence": self.evidence.to_dict(),
        }

    def lines(self) -> list[str]:
        """The result for people: verification, then appraisal."""
        head = f"accepted under policy {self.policy_digest.hex()[:16]}"
        return [*self.evidence.lines(), head, *(f"  {step.line()}" for step in self.steps)]


def appraise(
    verified: VerifiedEvidence, policy: AppraisalPolicy, *, now: int, steps: list[Step] | None = None
) -> AppraisalResult:
    """Accept verified evidence under ``policy``, or say which claim forbids it.

    Args:
        verified: From `cloister.core.verifier.verify`, under ``policy.anchors``.
        policy: Reference values and limits; an empty one refuses everything.
        now: Unix seconds.
        steps: Gets every comparison as it is passed, so that a refusal shows how far it came.

    Raises:
        AppraisalRefused: code ``appraisal.<claim>``; simulation is looked at before anything else.
    """
    if policy.is_empty:
        raise AppraisalRefused(
            "an empty policy refuses everything",
            code="appraisal.empty-policy",
            claim="policy",
            expected="reference values",
            actual="none",
        )
    steps = [] if steps is None else steps
    before = len(steps)
    checks = Checks(steps)
    checks.equal("simulated", policy.anchors.is_simulated, verified.simulated)
    checks.equal("trust anchors", policy.anchors.digest.hex(), verified.anchors_digest.hex())
    not_after = _appraise(verified, policy, now, steps)
    return AppraisalResult(
        evidence=verified,
        policy_digest=policy.digest,
        not_after=not_after,
        steps=tuple(steps[before:]),
    )


def _appraise(verified: VerifiedEvidence, policy: AppraisalPolicy, now: int, steps: list[Step]) -> int:
    """Take the steps of one policy; gives when the evidence has to be appraised anew."""
    if policy.all_of:
        return min([_appraise(verified, member, now, steps) for member in policy.all_of])
    if policy.any_of:
        return _appraise_any(verified, policy.any_of, now, steps)
    checks = Checks(steps)
    checks.equal("tee", policy.tee, verified.tee)
    for claim in CLAIMS[policy.tee]:
        claim.appraise(checks, policy, verified)
    until = time_text(verified.not_after)
    checks.require("expired", now <= verified.not_after, f"until {until}", time_text(now))
    if verified.collateral_issued is None:  # a claim of the TEE's has said whether that may be
        return verified.not_after
    age = now - verified.collateral_issued
    fresh = -MAX_AHEAD <= age <= policy.max_age
    checks.require("max age", fresh, f"at most {policy.max_age} s", f"{age} s")
    return min(verified.not_after, verified.collateral_issued + policy.max_age)


def _appraise_any(
    verified: VerifiedEvidence, members: tuple[AppraisalPolicy, ...], now: int, steps: list[Step]
) -> int:
    refusals: list[AppraisalRefused] = []
    for number, member in enumerate(members, start=1):
        taken: list[Step] = []
        name = f"any_of[{number}]"
        try:
            until = _appraise(verified, member, now, taken)
        except AppraisalRefused as refusal:
            refusals.append(refusal)
            detail = f"refused by {refusal.claim}: expected {refusal.expected}, found {refusal.actual}"
            steps.append(Step(name=name, outcome="note", detail=detail))
            continue
        steps += [Step(name=name, outcome="ok", detail=f"accepted, of {len(members)}"), *taken]
        return until
    raise _by_all(refusals)


def _by_all(refusals: list[AppraisalRefused]) -> AppraisalRefused:
    """The refusal that speaks of the same TEE, for it tells most; its message names each member's claim."""
    telling = next((refusal for refusal in refusals if refusal.claim != "tee"), refusals[0])
    each = ", ".join(f"any_of[{number}] by {one.claim}" for number, one in enumerate(refusals, start=1))
    return AppraisalRefused(
        f"no policy of any_of admits it: {each}; in any_of[{refusals.index(telling) + 1}], {telling.claim}",
        code=telling.code,
        claim=telling.claim,
        expected=telling.expected,
        actual=telling.actual,
    )
