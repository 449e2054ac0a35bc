"""Errors as they travel inside the encapsulation, and the one table from errors to HTTP statuses.

One document is a problem of RFC 9457 and an error of the Open Inference Protocol, whose ``error`` is a text.
"""

from __future__ import annotations

import json
from typing import Final, TypeAlias

from cloister import errors
from cloister.errors import CloisterError

MEDIA_TYPE: Final = b"application/problem+json"
MAX_PROBLEM: Final = 64 << 10  # bytes

Statuses: TypeAlias = tuple[tuple[type[CloisterError], int], ...]

# The first class that fits decides.
_STATUS: Final[Statuses] = (
    (errors.Replayed, 409),
    (errors.Rollback, 409),
    (errors.Refused, 403),
    (errors.NotFound, 404),
    (errors.InvalidRequest, 400),
    (errors.UsageError, 400),
    (errors.Overloaded, 429),
    (errors.DeadlineExceeded, 504),
    (errors.Unavailable, 503),
)


def status_of(error: CloisterError, *, edge: Statuses = ()) -> int:
    """The HTTP status of an error.

    Args:
        error: Any of ours.
        edge: What is answered otherwise where the error leaves, most special class first; it goes before the
            table.
    """
    return next((status for kind, status in (*edge, *_STATUS) if isinstance(error, kind)), 500)


def to_bytes(error: CloisterError) -> bytes:
    """The problem document of an error: its text, its kind, its code, and what was compared."""
    parts = error.to_dict()
    return json.dumps(
        {"kind": _kind(error), "code": parts.pop("error"), "error": str(error), **parts}
    ).encode()


def from_bytes(raw: bytes | memoryview) -> CloisterError:
    """The error that a peer sent; an unreadable one becomes a plain `CloisterError`."""
    try:
        problem = json.loads(bytes(raw[:MAX_PROBLEM]))
    except (ValueError, RecursionError):
        problem = None
    if not isinstance(problem, dict) or not all(isinstance(text, str) for text in problem.values()):
        return CloisterError("the enclave answered with an unreadable error", code="problem")
    kind = getattr(errors, problem.get("kind", ""), None) if problem.get("kind") in errors.__all__ else None
    return (kind or CloisterError)(
        problem.get("message", "") or problem.get("error", ""),
        code=problem.get("code", ""),
        claim=problem.get("claim", ""),
        expected=problem.get("expected", ""),
        actual=problem.get("actual", ""),
        hint=problem.get("hint", ""),
    )


def _kind(error: CloisterError) -> str:
    return next(
        (cls.__name__ for cls in type(error).__mro__ if cls.__name__ in errors.__all__), "CloisterError"
    )
