"""Serving a Starlette app behind the compact front: uvicorn's protocol without uvicorn's server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from cloister.asgi import configuration
from cloister.errors import CloisterError, FormatError
from cloister.host.problems import problem_response, status_of

_logger = logging.getLogger("cloister.host")


def protocols(app: ASGIApp) -> Callable[[], asyncio.Protocol]:
    """A factory of uvicorn protocols for ``app``, for `cloister.net.front.serve`'s ``other``.

    Requests are not logged, and an error becomes a bare problem: see `Guarded`.
    """
    config = configuration(Guarded(app))
    config.load()
    state = ServerState()

    def make() -> asyncio.Protocol:
        kind = cast(Callable[..., asyncio.Protocol], config.http_protocol_class)
        return kind(config=config, server_state=state, app_state={})

    return make


class Guarded:
    """Answers errors as problems. Neither the peer nor the log sees a message or a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except CloisterError as error:
            answer = problem_response(status_of(error), error.code)
        except Exception as error:
            _logger.error("a route failed: %s", type(error).__name__)
            answer = problem_response(500, "internal")
        else:
            return
        if not started:
            await answer(scope, receive, send)


async def http_problem(request: Request, error: Exception) -> Response:
    """An exception handler for Starlette's own errors, such as an unknown route."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    return problem_response(status, f"http.{status}", headers)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body of a request, ``limit`` bytes at most.

    Raises:
        FormatError: code ``http.too-large``.
    """
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if int(declared) <= limit:
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                break
        else:
            return bytes(body)
    raise FormatError("the body is too large", code="http.too-large", expected=f"at most {limit} B")
