"""A load generator: one process on uvloop that keeps clients busy, each with one request at a time.

`Load` starts it and tells it what to do by lines of JSON; it answers with lines of JSON. It drives these
kinds of targets, all with the same input, and looks at every answer:

- ``bare``: ONNX Runtime in this very process, called by as many threads as there are clients;
- ``cloister``: `AsyncClient`, with everything that it verifies, seals and signs;
- ``http``: one request body for all, over kept-alive HTTP/1.1, as little work as can be.

So what a client of Cloister takes for encryption counts against Cloister. The time on the processor that the
generator took stands beside each result: it shares the machine with what it measures.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from benchmarks.models import Array, bare_session, sample
from benchmarks.report import percentile
from cloister import AsyncClient, Identity, UserPolicy
from cloister.errors import CloisterError, Overloaded, TransportError
from cloister.net.link import Peer, Upstream
from cloister.net.loop import run as run_loop
from cloister.net.messages import Limits

SHARED: Final = 16  # clients that share one `AsyncClient`: as many connections as that keeps
REFUSED_PAUSE: Final = 0.01  # seconds before a client whose request failed asks again
PATIENCE: Final = 60.0  # seconds for one request
_OVERLOADED: Final = frozenset({429, 503})  # statuses that declare overload

Call = Callable[[int], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What was counted while some clients were busy; slices of the same target add up.

    Attributes:
        seconds: How long that was, up to the last answer: no client begins a request after the time that was
            asked for, and none drops one. So work that is half done at some moment counts nowhere.
        latencies: Seconds of each request that was answered.
        errors: Code -> how many requests failed with it.
        declared: How many of the failed ones were overload, declared as such.
        cpu: Seconds of processor time that the load generator took.
    """

    seconds: float = 0.0
    latencies: tuple[float, ...] = field(default=(), repr=False)
    errors: dict[str, int] = field(default_factory=dict)
    declared: int = 0
    cpu: float = 0.0

    def __add__(self, other: Slice) -> Slice:
        return Slice(
            seconds=self.seconds + other.seconds,
            latencies=self.latencies + other.latencies,
            errors=dict(Counter(self.errors) + Counter(other.errors)),
            declared=self.declared + other.declared,
            cpu=self.cpu + other.cpu,
        )

    @property
    def rps(self) -> float:
        """Answered requests per second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    @property
    def undeclared(self) -> int:
        """Requests that failed with anything but declared overload."""
        return sum(self.errors.values()) - self.declared

    def ms(self, share: float) -> float:
        """A percentile of the latencies, in milliseconds; NaN where nothing was answered."""
        return percentile(self.latencies, share) * 1e3 if self.latencies else float("nan")

    @property
    def cores(self) -> float:
        """Cores that the load generator kept busy."""
        return self.cpu / self.seconds if self.seconds else 0.0


class Load:
    """The load generator's process. A context manager; the process ends with it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Load:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
        )
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def open(self, name: str, kind: str, **target: Any) -> None:
        """Make a target ready; raises SystemExit where it doesn't give the right answer."""
        self._tell(do="open", name=name, kind=kind, target=target)

    def run(self, name: str, *, clients: int, seconds: float) -> Slice:
        """Keep ``clients`` clients of a target busy for some seconds."""
        found = self._tell(do="run", name=name, clients=clients, seconds=seconds)
        return Slice(**{**found, "latencies": tuple(found["latencies"])})

    def close(self, name: str) -> None:
        """Forget a target and its connections."""
        self._tell(do="close", name=name)

    def _tell(self, **order: Any) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(order, default=str) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the load generator ended")
        found: dict[str, Any] = json.loads(line)
        if "failed" in found:
            raise TargetFailed(found["failed"])
        return found


class TargetFailed(SystemExit):
    """A target can't be reached, or gives a wrong answer."""


# --- what runs in the load generator's own process ---


class Target(Protocol):
    """Something to keep busy."""

    async def prepare(self, clients: int) -> None:
        """Have what that many clients need."""

    async def run(self, clients: int, seconds: float) -> Slice:
        """Keep that many busy."""

    async def aclose(self) -> None:
        """Give back what was opened."""


class _Asked:
    """Targets that are asked over a connection; subclasses say what one request is."""

    async def prepare(self, clients: int) -> None:
        raise NotImplementedError

    async def ask(self, client: int) -> None:
        raise NotImplementedError

    async def run(self, clients: int, seconds: float) -> Slice:
        latencies: list[float] = []
        errors: Counter[str] = Counter()
        declared = 0
        used, began = time.process_time(), time.perf_counter()
        until = began + seconds

        async def busy(client: int) -> None:
            nonlocal declared
            while (start := time.perf_counter()) < until:
                try:
                    await self.ask(client)
                except CloisterError as error:
                    errors[error.code] += 1
                    declared += isinstance(error, Overloaded)
                    await asyncio.sleep(REFUSED_PAUSE)
                    continue
                latencies.append(time.perf_counter() - start)

        await asyncio.gather(*map(busy, range(clients)))
        return Slice(
            seconds=time.perf_counter() - began,
            latencies=tuple(latencies),
            errors=dict(errors),
            declared=declared,
            cpu=time.process_time() - used,
        )


class _Cloister(_Asked):
    """The confidential service, by clients that verify it first.

    Args:
        url: Of the gateway.
        policy: File of what the users demand.
        identities: Files of the users, who take turns.
        model: Its id.
        plain: File of the same model, for the input and the answer that it must give.
    """

    def __init__(self, *, url: str, policy: str, identities: Sequence[str], model: str, plain: str) -> None:
        self._url = url
        self._policy = UserPolicy.from_toml(Path(policy).read_text())
        self._identities = [Identity.load(Path(file)) for file in identities]
        self._model = model
        self._inputs, self._expected = question(Path(plain))
        self._clients: list[AsyncClient] = []

    async def prepare(self, clients: int) -> None:
        while len(self._clients) * SHARED < clients:
            identity = self._identities[len(self._clients) % len(self._identities)]
            client = AsyncClient(self._url, policy=self._policy, identity=identity)
            self._clients.append(client)
            await client.verify()
        await self.ask(clients - 1)

    async def ask(self, client: int) -> None:
        outputs = await self._clients[client // SHARED].infer(self._model, self._inputs)
        if any(not np.array_equal(outputs[name], value) for name, value in self._expected.items()):
            raise CloisterError("another answer", code="wrong-answer")

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()


class _Http(_Asked):
    """Any HTTP/1.1 server, by one request that never changes.

    Args:
        port: Of the server, on this machine.
        path: Where to POST.
        fields: Header fields.
        body: File of the request's body.
        answer: File of bytes that stand in every right answer.
    """

    def __init__(self, *, port: int, path: str, fields: dict[str, str], body: str, answer: str) -> None:
        self._peer = Peer(host="127.0.0.1", port=port)
        self._path = path.encode()
        self._fields = [(b"host", b"localhost")]
        self._fields += [(name.encode(), value.encode()) for name, value in fields.items()]
        self._body, self._answer = Path(body).read_bytes(), Path(answer).read_bytes()
        self._link: Upstream | None = None
        self._idle = 0

    async def prepare(self, clients: int) -> None:
        if self._link is None or clients > self._idle:
            await self.aclose()
            self._idle = clients
            self._link = Upstream(self._peer, max_idle=clients, limits=Limits(max_body=64 << 20))
        await self.ask(0)

    async def ask(self, client: int) -> None:
        assert self._link is not None
        answer = await self._link.request(b"POST", self._path, self._fields, self._body, timeout=PATIENCE)
        if answer.status in _OVERLOADED:
            raise Overloaded(code=f"http.{answer.status}")
        if answer.status != 200:
            raise TransportError(f"status {answer.status}", code=f"http.{answer.status}")
        if bytes(answer.body).find(self._answer) < 0:
            raise CloisterError("another answer", code="wrong-answer")

    async def aclose(self) -> None:
        if self._link is not None:
            await self._link.aclose()


class _Bare:
    """ONNX Runtime in this process.

    Args:
        plain: File of the model.
    """

    def __init__(self, *, plain: str) -> None:
        self._session = bare_session(Path(plain))
        self._inputs = sample(self._session)
        self._names = [output.name for output in self._session.get_outputs()]

    async def prepare(self, clients: int) -> None:
        self._session.run(self._names, self._inputs)

    async def run(self, clients: int, seconds: float) -> Slice:
        """Call it from as many threads as there are clients."""
        latencies: list[float] = []  # appending is atomic
        used, began = time.process_time(), time.perf_counter()

        def busy() -> None:
            while (start := time.perf_counter()) < began + seconds:
                self._session.run(self._names, self._inputs)
                latencies.append(time.perf_counter() - start)

        threads = [threading.Thread(target=busy) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        return Slice(
            seconds=time.perf_counter() - began,
            latencies=tuple(latencies),
            cpu=time.process_time() - used,
        )

    async def aclose(self) -> None:
        return None


KINDS: Final[dict[str, Callable[..., Target]]] = {"bare": _Bare, "cloister": _Cloister, "http": _Http}


def question(model: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """An input for a model, and the answer of bare ONNX Runtime."""
    session = bare_session(model)
    inputs = sample(session)
    names = [output.name for output in session.get_outputs()]
    return inputs, dict(zip(names, session.run(names, inputs), strict=True))


async def _serve() -> None:
    targets: dict[str, Target] = {}
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            try:
                answer = await _obey(targets, json.loads(line))
            except (CloisterError, OSError) as error:
                answer = {"failed": f"{type(error).__name__}: {error}"[:400]}
            print(json.dumps(answer), flush=True)
    finally:
        for target in targets.values():
            await target.aclose()


async def _obey(targets: dict[str, Target], order: dict[str, Any]) -> dict[str, Any]:
    name = order["name"]
    if order["do"] == "open":
        targets[name] = KINDS[order["kind"]](**order["target"])
        await targets[name].prepare(1)
        return {}
    if order["do"] == "close":
        await targets.pop(name).aclose()
        return {}
    await targets[name].prepare(order["clients"])
    found = await targets[name].run(order["clients"], order["seconds"])
    return {
        "seconds": found.seconds,
        "latencies": [round(each, 7) for each in found.latencies],
        "errors": found.errors,
        "declared": found.declared,
        "cpu": found.cpu,
    }


if __name__ == "__main__":
    run_loop(_serve())
