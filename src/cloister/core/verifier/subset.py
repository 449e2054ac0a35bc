"""Comparing two appraisal policies: does one admit everything that the other admits.

So a client can accept a pool whose workers it never meets: all that the pool's policy admits, its own
policy admits too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from cloister.errors import AppraisalRefused

if TYPE_CHECKING:
    from cloister.core.verifier.policy import AppraisalPolicy

_ANY: Final = frozenset({"any"})


def require_subset(broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
    """Check, claim by claim, that ``broader`` admits everything that ``narrower`` admits.

    Raises:
        AppraisalRefused: code ``appraisal.not-subset``, naming the first claim where ``narrower`` admits
            more, or that can't be compared.
    """
    if broader.is_empty or narrower.is_empty:
        raise _not_subset("policy", "reference values", "an empty policy")
    for claim, expected, actual in (
        ("tee", broader.tee, narrower.tee),
        ("simulated", broader.anchors.is_simulated, narrower.anchors.is_simulated),
        ("trust anchors", broader.anchors.digest.hex(), narrower.anchors.digest.hex()),
        ("isv_prod_id", broader.isv_prod_id, narrower.isv_prod_id),
    ):
        if expected != actual:
            raise _not_subset(claim, expected, actual)
    _require_within("mr_enclave", broader.mr_enclave, narrower.mr_enclave)
    _require_within("allowed_tcb", broader.allowed_tcb, narrower.allowed_tcb)
    _require_within("denied_advisories", narrower.denied_advisories, broader.denied_advisories)
    # Where nothing is listed, anything is admitted, which is more than any list.
    if broader.mr_signer:
        _require_within("mr_signer", broader.mr_signer, narrower.mr_signer or _ANY)
    if not broader.any_platform:
        _require_within("platforms", broader.platforms, narrower.platforms or _ANY)
    for claim, least, found in (
        ("min_isv_svn", broader.min_isv_svn, narrower.min_isv_svn),
        ("min_tcb_evaluation", broader.min_tcb_evaluation, narrower.min_tcb_evaluation),
    ):
        if found < least:
            raise _not_subset(claim, f"at least {least}", found)
    if narrower.max_age > broader.max_age:
        raise _not_subset("max_age", f"at most {broader.max_age} s", f"{narrower.max_age} s")
    fixed = _masked(broader.attributes_mask, narrower.attributes_mask)
    if (
        fixed != broader.attributes_mask
        or _masked(narrower.attributes, broader.attributes_mask) != broader.attributes
    ):
        raise _not_subset(
            "attributes",
            f"{broader.attributes.hex()} under mask {broader.attributes_mask.hex()}",
            f"{narrower.attributes.hex()} under mask {narrower.attributes_mask.hex()}",
        )


def _require_within(claim: str, allowed: frozenset[Any], found: frozenset[Any]) -> None:
    if not found <= allowed:
        raise _not_subset(claim, _listed(allowed) or "none", _listed(found - allowed))


def _not_subset(claim: str, expected: object, actual: object) -> AppraisalRefused:
    return AppraisalRefused(
        f"one policy admits more than the other: {claim}",
        code="appraisal.not-subset",
        claim=claim,
        expected=expected,
        actual=actual,
    )


def _masked(value: bytes, mask: bytes) -> bytes:
    return bytes(left & right for left, right in zip(value, mask, strict=True))


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted(value.hex() if isinstance(value, bytes) else str(value) for value in values))
