"""Appraisal: does verified evidence meet a policy, claim by claim."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cloister.core.verifier.chain import time_text
from cloister.core.verifier.policy import SGX_ATTRIBUTES_MASK, SGX_DEBUG, AppraisalPolicy
from cloister.core.verifier.result import Step, VerifiedEvidence
from cloister.errors import AppraisalRefused

__all__ = ["SGX_ATTRIBUTES_MASK", "AppraisalPolicy", "AppraisalResult", "appraise"]


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


def appraise(verified: VerifiedEvidence, policy: AppraisalPolicy, *, now: int) -> AppraisalResult:
    """Accept verified evidence under ``policy``, or say which claim forbids it.

    Args:
        verified: From `cloister.core.verifier.verify`, under ``policy.anchors``.
        policy: Reference values and limits; an empty one refuses everything.
        now: Unix seconds.

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
    checks = _Checks()
    checks.equal("simulated", policy.anchors.is_simulated, verified.simulated)
    checks.equal("trust anchors", policy.anchors.digest.hex(), verified.anchors_digest.hex())
    checks.equal("tee", policy.tee, verified.tee)
    _appraise_enclave(checks, verified, policy)
    _appraise_platform(checks, verified, policy)
    checks.require(
        "expired", now <= verified.not_after, f"until {time_text(verified.not_after)}", time_text(now)
    )
    age = now - verified.collateral_issued
    checks.require("max age", 0 <= age <= policy.max_age, f"0 to {policy.max_age} s", f"{age} s")
    return AppraisalResult(
        evidence=verified,
        policy_digest=policy.digest,
        not_after=min(verified.not_after, verified.collateral_issued + policy.max_age),
        steps=tuple(checks.steps),
    )


def _appraise_enclave(checks: _Checks, verified: VerifiedEvidence, policy: AppraisalPolicy) -> None:
    found = verified.measurements
    attributes = _octets(found.get("attributes"), 16)
    debug = verified.debug or bool(attributes[0] & SGX_DEBUG)
    checks.equal("debug", False, debug)
    checks.member("mr_enclave", policy.mr_enclave, _octets(found.get("mr_enclave"), 32))
    checks.equal("attributes", policy.attributes.hex(), _masked(attributes, policy.attributes_mask).hex())
    if policy.mr_signer:
        checks.member("mr_signer", policy.mr_signer, _octets(found.get("mr_signer"), 32))
    else:
        checks.note("mr_signer", "any: the measurement identifies the code")
    checks.equal("isv_prod_id", policy.isv_prod_id, found.get("isv_prod_id"))
    svn = found.get("isv_svn")
    checks.require(
        "isv_svn", type(svn) is int and svn >= policy.min_isv_svn, f"at least {policy.min_isv_svn}", str(svn)
    )


def _appraise_platform(checks: _Checks, verified: VerifiedEvidence, policy: AppraisalPolicy) -> None:
    checks.member("tcb status", policy.allowed_tcb, verified.tcb_status)
    denied = sorted(policy.denied_advisories.intersection(verified.advisories))
    checks.require("advisories", not denied, "none that is denied", ", ".join(denied) or "none")
    number = verified.tcb_evaluation_number
    checks.require(
        "tcb evaluation",
        number >= policy.min_tcb_evaluation,
        f"at least {policy.min_tcb_evaluation}",
        str(number),
    )
    if policy.any_platform:
        checks.note("platform", f"any: {verified.platform.fmspc.hex()}")
    else:
        checks.member("platform", policy.platforms, verified.platform.fmspc)


class _Checks:
    """Comparisons in order: each becomes a step or a refusal."""

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def require(self, claim: str, accepted: bool, expected: object, actual: object) -> None:
        if not accepted:
            raise AppraisalRefused(
                code=f"appraisal.{claim.replace(' ', '-')}",
                claim=claim,
                expected=expected,
                actual=actual,
            )
        self.steps.append(Step(name=claim, outcome="ok", detail=str(actual)))

    def equal(self, claim: str, expected: object, actual: object) -> None:
        self.require(claim, type(expected) is type(actual) and expected == actual, expected, actual)

    def member(self, claim: str, expected: frozenset[Any], actual: bytes | str) -> None:
        self.require(claim, actual in expected, _listed(expected), _plain(actual))

    def note(self, claim: str, detail: str) -> None:
        self.steps.append(Step(name=claim, outcome="note", detail=detail))


def _octets(value: object, size: int) -> bytes:
    """A measurement, or bytes that equal none where a verifier for another TEE left it out."""
    return value if isinstance(value, bytes) and len(value) == size else b"\xff" * (size + 1)


def _masked(value: bytes, mask: bytes) -> bytes:
    return bytes(left & right for left, right in zip(value, mask, strict=False))


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted(_plain(value) for value in values))


def _plain(value: bytes | str) -> str:
    return value.hex() if isinstance(value, bytes) else value
