"""The gateway's ordinary routes, and the operator's own on a Unix socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloister.core.protocol.stages import Figures
from cloister.errors import CloisterError, FormatError
from cloister.host.asgi import http_problem, read_body
from cloister.host.gateway.document import DocumentCache
from cloister.host.gateway.forward import Forwarder
from cloister.host.gateway.metrics import CONTENT_TYPE, Metrics
from cloister.host.gateway.registry import Registry, Worker
from cloister.host.problems import problem_response, status_of
from cloister.host.store.app import blob_routes
from cloister.host.store.blobs import BlobStore
from cloister.net.body import Body
from cloister.net.front import Answer, Head, Limits

_MAX_ADMIN_BODY: Final = 4096  # bytes


def public_app(
    *,
    registry: Registry,
    forwarder: Forwarder,
    documents: DocumentCache,
    metrics: Metrics,
    blobs: BlobStore | None,
    clock: Callable[[], float],
    limits: Limits,
) -> Starlette:
    """What anyone may reach, besides the compact ``/ohttp`` itself."""

    async def document(request: Request) -> Response:
        found = await documents.get()
        headers = {"etag": found.etag, "cache-control": "public, max-age=1"}
        tags = {tag.strip() for tag in request.headers.get("if-none-match", "").split(",")}
        if tags & {found.etag, f"W/{found.etag}", "*"}:
            return Response(status_code=304, headers=headers)
        return Response(found.body, headers=headers, media_type=found.content_type)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def figures(request: Request) -> Response:
        text = metrics.render(each.worker.pool for each in registry.workers(clock()))
        return Response(text, headers={"content-type": CONTENT_TYPE})

    held = 0  # bytes of bodies that this app has in memory

    async def ohttp(request: Request) -> Response:
        # A connection stays here once it asked for another route: slower than the front, and the same.
        nonlocal held
        length = int(request.headers.get("content-length", "-1"))
        if length < 0:
            return problem_response(411, "http.411")
        if length > limits.max_body:
            return problem_response(413, "http.too-large")
        if held + length > limits.max_buffered:
            return problem_response(503, "gateway.busy", {"retry-after": "1"})
        held += length
        try:
            body = await read_body(request, limits.max_body)
            fields = {name.lower(): value for name, value in request.headers.raw}
            head = Head(method=b"POST", target=b"/ohttp", fields=fields, length=length)
            answer = await _unless_gone(request, forwarder.handle(head, Body.of(body)))
        finally:
            held -= length
        headers = {name.decode(): value.decode("latin-1") for name, value in answer.fields}
        headers["content-type"] = answer.content_type.decode("latin-1")
        return Response(bytes(answer.body), answer.status, headers=headers)

    routes = [
        Route("/.well-known/cloister", document, methods=["GET"]),
        Route("/healthz", health, methods=["GET"]),
        Route("/metrics", figures, methods=["GET"]),
        Route("/ohttp", ohttp, methods=["POST"]),
        *(blob_routes(blobs) if blobs is not None else []),
    ]
    return _app(routes)


def admin_app(*, registry: Registry, metrics: Metrics, clock: Callable[[], float]) -> Starlette:
    """What launchers use. It listens on a Unix socket that only the operator can reach."""

    async def put(request: Request) -> Response:
        raw = await read_body(request, _MAX_ADMIN_BODY)
        worker, figures = _worker(request.path_params["id"], raw)
        registry.register(worker, clock())
        if figures is not None:
            metrics.take(worker.id, worker.pool, figures)
        return Response(status_code=204)

    async def delete(request: Request) -> Response:
        registry.remove(request.path_params["id"])
        return Response(status_code=204)

    async def listing(request: Request) -> Response:
        now = clock()
        return JSONResponse(
            [
                {
                    "id": each.worker.id,
                    "pool": each.worker.pool,
                    "socket": str(each.worker.socket),
                    "in_flight": each.in_flight,
                    "age_s": round(now - each.seen, 3),
                }
                for each in registry.workers(now)
            ]
        )

    return _app(
        [
            Route("/workers", listing, methods=["GET"]),
            Route("/workers/{id}", put, methods=["PUT"]),
            Route("/workers/{id}", delete, methods=["DELETE"]),
        ]
    )


def _app(routes: list[Route]) -> Starlette:
    handlers = {HTTPException: http_problem, CloisterError: _refusal, Exception: _refusal}
    return Starlette(routes=routes, exception_handlers=handlers)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """What comes of work for a client; it is cancelled where the client goes away, who reads no answer."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Answer(status=499)
    finally:
        for task in (working, leaving):
            task.cancel()


async def _refusal(request: Request, error: Exception) -> Response:
    status = status_of(error) if isinstance(error, CloisterError) else 500
    headers = {"retry-after": "1"} if status == 503 else None
    return problem_response(status, getattr(error, "code", "internal"), headers)


def _worker(worker_id: str, raw: bytes) -> tuple[Worker, Figures | None]:
    """A registration, and what the worker tells of its stages, where it does."""
    try:
        value: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError("not JSON", code="gateway.worker") from error
    told = value.pop("stages", None) if isinstance(value, dict) else None
    match value:
        case {"pool": str(pool), "socket": str(socket), **rest} if not rest and "\0" not in socket:
            worker = Worker(id=worker_id, pool=pool, socket=Path(socket))
            return worker, None if told is None else Figures.from_data(told)
        case _:
            raise FormatError("not a worker", code="gateway.worker", expected='{"pool": ..., "socket": ...}')
