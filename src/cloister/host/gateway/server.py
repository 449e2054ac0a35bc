"""The gateway as a whole: compact front, ordinary routes, admin socket, links to workers, capture."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Final

from cloister.core.protocol import outer
from cloister.errors import UsageError
from cloister.host.asgi import protocols
from cloister.host.gateway.app import admin_app, public_app
from cloister.host.gateway.capture import Capture
from cloister.host.gateway.document import DocumentCache
from cloister.host.gateway.forward import Forwarder
from cloister.host.gateway.metrics import Metrics
from cloister.host.gateway.registry import LIFETIME, Registry
from cloister.host.store.blobs import BlobStore
from cloister.net.front import FrontServer, Limits, serve

_TICK: Final = 1.0  # seconds between looks for workers that are gone


class Gateway:
    """Owns everything between the network and the workers' sockets. ``async with`` starts and stops it.

    Args:
        host: Address to listen on.
        port: TCP port; 0 picks one, and ``port`` says which once it is started.
        admin: Path of the operator's Unix socket; its directory is made with mode 0700.
        enclaves: Path of the Unix socket through which launchers forward their enclaves' requests; likewise.
        blobs: Where owners upload sealed models; None leaves the routes out.
        capture: File to which every byte is appended that the gateway receives and sends; None: no capture.
        limits: What clients and workers may send.
        timeout: Seconds that a worker may take for an answer.
        lifetime: Seconds that a worker's registration lasts.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        admin: Path,
        enclaves: Path,
        blobs: BlobStore | None = None,
        capture: Path | None = None,
        limits: Limits | None = None,
        timeout: float = 120.0,
        lifetime: float = LIFETIME,
    ) -> None:
        self.host = host
        self.port = port
        self.registry = Registry(lifetime=lifetime)
        self.metrics = Metrics()
        self._admin = admin
        self._enclaves = enclaves
        self._blobs = blobs
        self._capture = Capture(capture) if capture is not None else None
        self._limits = limits or Limits()
        self._timeout = timeout
        self._clock = time.monotonic
        self._forwarder: Forwarder | None = None
        self._fronts: list[FrontServer] = []
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            UsageError: an address, the admin socket or the capture can't be opened; nothing is left open.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop(grace=0)
            raise

    async def _start(self) -> None:
        if self._capture is not None:
            self._capture.open()
        for socket in (self._admin, self._enclaves):
            _private_directory(socket.parent)
        forwarder = Forwarder(
            self.registry,
            self.metrics,
            limits=self._limits,
            timeout=self._timeout,
            clock=self._clock,
            tap=self._capture,
        )
        self._forwarder = forwarder
        documents = DocumentCache(self.registry, forwarder, clock=self._clock)
        admin = admin_app(registry=self.registry, metrics=self.metrics, clock=self._clock)
        public = public_app(
            registry=self.registry,
            forwarder=forwarder,
            documents=documents,
            metrics=self.metrics,
            blobs=self._blobs,
            clock=self._clock,
            limits=self._limits,
        )
        operator = partial(forwarder.handle, sender=outer.OPERATOR)
        enclave = partial(forwarder.handle, sender=outer.ENCLAVE)
        listening = self._fronts.append
        listening(await serve(operator, unix=self._admin, other=protocols(admin)))
        gets = {b"/.well-known/cloister": documents.answer}
        listening(await serve(enclave, unix=self._enclaves, limits=self._limits, gets=gets))
        front = await serve(
            forwarder.handle,
            host=self.host,
            port=self.port,
            limits=self._limits,
            other=protocols(public),
            tap=self._capture,
            cancel=True,  # which closes the connection to the worker, and so takes it out of its queue
        )
        listening(front)
        self.port = front.port
        self._ticker = asyncio.create_task(self._tick(forwarder))

    async def stop(self, grace: float = 5.0) -> None:
        """Let requests in progress finish for ``grace`` seconds; then leave nothing open."""
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
            self._ticker = None
        await asyncio.gather(*(front.close(grace) for front in self._fronts))
        self._fronts.clear()
        if self._forwarder is not None:
            await self._forwarder.aclose()
            self._forwarder = None
        if self._capture is not None:
            self._capture.close()

    async def __aenter__(self) -> Gateway:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def _tick(self, forwarder: Forwarder) -> None:
        while True:
            await asyncio.sleep(_TICK)
            await forwarder.prune()


def _private_directory(path: Path) -> None:
    """A directory that only its owner can enter, whatever stood there."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise UsageError(f"can't make {path}", code="gateway.admin") from error
