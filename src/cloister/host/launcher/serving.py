"""Serves the host link on its Unix socket; asks an enclave whether it is ready, and what its stages took."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from cloister.asgi import configuration
from cloister.core.protocol.stages import Figures
from cloister.errors import CloisterError, Unavailable
from cloister.net.link import Peer, Upstream
from cloister.net.messages import Limits

PROBE_TIMEOUT: Final = 2.0  # seconds
MAX_FIGURES: Final = 16 << 10  # bytes
DRAIN_TIMEOUT: Final = 2  # seconds that a request in progress gets when the link stops
_PROBE: Final = b"GET /healthz HTTP/1.1\r\nHost: enclave\r\nConnection: close\r\n\r\n"


class _Server(uvicorn.Server):
    """uvicorn inside a loop that belongs to somebody else: signals are not its business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class LinkServer:
    """One application on one Unix socket that only this user can reach."""

    def __init__(self, app: ASGIApp, path: Path) -> None:
        """Make a server; nothing happens before `start`.

        Args:
            app: ASGI application.
            path: Of the socket.
        """
        self._path = path
        self._server = _Server(
            configuration(app, uds=str(path), log_level="warning", timeout_graceful_shutdown=DRAIN_TIMEOUT)
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            Unavailable: the socket can't be made.
        """
        self._task = asyncio.create_task(self._server.serve(), name="host-link")
        while not self._server.started:
            if self._task.done():
                raise Unavailable(
                    "the host link did not start", code="launcher.link"
                ) from self._task.exception()
            await asyncio.sleep(0.005)
        # uvicorn opens its sockets to everyone; the folder is closed to others, and so is this.
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Finish what is in progress, within `DRAIN_TIMEOUT`, and remove the socket."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait([self._task], timeout=2 * DRAIN_TIMEOUT)
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        self._path.unlink(missing_ok=True)


async def answers(path: Path) -> bool:
    """Whether the enclave that listens at ``path`` says that it is well (``GET /healthz`` gives 200)."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            reader, writer = await asyncio.open_unix_connection(str(path), limit=4096)
            writer.write(_PROBE)
            line = await reader.readline()
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    parts = line.split()
    return len(parts) >= 2 and parts[0].startswith(b"HTTP/1.") and parts[1] == b"200"


async def figures(path: Path) -> Figures | None:
    """What the enclave that listens at ``path`` tells of its stages (``GET /stages``); None for nothing."""
    enclave = Upstream(Peer(unix=path), limits=Limits(max_body=MAX_FIGURES))
    try:
        answer = await enclave.request(b"GET", b"/stages", timeout=PROBE_TIMEOUT)
        return Figures.from_data(json.loads(bytes(answer.body))) if answer.status == 200 else None
    except (CloisterError, ValueError, RecursionError):
        return None
    finally:
        await enclave.aclose()
