"""Agreement with an independent verifier (dcap-qvl) on real evidence that something happened to.

One bit flipped in every field of each vector's quote and collateral, then random mutations by number: flipped
bits, spliced collateral, shifted times, swapped chains. ``CLOISTER_MUTATIONS`` sets how many random ones.
"""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest
from dcap_mutations import at_random, each_field, load, ours, theirs

from cloister.core.verifier import TrustAnchors
from cloister.core.verifier.result import VerifiedEvidence
from cloister.errors import EvidenceError

MUTATIONS = int(os.environ.get("CLOISTER_MUTATIONS", "5000"))
CHUNK = 1000
FIRST = range(0, MUTATIONS, CHUNK)

# What we accept and it refuses: its own policy, which it applies after every signature, date and TCB level.
# An appraisal policy decides that here, so the result must show it.
ITS_POLICY = {
    "Debug mode is enabled": lambda result: result.debug,
    "SEPT_VE_DISABLE is not enabled": lambda result: not result.measurements["td_attributes"][3] & 0x10,
    "Invalid MR service TD": lambda result: any(result.measurements["mr_service_td"]),
}

# What we refuse and it accepts: code and claim of our refusal, what was changed, why.
OURS_IS_STRICTER = (
    (
        "evidence.crl-chain: .*",
        "pck_crl_issuer_chain",
        "it takes the issuer of the PCK CRL from the PCK chain and never reads the CRL's own chain",
    ),
    (
        "evidence.(expired|not-yet-valid): validity of PCK CRL issuer chain: .*",
        "pck_crl_issuer_chain",
        "likewise",
    ),
    (
        "evidence.(certificate|root): (certificate|certificate chain|root certificate)",
        "issuer_chain|certificate2|PCK chain",
        "it ends each chain with its own root and skips what the chain says there, and it reads PEM loosely; "
        "our root is byte-equal to the pinned one and PEM has one form",
    ),
    (
        "evidence.(tcb|qe|pck)-chain: certificates in the chain",
        "disorder",
        "it skips surplus certificates and does without a root in the chain; our chains have a fixed length",
    ),
    (
        "evidence.not-yet-valid: validity of (PCK|root) CRL",
        "time|_crl|collateral",
        "it does not look at a CRL's thisUpdate",
    ),
    (
        "evidence.format: certification of the attestation key",
        "bit of outer_type",
        "it takes any outer type of certification data in versions 4 and 5; type 6 is the only one (as in "
        "Intel's QVL)",
    ),
    (
        "evidence.format: certification data",
        "bit of (signature|outer|certification)_size",
        "it lets lengths end elsewhere than the data; ours must fit exactly",
    ),
)


@pytest.fixture(scope="module")
def cases(vectors):
    return [load(folder) for folder in sorted(vectors.iterdir()) if (folder / "expected.json").exists()]


def compare(mutations) -> Counter:
    """What both say of each mutation; a difference that no line above explains fails."""
    seen: Counter = Counter()
    unexplained = []
    for what, case in mutations:
        mine, other = ours(case, TrustAnchors.vendor()), theirs(case)
        verdict = explain(what, mine, other)
        seen[verdict] += 1
        if verdict == "unexplained":
            unexplained.append(f"{what}: we say {mine!r:.200}, it says {other!r:.200}")
    assert not unexplained, "\n".join(unexplained)
    return seen


def explain(what: str, mine, other) -> str:
    if isinstance(mine, VerifiedEvidence):
        if not isinstance(other, str):
            same = (mine.tcb_status, list(mine.advisories)) == (other.status, sorted(other.advisory_ids))
            return "both accept" if same else "unexplained"
        shown = ITS_POLICY.get(other.removeprefix("Verification failed: "), lambda _result: False)
        return "its policy" if shown(mine) else "unexplained"
    if isinstance(other, str):
        return "both refuse"
    found = f"{mine.code}: {mine.claim}"
    explained = any(
        re.fullmatch(refusal, found, re.DOTALL) and re.search(change, what)
        for refusal, change, _why in OURS_IS_STRICTER
    )
    return "ours is stricter" if explained else "unexplained"


def test_a_bit_of_every_field(cases):
    seen = compare(each for each in each_field(cases) if "padding" not in each[0])
    assert sum(seen.values()) > 1000
    assert seen["both accept"] == seen["its policy"] == 0  # every bit counts
    assert seen["both refuse"] > 0.9 * sum(seen.values())


@pytest.mark.parametrize("first", FIRST)
def test_mutations(first, cases):
    seen = compare(at_random(cases, number) for number in range(first, min(first + CHUNK, MUTATIONS)))
    assert seen["both refuse"]


def test_the_vectors_themselves(cases):
    seen = compare((case.name, case) for case in cases)
    assert seen == {"both accept": 10, "its policy": 5, "both refuse": 4}


def test_unexplained_differences_are_noticed(cases):
    """The comparison is no rubber stamp, in either direction."""
    good = next(case for case in cases if case.name == "tdx-v5-uptodate")
    accepted, report = ours(good, TrustAnchors.vendor()), theirs(good)
    assert explain("x", accepted, report) == "both accept"
    assert explain("x", accepted, "Verification failed: Signature is invalid") == "unexplained"
    assert explain("x", accepted, "Verification failed: Debug mode is enabled") == "unexplained"
    assert explain("x", EvidenceError(code="evidence.quote-signature", claim="x"), report) == "unexplained"
    assert (
        explain("x", EvidenceError(code="evidence.root", claim="root certificate"), report) == "unexplained"
    )
