"""The host's errors as ``application/problem+json`` (RFC 9457): a stable code, and nothing internal.

These are outer errors. They are not authenticated, so a client shows them and trusts none of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from starlette.responses import Response

from cloister.core.protocol import problem as table
from cloister.core.protocol.problem import Statuses
from cloister.errors import AccessRefused, CloisterError, Overloaded, Refused, StoreConflict, TransportError
from cloister.net.messages import Answer

CONTENT_TYPE: Final = "application/problem+json"
# Where an operator's answer differs from `cloister.core.protocol.problem`.
_EDGE: Final[Statuses] = (
    (StoreConflict, 409),
    (TransportError, 502),
    (Overloaded, 503),
    (AccessRefused, 403),
    (Refused, 422),
)
_BY_CODE: Final = {"blob.quota": 507, "blob.range": 416, "http.too-large": 413}


def status_of(error: CloisterError) -> int:
    """The HTTP status of one of our errors."""
    return _BY_CODE.get(error.code) or table.status_of(error, edge=_EDGE)


def problem_body(status: int, code: str) -> bytes:
    """The JSON text of a problem."""
    title = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Error"
    return json.dumps({"type": "about:blank", "title": title, "status": status, "code": code}).encode()


def problem(status: int, code: str, *, retry_after: int = 0) -> Answer:
    """A problem as an answer of the compact front; ``retry_after`` in seconds."""
    fields = ((b"retry-after", b"%d" % retry_after),) if retry_after else ()
    body = problem_body(status, code)
    return Answer(status=status, body=body, content_type=CONTENT_TYPE.encode(), fields=fields)


def problem_response(status: int, code: str, headers: Mapping[str, str] | None = None) -> Response:
    """A problem as a Starlette response."""
    return Response(problem_body(status, code), status, media_type=CONTENT_TYPE, headers=dict(headers or {}))
