"""The same server without encryption: gateway and worker, each a process of its own, on the same parts.

The gateway is Cloister's own; it forwards what it can't read anyway. The worker has the compact front, binary
HTTP, the Open Inference Protocol and ONNX Runtime in a pool of threads, and none of attestation, signatures,
grants and encapsulation. `Plain` runs both:

    python -m benchmarks.plain_server gateway FOLDER
    python -m benchmarks.plain_server worker FOLDER MODEL THREADS QUEUE
    python -m benchmarks.plain_server null FOLDER BYTES

``null`` answers with that many zero bytes at once: what is left is transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from benchmarks.models import Array, bare_session
from benchmarks.report import console
from cloister.core import oip
from cloister.core.ohttp import bhttp
from cloister.core.protocol import outer
from cloister.host.gateway.server import Gateway
from cloister.net.body import Body
from cloister.net.front import Answer, Handler, Head, Limits, serve
from cloister.net.link import Peer, Upstream
from cloister.net.loop import run as run_loop

POOL: Final = "0" * 64
FIELDS: Final = {"content-type": "message/ohttp-req", outer.POOL.decode(): POOL}
PATH: Final = "/ohttp"
_LIMITS: Final = Limits(max_body=64 << 20)
_FOREVER: Final = 1e9  # seconds that the one registration lasts
_START: Final = 30.0  # seconds for both to be ready
_ROOT: Final = Path(__file__).resolve().parents[1]


class Plain:
    """Both processes. A context manager; they end with it.

    Args:
        worker: Role of the worker and its arguments, as on the command line.

    Attributes:
        port: Of the gateway.
        direct: TCP port of the worker itself.
        pids: Role -> process id.
    """

    def __init__(self, *worker: str) -> None:
        self.port = 0
        self.direct = 0
        self.pids: dict[str, int] = {}
        self._worker = worker
        self._folder = Path()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Plain:
        self._folder = Path(tempfile.mkdtemp(prefix="cloister-plain-"))
        try:
            role, *rest = self._worker
            self.direct = self._start("worker", role, str(self._folder), *rest)
            self.port = self._start("gateway", "gateway", str(self._folder))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, name: str, *arguments: str) -> int:
        """Start a process; gives the port that it wrote down."""
        command = [sys.executable, "-m", "benchmarks.plain_server", *arguments]
        process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.DEVNULL)
        self._processes.append(process)
        self.pids[name] = process.pid
        said, until = self._folder / f"{name}.port", time.monotonic() + _START
        while not said.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the plaintext {name} did not start")
            time.sleep(0.02)
        return int(said.read_text())


def request_of(model: str, inputs: dict[str, Array]) -> bytes:
    """The body of one request: what a client of Cloister would encapsulate."""
    header, buffers = oip.encode_request(inputs)
    inner = bhttp.Request(
        method=b"POST",
        path=b"/v2/models/" + model.encode() + b"/infer",
        fields=((oip.HEADER_LENGTH, b"%d" % len(header)),),
        content=b"".join((header, *buffers)),
    )
    return bytes(inner.to_bytes(pad=True))


def _inference(model: Path, threads: ThreadPoolExecutor, queue: int) -> Handler:
    session = bare_session(model)
    names = [output.name for output in session.get_outputs()]
    inside = 0

    async def handle(head: Head, body: Body) -> Answer:
        nonlocal inside
        content = await body.whole()
        if inside >= queue:
            return Answer(status=503)
        inside += 1
        try:
            request = bhttp.Request.from_bytes(content)
            asked = oip.decode_request(memoryview(request.content), request.field(oip.HEADER_LENGTH))
            loop = asyncio.get_running_loop()
            outputs = await loop.run_in_executor(threads, session.run, names, asked.inputs)
        finally:
            inside -= 1
        header, buffers = oip.encode_response(
            model.stem, dict(zip(names, outputs, strict=True)), binary=asked.binary
        )
        response = bhttp.Response(status=200, content=b"".join((header, *buffers)))
        return Answer(status=200, content_type=b"message/ohttp-res", body=response.to_bytes(pad=True))

    return handle


async def _serve_worker(folder: Path, handler: Handler) -> None:
    """Serve on a Unix socket, for the gateway, and on a TCP port, for whoever wants no gateway."""
    stop = _stopped()
    fronts = [
        await serve(handler, unix=folder / "worker.sock", limits=_LIMITS),
        await serve(handler, limits=_LIMITS),
    ]
    _say(folder / "worker.port", fronts[1].port)
    await stop.wait()
    for front in fronts:
        await front.close(1.0)


async def _serve_gateway(folder: Path) -> None:
    stop = _stopped()
    admin = folder / "admin.sock"
    gateway = Gateway(
        admin=admin, enclaves=folder / "enclaves.sock", limits=_LIMITS, lifetime=_FOREVER, port=0
    )
    async with gateway, contextlib.aclosing(Upstream(Peer(unix=admin))) as link:
        worker = json.dumps({"pool": POOL, "socket": str(folder / "worker.sock")}).encode()
        fields = ((b"content-type", b"application/json"),)
        answer = await link.request(b"PUT", b"/workers/plain", fields, worker, timeout=5.0)
        if answer.status != 204:
            raise SystemExit(f"the gateway did not take the worker: {answer.status}")
        _say(folder / "gateway.port", gateway.port)
        await stop.wait()


def _stopped() -> asyncio.Event:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop


def _say(path: Path, port: int) -> None:
    """Write a port down, all of it at once."""
    draft = path.with_suffix(".draft")
    draft.write_text(str(port))
    draft.rename(path)


def main(arguments: Sequence[str]) -> int:
    """Run one role; gives the exit status."""
    match arguments:
        case ["gateway", folder]:
            run_loop(_serve_gateway(Path(folder)))
        case ["worker", folder, model, threads, queue]:
            with ThreadPoolExecutor(int(threads)) as pool:
                run_loop(_serve_worker(Path(folder), _inference(Path(model), pool, int(queue))))
        case ["null", folder, size]:
            answer = Answer(status=200, content_type=b"message/ohttp-res", body=bytes(int(size)))

            async def handle(head: Head, body: Body) -> Answer:
                await body.whole()
                return answer

            run_loop(_serve_worker(Path(folder), handle))
        case _:
            console.print(__doc__ or "")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
