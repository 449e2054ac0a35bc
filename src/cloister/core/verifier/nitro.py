"""Verification of AWS Nitro attestation documents, by AWS's own rules.

They are in section 3 of ``docs/attestation_process.md`` of aws-nitro-enclaves-nsm-api. Steps, cited below:

1. The document parses.
2. Its chain begins at a root byte-equal to the pinned one.
3. Root, intermediates, leaf: signatures, CA bits, path lengths, key usages, dates, names. AWS has revocation
   lists left out here; its intermediates live for days, and the leaf for 3 hours.
4. The leaf signed the document.
5. The document was made while the leaf was valid, no longer ago than a leaf lives and not in the future.
6. Whether the enclave runs in debug mode: PCR0 to PCR2 are zero. Policy decides.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from cloister.core.evidence.bundle import Evidence
from cloister.core.evidence.nitro import NitroDocument
from cloister.core.times import time_text
from cloister.core.verifier.anchors import TrustAnchors, described
from cloister.core.verifier.certificates import NITRO, Certificate, load_certificate
from cloister.core.verifier.chain import require_dates, require_signature, verify_chain
from cloister.core.verifier.collateral import passed
from cloister.core.verifier.result import MAX_AHEAD, NitroPlatform, Step, VerifiedEvidence
from cloister.errors import EvidenceRefused

MAX_AGE: Final = 3 * 3600 + MAX_AHEAD  # seconds; AWS's leaves live 3 hours and 3 seconds


def verify(
    evidence: Evidence, *, anchors: TrustAnchors, now: int, steps: list[Step] | None = None
) -> VerifiedEvidence:
    """Verify a Nitro document.

    Args:
        evidence: The document; it brings its certificates, so there is no collateral.
        anchors: What to believe; decides whether the result is simulated.
        now: Unix seconds.
        steps: Gets every check as it is passed, so that a refusal shows how far it came.

    Raises:
        EvidenceError: something does not parse.
        EvidenceRefused: a check failed; ``code``, ``claim``, ``expected`` and ``actual`` say which.
    """
    steps = [] if steps is None else steps
    document = NitroDocument.from_bytes(evidence.quote)
    chain = tuple(
        load_certificate(der, NITRO) for der in (document.certificate, *reversed(document.cabundle))
    )
    steps.append(passed("1 document", f"{document.module_id}, {len(evidence.quote)} B"))
    anchors.require_root("nitro", chain[-1])
    steps.append(passed("2 root", described(chain[-1])))
    verify_chain(chain, now=now, code="evidence.nitro-chain", what="Nitro chain")
    steps.append(passed("3 chain", f"{len(chain)} certificates down to {chain[0].common_name}"))
    require_signature(
        chain[0].key,
        document.signature,
        document.signed_bytes,
        code="evidence.nitro-signature",
        what="the Nitro document",
        by=chain[0].common_name,
    )
    steps.append(passed("4 document signature", f"by {chain[0].common_name}"))
    made = document.timestamp // 1000
    _require_timestamp(made, chain[0], now, steps)
    detail = "PCR0 to PCR2 are zero" if document.debug else "PCR0 to PCR2 are set"
    steps.append(Step(name="6 debug mode", outcome="note" if document.debug else "ok", detail=detail))
    return VerifiedEvidence(
        tee="nitro",
        anchors_digest=anchors.digest,
        simulated=anchors.is_simulated,
        debug=document.debug,
        tcb_status=None,
        tcb_date=None,
        advisories=(),
        tcb_evaluation_number=None,
        measurements=MappingProxyType(_measurements(document)),
        report_data=document.user_data or b"",
        platform=NitroPlatform(module_id=document.module_id, timestamp=made),
        collateral=MappingProxyType({}),
        collateral_issued=made,
        not_after=min(made + MAX_AGE, *(certificate.not_after for certificate in chain)),
        steps=tuple(steps),
    )


def _require_timestamp(made: int, leaf: Certificate, now: int, steps: list[Step]) -> None:
    """Step 5."""
    if not leaf.not_before <= made <= leaf.not_after:
        raise EvidenceRefused(
            code="evidence.timestamp",
            claim="timestamp of the Nitro document",
            expected=f"{time_text(leaf.not_before)} to {time_text(leaf.not_after)}, as its certificate",
            actual=time_text(made),
        )
    require_dates("the Nitro document", made - MAX_AHEAD, made + MAX_AGE, now=now)
    steps.append(passed("5 timestamp", f"made at {time_text(made)}"))


def _measurements(document: NitroDocument) -> dict[str, bytes | int]:
    """The registers by name; what the enclave added, where it did."""
    found: dict[str, bytes | int] = {f"pcr{index}": value for index, value in document.pcrs.items()}
    if document.public_key is not None:
        found["public_key"] = document.public_key
    if document.nonce is not None:
        found["nonce"] = document.nonce
    return found
