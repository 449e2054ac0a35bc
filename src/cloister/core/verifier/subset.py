"""Comparing two appraisal policies: does one admit everything that the other admits.

So a client can accept a pool whose workers it never meets: all that the pool's policy admits, its own
policy admits too. The comparison is sound and not complete: what it can't tell, it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cloister.core.verifier.claims import CLAIMS, not_subset
from cloister.errors import AppraisalRefused

if TYPE_CHECKING:
    from cloister.core.verifier.policy import AppraisalPolicy


def require_subset(broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
    """Check, claim by claim, that ``broader`` admits everything that ``narrower`` admits.

    Raises:
        AppraisalRefused: code ``appraisal.not-subset``, naming the first claim where ``narrower`` admits
            more, or that can't be compared.
    """
    if broader.is_empty or narrower.is_empty:
        raise not_subset("policy", "reference values", "an empty policy")
    if narrower.any_of:  # all that any of them admits
        for member in narrower.any_of:
            require_subset(broader, member)
    elif broader.all_of:
        for member in broader.all_of:
            require_subset(member, narrower)
    elif broader.any_of or narrower.all_of:
        _require_some(broader, narrower)
    else:
        _require_plain(broader, narrower)


def _require_some(broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
    """One of the broader ones admits what one of the narrower ones admits, and so what all of them admit."""
    refusals: list[AppraisalRefused] = []
    for wide in broader.any_of or (broader,):
        for narrow in narrower.all_of or (narrower,):
            try:
                require_subset(wide, narrow)
            except AppraisalRefused as refusal:
                refusals.append(refusal)
            else:
                return
    # The one that speaks of the same TEE tells most.
    raise next((refusal for refusal in refusals if refusal.claim != "tee"), refusals[0])


def _require_plain(broader: AppraisalPolicy, narrower: AppraisalPolicy) -> None:
    for refusal in compare_claims(broader, narrower):
        raise refusal


def compare_claims(broader: AppraisalPolicy, narrower: AppraisalPolicy) -> Iterator[AppraisalRefused]:
    """Compare two policies that each speak of one TEE, neither empty.

    Yields:
        A refusal for each claim where ``narrower`` admits more, as `require_subset` raises it.
    """
    if broader.tee != narrower.tee:  # and so they have no claim in common
        yield not_subset("tee", broader.tee, narrower.tee)
        return
    for claim, expected, actual in (
        ("simulated", broader.anchors.is_simulated, narrower.anchors.is_simulated),
        ("trust anchors", broader.anchors.digest.hex(), narrower.anchors.digest.hex()),
    ):
        if expected != actual:
            yield not_subset(claim, expected, actual)
    for each in CLAIMS[broader.tee]:
        try:
            each.compare(broader, narrower)
        except AppraisalRefused as refusal:
            yield refusal
    if narrower.max_age > broader.max_age:
        yield not_subset("max_age", f"at most {broader.max_age} s", f"{narrower.max_age} s")
