"""The Open Inference Protocol over REST: what tritonclient[http], curl and the like speak.

Bodies are passed on as they are, JSON or with binary tensors; only a content coding is taken off. Source:
https://github.com/kserve/open-inference-protocol.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cloister.client.proxy import coding, page
from cloister.client.proxy.forward import Forwarder, require_version, status_of, text_of
from cloister.client.proxy.guard import require_local
from cloister.client.proxy.room import Place, too_large
from cloister.client.session import model_of, path_of
from cloister.core import oip
from cloister.errors import CloisterError, DeadlineExceeded, UsageError

_logger = logging.getLogger("cloister.proxy")
JSON: Final = "application/json"
CODE: Final = "cloister-error"
PATIENCE: Final = 60.0  # seconds for a body to arrive
# Fields that mean something inside; all others are the local hop's, or would tell what needn't be told.
_INWARDS: Final = frozenset({b"content-type", oip.HEADER_LENGTH, b"cloister-deadline-ms"})
_OUTWARDS: Final = frozenset({b"content-type", oip.HEADER_LENGTH, b"server-timing"})


def rest_app(forwarder: Forwarder, *, listen: str | None) -> ASGIApp:
    """The proxy's REST routes.

    Args:
        forwarder: The way to the enclave.
        listen: The host of ``--dangerous-listen``, if any.
    """

    async def live(request: Request) -> Response:
        return _json({"live": True})

    async def ready(request: Request) -> Response:
        held = await forwarder.ready()
        return _json({"ready": held}, 200 if held else 400)  # the protocol's status for "not ready"

    async def server(request: Request) -> Response:
        with forwarder.enter():
            return _json(await forwarder.server())

    async def model(request: Request) -> Response:
        path = request.scope["raw_path"]
        method = request.method.encode()
        expected = b"POST" if path.endswith(b"/infer") else b"GET"
        if method != expected:
            raise UsageError(
                code="proxy.method", claim="method", expected=expected.decode(), actual=request.method[:20]
            )
        with forwarder.enter() as place:
            body = await _read(request, place)
            require_version(_version_of(path))
            found = await forwarder.resolve(model_of(path))
            fields = tuple(line for line in request.headers.raw if line[0] in _INWARDS)
            inner = await forwarder.send(found, method, path_of(path, found), fields, body)
            headers = {
                name.decode(): value.decode("latin-1") for name, value in inner.fields if name in _OUTWARDS
            }
            content = memoryview(inner.content)
            asked = coding.wanted(_field(request, b"accept-encoding"))
            if asked is not None:
                content = memoryview(await coding.encode(content, asked))
                headers |= {"content-encoding": asked.decode(), "vary": "accept-encoding"}
        return Response(content, inner.status, headers=headers)

    async def record(request: Request) -> Response:
        if JSON in request.headers.get("accept", ""):
            return await record_json(request)
        await forwarder.ready()
        return Response(page.html(forwarder), headers=page.HEADERS, media_type="text/html")

    async def record_json(request: Request) -> Response:
        await forwarder.ready()
        return Response(json.dumps(page.facts(forwarder)), headers=page.HEADERS, media_type=JSON)

    async def home(request: Request) -> Response:
        return RedirectResponse("/verification")

    routes = [
        Route("/", home, methods=["GET"]),
        Route("/v2", server, methods=["GET"]),
        Route("/v2/health/live", live, methods=["GET"]),
        Route("/v2/health/ready", ready, methods=["GET"]),
        Route("/v2/models/{path:path}", model, methods=["GET", "POST"]),
        Route("/verification", record, methods=["GET"]),
        Route("/verification.json", record_json, methods=["GET"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, CloisterError: _refusal})
    app.router.redirect_slashes = False
    return _Door(app, listen)


class _Door:
    """Lets local programs in, and lets neither a message nor a traceback of an unforeseen error out."""

    def __init__(self, app: ASGIApp, listen: str | None) -> None:
        self._app = app
        self._listen = listen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: dict[str, object]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            require_local(scope["headers"], listen=self._listen)
            await self._app(scope, receive, watch)  # type: ignore[arg-type]
        except CloisterError as error:
            await _error(error)(scope, receive, send)
        except ClientDisconnect:
            return
        except Exception as error:
            _logger.error("a route failed: %s", type(error).__name__)
            if not started:
                await _text(500, "internal: the proxy failed on this request")(scope, receive, send)


async def _read(request: Request, place: Place) -> bytes | bytearray:
    """The whole body without its coding; every byte counted before the next is read."""
    found = coding.coding_of(_field(request, b"content-encoding"))
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > place.limit:
        raise too_large(place.limit)  # before a byte of it is read
    pieces = []
    try:
        async with asyncio.timeout(PATIENCE):
            async for piece in request.stream():
                place.hold(len(piece))  # what didn't come takes no room from others
                pieces.append(piece)
    except TimeoutError as error:
        raise DeadlineExceeded(
            "the body did not arrive",
            code="proxy.timeout",
            claim="seconds",
            expected=f"at most {PATIENCE:.0f}",
        ) from error
    body = b"".join(pieces)  # no copy of a body that came as one
    return body if found is None else await coding.decode(body, found, place)


def _version_of(path: bytes) -> str:
    """The version in a model's path, or none."""
    return path.partition(b"/versions/")[2].partition(b"/")[0].decode("ascii", "replace")


def _field(request: Request, name: bytes) -> bytes | None:
    values = [value for each, value in request.headers.raw if each == name]
    return b", ".join(values) if values else None


def _json(value: dict[str, object], status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type=JSON)


def _text(status: int, text: str, code: str = "") -> Response:
    headers = {CODE: code} if code else {}
    if status in (429, 503):
        headers["retry-after"] = "1"
    return Response(json.dumps({"error": text}), status, headers=headers, media_type=JSON)


def _error(error: CloisterError) -> Response:
    return _text(status_of(error), text_of(error), error.code)


async def _refusal(request: Request, error: Exception) -> Response:
    return _error(error) if isinstance(error, CloisterError) else _text(500, "internal")


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = {404: "not-found.route: the proxy has no such path", 405: "proxy.method: not allowed here"}
    return _text(status, what.get(status, f"http.{status}"))
