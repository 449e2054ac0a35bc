"""The one exception tree.

::

    CloisterError
    ├── UsageError            a file, an argument or an option is not what it must be
    │   └── FormatError       bytes that are not a value of their format
    │       └── EvidenceError     evidence or collateral that does not parse
    ├── Refused               a check of trust or authority failed
    │   ├── EvidenceRefused   a signature, a chain, a date or a TCB level
    │   ├── AppraisalRefused  verified evidence that the policy does not admit
    │   ├── BindingRefused    a message that belongs to another exchange
    │   ├── AccessRefused     the owner's grant or the user's consent is missing
    │   ├── Replayed          a message that was seen before
    │   ├── Rollback          a state older than one already seen
    │   └── Tampered          ciphertext or a signed text that was altered
    ├── InvalidRequest        a request that its model can't answer as it stands
    ├── NotFound              a model, a pool or a record that isn't there
    └── Unavailable           may succeed later
        ├── Overloaded
        ├── DeadlineExceeded
        ├── LeaseExpired
        ├── StoreConflict     a record changed since it was read; nothing was written
        └── TransportError    bytes did not get there or back; says nothing about trust

Every error carries a stable ``code`` and, where a check failed, the claim, the expected and the actual
value, and what to do. None of them ever carries a key, a token, an input, an output or a weight.
"""

from __future__ import annotations

__all__ = [
    "AccessRefused",
    "AppraisalRefused",
    "BindingRefused",
    "CloisterError",
    "DeadlineExceeded",
    "EvidenceError",
    "EvidenceRefused",
    "FormatError",
    "InvalidRequest",
    "LeaseExpired",
    "NotFound",
    "Overloaded",
    "Refused",
    "Replayed",
    "Rollback",
    "StoreConflict",
    "Tampered",
    "TransportError",
    "Unavailable",
    "UsageError",
]

from typing import ClassVar, Final

MAX_TEXT: Final = 800  # characters of each part of an error


def _short(text: str) -> str:
    """A peer may have chosen what an error quotes: never more than a few lines of it."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


class CloisterError(Exception):
    """Root of every error that Cloister lets out.

    Attributes:
        code: Stable machine-readable name, for example ``"appraisal.mr_enclave"``.
        claim: What was checked, in the field's own words; empty where nothing was compared.
        expected: The value that would have passed, as text.
        actual: The value that was found, as text.
        hint: What the reader can do about it.
        retryable: Whether the same call may succeed later without a change.
    """

    default_code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        code: str = "",
        claim: str = "",
        expected: object = "",
        actual: object = "",
        hint: str = "",
    ) -> None:
        self.code = code or self.default_code
        self.claim = _short(claim)
        self.expected = _short(str(expected))
        self.actual = _short(str(actual))
        self.hint = hint
        self.message = _short(message) or (f"{self.claim} refused" if claim else self.code)
        super().__init__(self.message)

    def __str__(self) -> str:
        """One line: what failed, what was expected, what was found, what to do."""
        text = self.message
        if self.claim and self.claim not in text:
            text += f" {self.claim}" if self.claim.startswith("[") else f" [{self.claim}]"
        if self.expected:
            text += f": expected {self.expected}, found {self.actual or 'nothing'}"
        elif self.actual:
            text += f": {self.actual}"
        if self.hint:
            text += f". {self.hint}"
        return text

    def to_dict(self) -> dict[str, str]:
        """The form that ``--json`` prints and that travels inside an encapsulated response."""
        fields = {
            "error": self.code,
            "message": self.message,
            "claim": self.claim,
            "expected": self.expected,
            "actual": self.actual,
            "hint": self.hint,
        }
        return {name: text for name, text in fields.items() if text}


class UsageError(CloisterError):
    """A file, an argument or an option is not what it must be."""

    default_code = "usage"


class FormatError(UsageError):
    """Bytes that are not a value of the format they claim to be."""

    default_code = "format"


class EvidenceError(FormatError):
    """Evidence or collateral that does not parse."""

    default_code = "evidence.format"


class Refused(CloisterError):
    """A check of trust or authority failed."""

    default_code = "refused"


class EvidenceRefused(Refused):
    """A signature, a certificate chain, a date or a TCB level of evidence did not verify."""

    default_code = "evidence"


class AppraisalRefused(Refused):
    """Evidence is genuine, but the appraisal policy does not admit what it says."""

    default_code = "appraisal"


class BindingRefused(Refused):
    """A message belongs to another challenge, pool, epoch, model, service or user."""

    default_code = "binding"


class AccessRefused(Refused):
    """The owner's grant or the user's consent is missing, expired or revoked."""

    default_code = "access"


class Replayed(Refused):
    """A message that this incarnation has already answered."""

    default_code = "replayed"


class Rollback(Refused):
    """A state or a document older than, or inconsistent with, one already seen."""

    default_code = "rollback"


class Tampered(Refused):
    """Ciphertext or a signed text that was altered, truncated, reordered or extended."""

    default_code = "tampered"


class InvalidRequest(CloisterError):
    """A request that its model can't answer as it stands."""

    default_code = "request"


class NotFound(CloisterError):
    """A model, a pool or a record that isn't there."""

    default_code = "not-found"


class Unavailable(CloisterError):
    """The call may succeed later, as it is."""

    default_code = "unavailable"
    retryable = True


class Overloaded(Unavailable):
    """The queue is full; nothing was executed."""

    default_code = "overloaded"


class DeadlineExceeded(Unavailable):
    """The caller's deadline passed before an answer was ready."""

    default_code = "deadline"


class LeaseExpired(Unavailable):
    """A worker's lease ran out before it could renew it."""

    default_code = "lease-expired"


class StoreConflict(Unavailable):
    """A record changed since it was read; nothing of the batch was written."""

    default_code = "store.conflict"


class TransportError(Unavailable):
    """Bytes did not get there or back. It says nothing about trust.

    Attributes:
        sent: False only when it is certain that no byte of the request was written, so that the caller may go
            elsewhere with the same bytes.
    """

    default_code = "transport"

    def __init__(
        self,
        message: str = "",
        *,
        code: str = "",
        claim: str = "",
        expected: object = "",
        actual: object = "",
        hint: str = "",
        sent: bool = True,
    ) -> None:
        super().__init__(message, code=code, claim=claim, expected=expected, actual=actual, hint=hint)
        self.sent = sent
