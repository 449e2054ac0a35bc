"""The host link: an enclave's only way out, served on a Unix socket in its run folder.

It offers the operator's store, a way to other enclaves through the gateway, and the service document; nothing
else. What passes here is ciphertext, or public.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from cloister.core.protocol import outer
from cloister.errors import CloisterError
from cloister.host.problems import status_of

MAX_BODY: Final = (
    16 << 20
)  # bytes; a key release with its evidence has some 100 KiB, a stage's tensors a few MiB
MAX_FIELD: Final = 1024  # bytes; a pool id has 64
OHTTP_REQUEST: Final = "message/ohttp-req"
PROBLEM: Final = "application/problem+json"

# What an enclave may say to the gateway about a request: its pool, and the hints of the protocol.
FORWARDED_FIELDS: Final = tuple(name.decode() for name in (outer.POOL, outer.MODEL, outer.DEADLINE))

Reply = tuple[int, str, bytes]  # status, content type, body
Forward = Callable[[Mapping[str, str], bytes], Awaitable[Reply]]
Fetch = Callable[[], Awaitable[Reply]]


def link_app(
    routes: Sequence[BaseRoute], *, forward: Forward, fetch_document: Fetch, max_body: int = MAX_BODY
) -> Starlette:
    """Make the application that serves one enclave.

    Args:
        routes: The store's routes.
        forward: Carries an encapsulated request to the gateway. Gets those fields of `FORWARDED_FIELDS` that
            were sent, in lower case, and ``content-type``; gives status, content type and body.
        fetch_document: Fetches the service document from the gateway, in the same form.
        max_body: Longest accepted encapsulated request, in bytes.
    """

    async def ohttp(request: Request) -> Response:
        fields = _fields(request)
        body = await _body(request, max_body)
        status, content_type, answer = await forward(fields, body)
        return Response(answer, status_code=status, headers={"content-type": content_type})

    async def document(_: Request) -> Response:
        status, content_type, answer = await fetch_document()
        return Response(answer, status_code=status, headers={"content-type": content_type})

    return Starlette(
        routes=[
            *routes,
            Route("/ohttp", ohttp, methods=["POST"]),
            Route("/.well-known/cloister", document, methods=["GET"]),
        ],
        exception_handlers={
            CloisterError: _refuse,
            HTTPException: _refuse_http,
            ClientDisconnect: _gone,
            Exception: _fail,
        },
    )


def _fields(request: Request) -> dict[str, str]:
    content_type = request.headers.get("content-type", "")
    if content_type != OHTTP_REQUEST:
        raise HTTPException(415, "the content type is not message/ohttp-req")
    fields = {name: request.headers[name] for name in FORWARDED_FIELDS if name in request.headers}
    if "cloister-pool" not in fields:
        raise HTTPException(400, "the header cloister-pool is missing")
    if any(len(text) > MAX_FIELD for text in fields.values()):
        raise HTTPException(431, "a header is too long")
    return {**fields, "content-type": content_type}


async def _body(request: Request, limit: int) -> bytes:
    """The body, refused by its declared length before a byte of it is kept."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > limit:
        raise HTTPException(413, "the body is too long")
    body = bytearray()
    async for part in request.stream():
        if len(body) + len(part) > limit:
            raise HTTPException(413, "the body is too long")
        body += part
    return bytes(body)


def _problem(status: int, code: str, text: str) -> JSONResponse:
    return JSONResponse(
        {"error": code, "title": text, "status": status}, status_code=status, media_type=PROBLEM
    )


async def _refuse(_: Request, error: Exception) -> Response:
    if not isinstance(error, CloisterError):  # for the type checker: Starlette hands over what was registered
        raise error
    return _problem(status_of(error), error.code, error.message)


async def _refuse_http(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return _problem(error.status_code, "link", error.detail)


async def _gone(_request: Request, _error: Exception) -> Response:
    return _problem(400, "link", "the request was cut off")


async def _fail(_request: Request, _error: Exception) -> Response:
    return _problem(500, "link", "the host failed")
