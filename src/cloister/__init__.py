"""Confidential inference: sealed models, sealed requests, attested enclaves, untrusted hosts.

The names below are the public interface. Each is loaded when it is first used, so that an enclave, which has
only `core`, `net` and `enclave`, and a relying party that only verifies evidence, load nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from cloister.errors import (
    AccessRefused,
    CloisterError,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Refused,
    TransportError,
    Unavailable,
)

if TYPE_CHECKING:
    from cloister.client.client import AsyncClient, Client, Record
    from cloister.client.identity import Identity
    from cloister.client.openai import AsyncOpenAITransport, OpenAITransport, TextEmbedder
    from cloister.client.transport import (
        AsyncCloisterTransport,
        CloisterTransport,
        async_httpx_transport,
        httpx_transport,
    )
    from cloister.core.evidence.bundle import AmdCollateral, Collateral, Evidence
    from cloister.core.protocol.trust import Consent, UserPolicy
    from cloister.core.verifier import verify as verify_evidence
    from cloister.core.verifier.anchors import TrustAnchors
    from cloister.core.verifier.appraisal import AllOf, AnyOf, AppraisalPolicy, appraise
    from cloister.core.verifier.result import VerifiedEvidence

__all__ = [
    "AccessRefused",
    "AllOf",
    "AmdCollateral",
    "AnyOf",
    "AppraisalPolicy",
    "AsyncClient",
    "AsyncCloisterTransport",
    "AsyncOpenAITransport",
    "Client",
    "CloisterError",
    "CloisterTransport",
    "Collateral",
    "Consent",
    "DeadlineExceeded",
    "Evidence",
    "Identity",
    "InvalidRequest",
    "NotFound",
    "OpenAITransport",
    "Overloaded",
    "Record",
    "Refused",
    "TextEmbedder",
    "TransportError",
    "TrustAnchors",
    "Unavailable",
    "UserPolicy",
    "VerifiedEvidence",
    "appraise",
    "async_httpx_transport",
    "httpx_transport",
    "verify_evidence",
]

__version__ = "0.1.0"

_WHERE: Final = {
    "AllOf": ("cloister.core.verifier.appraisal", "AllOf"),
    "AmdCollateral": ("cloister.core.evidence.bundle", "AmdCollateral"),
    "AnyOf": ("cloister.core.verifier.appraisal", "AnyOf"),
    "AppraisalPolicy": ("cloister.core.verifier.appraisal", "AppraisalPolicy"),
    "AsyncClient": ("cloister.client.client", "AsyncClient"),
    "AsyncCloisterTransport": ("cloister.client.transport", "AsyncCloisterTransport"),
    "AsyncOpenAITransport": ("cloister.client.openai", "AsyncOpenAITransport"),
    "Client": ("cloister.client.client", "Client"),
    "CloisterTransport": ("cloister.client.transport", "CloisterTransport"),
    "Collateral": ("cloister.core.evidence.bundle", "Collateral"),
    "Consent": ("cloister.core.protocol.trust", "Consent"),
    "Evidence": ("cloister.core.evidence.bundle", "Evidence"),
    "Identity": ("cloister.client.identity", "Identity"),
    "OpenAITransport": ("cloister.client.openai", "OpenAITransport"),
    "Record": ("cloister.client.client", "Record"),
    "TextEmbedder": ("cloister.client.openai", "TextEmbedder"),
    "TrustAnchors": ("cloister.core.verifier.anchors", "TrustAnchors"),
    "UserPolicy": ("cloister.core.protocol.trust", "UserPolicy"),
    "VerifiedEvidence": ("cloister.core.verifier.result", "VerifiedEvidence"),
    "appraise": ("cloister.core.verifier.appraisal", "appraise"),
    "async_httpx_transport": ("cloister.client.transport", "async_httpx_transport"),
    "httpx_transport": ("cloister.client.transport", "httpx_transport"),
    "verify_evidence": ("cloister.core.verifier", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'cloister' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))
