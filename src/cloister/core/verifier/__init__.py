"""Verification of evidence under pinned trust anchors, and appraisal under a policy (RFC 9334)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, cast

from cloister.core.evidence.bundle import Evidence
from cloister.core.verifier.anchors import TrustAnchors

if TYPE_CHECKING:
    from cloister.core.verifier.result import Step, VerifiedEvidence

__all__ = ["TrustAnchors", "verify"]

# Each is loaded when its first evidence comes: a relying party seldom meets more than one kind.
_MODULES: Final[Mapping[str, str]] = MappingProxyType(
    {"sgx": "dcap", "tdx": "dcap", "snp": "snp", "nitro": "nitro"}
)


class _Verifier(Protocol):
    def verify(
        self, evidence: Evidence, *, anchors: TrustAnchors, now: int, steps: list[Step] | None = None
    ) -> VerifiedEvidence: ...


def verify(
    evidence: Evidence, *, anchors: TrustAnchors, now: int, steps: list[Step] | None = None
) -> VerifiedEvidence:
    """Verify evidence of any kind of TEE.

    Args:
        evidence: As it arrived; nothing in it is trusted before it is checked.
        anchors: What to believe without proof.
        now: Unix seconds.
        steps: Gets every check as it is passed, so that a refusal shows how far it came.

    Raises:
        EvidenceError: something does not parse.
        EvidenceRefused: a check failed.
    """
    verifier = cast(_Verifier, importlib.import_module(f"{__name__}.{_MODULES[evidence.tee]}"))
    return verifier.verify(evidence, anchors=anchors, now=now, steps=steps)
