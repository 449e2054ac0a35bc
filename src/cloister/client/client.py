"""The client: numpy arrays in, numpy arrays out; everything between is verified, sealed and signed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import numpy as np

from cloister.client.identity import Identity
from cloister.client.session import Session, model_path
from cloister.core import oip
from cloister.core.ohttp import bhttp
from cloister.core.protocol import repository
from cloister.core.protocol.document import VerifiedDocument
from cloister.core.protocol.flow import Flow
from cloister.core.protocol.limits import MAX_INNER_REQUEST
from cloister.core.protocol.stages import REUSE
from cloister.core.protocol.trust import UserPolicy
from cloister.core.verifier.result import Step, VerifiedEvidence
from cloister.errors import FormatError, InvalidRequest, UsageError
from cloister.party.carry import AsyncCarrier, Carrier
from cloister.party.steps import told

Array = oip.Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was verified before a request left, step by step, and how long the last answer took.

    Attributes:
        steps: Every check of the service document, in order.
        service: Service id (32 bytes).
        simulated: Whether the service runs in the simulated TEE.
        epoch: The service epoch.
        not_after: Until when the verification is reused, Unix seconds.
        stages: Stage -> milliseconds of the last answer, as the enclave measured them: ``launch``,
            ``attest`` and ``release`` of a cold one; ``release``, ``open``, ``build`` and ``wait`` where it
            waited for them; always ``decrypt``, ``queue``, ``run``, ``encode``, and ``enclave``, which is all
            but the answer's encryption.
        evidence: The key service's, which some steps speak of; None where nobody has it.
        reuse: ``"cold"`` for the first answer of an enclave, ``"warm"`` for one that waited for keys or for
            its model, ``"hot"`` for all others; empty where the enclave didn't say.
        batch: How many requests ran together with it, itself included; 0 where the enclave didn't say.
    """

    steps: tuple[Step, ...]
    service: bytes
    simulated: bool
    epoch: int
    not_after: int
    stages: dict[str, float] = field(default_factory=dict)
    batch: int = 0
    reuse: str = ""
    evidence: VerifiedEvidence | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; steps as they were taken, with their numbers."""
        return {
            "service": self.service.hex(),
            "simulated": self.simulated,
            "epoch": self.epoch,
            "not_after": self.not_after,
            "steps": [step.to_dict() for step in self.steps],
            "stages_ms": self.stages,
            "batch": self.batch,
            "reuse": self.reuse,
        }

    def __str__(self) -> str:
        """One line for each step, as `cloister verify` tells them."""
        return "\n".join(step.line() for step in told(self.steps, self.evidence))


class _Base:
    """What both clients share: the session and the forms of requests and answers."""

    def __init__(
        self,
        *,
        policy: UserPolicy,
        identity: Identity | None = None,
        memory: Path | None = None,
        aliases: dict[str, str] | None = None,
        now: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        self._session = Session(
            policy=policy, identity=identity, now=now, memory=memory, aliases=dict(aliases or {})
        )
        self._stages: dict[str, float] = {}
        self._batch = 0
        self._reuse = ""

    @property
    def session(self) -> Session:
        """The protocol's state, for transports that are built on it."""
        return self._session

    @property
    def record(self) -> Record:
        """What was verified; raises NotFound before the first verification."""
        verified = self._session.conversation.current()
        return Record(
            steps=self._session.conversation.steps,
            service=verified.document.service,
            simulated=verified.attested.evidence.simulated,
            epoch=verified.document.epoch,
            not_after=verified.not_after,
            stages=dict(self._stages),
            batch=self._batch,
            reuse=self._reuse,
            evidence=verified.attested.evidence,
        )

    def _infer(
        self, model: str, inputs: dict[str, Array], outputs: tuple[str, ...], deadline_ms: int | None
    ) -> Flow[dict[str, Array]]:
        model = self._session.resolve(model)
        _require_arrays(inputs)
        header, buffers = oip.encode_request(inputs, outputs=outputs)
        _require_size(len(header) + sum(buffer.nbytes for buffer in buffers))
        fields = [(b"content-type", b"application/octet-stream"), (oip.HEADER_LENGTH, b"%d" % len(header))]
        if deadline_ms is not None:
            fields.append((b"cloister-deadline-ms", b"%d" % deadline_ms))
        inner = bhttp.Request(
            method=b"POST",
            path=model_path(model, "infer"),
            fields=tuple(fields),
            content=header,
            more=tuple(buffers),
        )
        try:
            response = yield from self._session.request(model, inner)
        except InvalidRequest as error:
            _speak_numpy(error)
            raise
        timing = response.field(b"server-timing")
        self._stages, self._batch = parse_stages(timing), parse_batch(timing)
        self._reuse = parse_reuse(timing)
        return oip.decode_response(memoryview(response.content), response.field(oip.HEADER_LENGTH))

    def _metadata(self, model: str) -> Flow[dict[str, Any]]:
        model = self._session.resolve(model)
        inner = bhttp.Request(method=b"GET", path=model_path(model))
        response = yield from self._session.request(model, inner)
        try:
            found = json.loads(bytes(response.content))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise FormatError("the answer is no model's metadata", claim="metadata")
        return found

    def _index(self, model: str) -> Flow[list[dict[str, str]]]:
        model = self._session.resolve(model)
        inner = bhttp.Request(method=b"POST", path=repository.INDEX, content=b"{}")
        response = yield from self._session.request(model, inner)
        entries: list[dict[str, str]] = json.loads(bytes(response.content))
        return entries


class Client(_Base):
    """A synchronous client of one service. Use it as a context manager, from one thread at a time.

    Args:
        url: Of any gateway of the service; nothing about it is trusted.
        policy: What must hold before a request leaves.
        identity: Who asks; None for a client that only verifies.
        memory: File that keeps what was seen of the service between runs, so that a rollback is noticed.
        aliases: Short names for model ids.
        transport: An httpx transport for the outer requests, for tests and special networks.
        now: The user's own clock, Unix seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        policy: UserPolicy,
        identity: Identity | None = None,
        memory: Path | None = None,
        aliases: dict[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
        now: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        super().__init__(policy=policy, identity=identity, memory=memory, aliases=aliases, now=now)
        self._carrier = Carrier(url, transport)

    def verify(self) -> VerifiedDocument:
        """Fetch the service document and verify it in full, whatever is cached."""
        return self._carrier.run(self._session.refresh())

    def infer(
        self,
        model: str,
        inputs: dict[str, Array],
        *,
        outputs: tuple[str, ...] = (),
        deadline_ms: int | None = None,
        timeout: float | None = None,
    ) -> dict[str, Array]:
        """Run a model on arrays; gives the outputs by name.

        Args:
            model: Model id ``<owner>/<name>`` or an alias.
            inputs: Input name -> array, with the model's own shapes and types.
            outputs: Names of the outputs wanted; empty for all.
            deadline_ms: Milliseconds within which the run must begin, once the enclave has the request; a
                request that misses it isn't sent again.
            timeout: Seconds by which the answer must be here, all attempts included; None: two minutes for
                each attempt, and more for a large body.

        Raises:
            UsageError: the inputs are no arrays by name.
            Refused: the service, its workers or this user are not what they must be.
            InvalidRequest: the model can't answer this input.
            DeadlineExceeded: the run didn't begin in time.
            TransportError: nobody answered, or not in time.
            Unavailable: several attempts failed.
        """
        return self._carrier.run(self._infer(model, inputs, outputs, deadline_ms), timeout)

    def metadata(self, model: str) -> dict[str, Any]:
        """The model's metadata (Open Inference Protocol): its name, versions, inputs and outputs.

        Raises:
            FormatError: the answer is none.
        """
        return self._carrier.run(self._metadata(model))

    def index(self, model: str) -> list[dict[str, str]]:
        """The models of the same owner and pool that are granted to this user (model repository extension).

        Each has ``name``, ``version``, ``state`` (``READY`` where the worker that answers holds it in memory)
        and ``reason``.
        """
        return self._carrier.run(self._index(model))

    def send(self, model: str, inner: bhttp.Request, *, timeout: float | None = None) -> bhttp.Response:
        """Send any inner request for a model; ``timeout`` as for `infer`."""
        return self._carrier.run(self._session.request(model, inner), timeout)

    def close(self) -> None:
        """Close the connections."""
        self._carrier.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Base):
    """The same for asyncio; any number of tasks may share one."""

    def __init__(
        self,
        url: str,
        *,
        policy: UserPolicy,
        identity: Identity | None = None,
        memory: Path | None = None,
        aliases: dict[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        now: Callable[[], int] = lambda: int(time.time()),
    ) -> None:
        super().__init__(policy=policy, identity=identity, memory=memory, aliases=aliases, now=now)
        self._carrier = AsyncCarrier(url, transport)

    async def verify(self) -> VerifiedDocument:
        """As `Client.verify`."""
        return await self._carrier.run(self._session.refresh())

    async def infer(
        self,
        model: str,
        inputs: dict[str, Array],
        *,
        outputs: tuple[str, ...] = (),
        deadline_ms: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> dict[str, Array]:
        """As `Client.infer`."""
        return await self._carrier.run(self._infer(model, inputs, outputs, deadline_ms), timeout)

    async def metadata(self, model: str) -> dict[str, Any]:
        """As `Client.metadata`."""
        return await self._carrier.run(self._metadata(model))

    async def index(self, model: str) -> list[dict[str, str]]:
        """As `Client.index`."""
        return await self._carrier.run(self._index(model))

    async def send(
        self,
        model: str,
        inner: bhttp.Request,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> bhttp.Response:
        """As `Client.send`."""
        return await self._carrier.run(self._session.request(model, inner), timeout)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._carrier.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _require_arrays(inputs: object) -> None:
    """Refuse what is no mapping of names to arrays; raises UsageError, or InvalidRequest for one value."""
    if not isinstance(inputs, Mapping) or not all(isinstance(name, str) for name in inputs):
        raise UsageError(
            "the inputs are no arrays by name",
            code="request.inputs",
            claim="inputs",
            expected="a dict of input name to numpy array",
            actual=type(inputs).__name__,
        )
    for name, array in inputs.items():
        if not isinstance(array, np.ndarray):
            raise InvalidRequest(
                "an input is no array",
                code="request.datatype",
                claim=f"input {name[:80]}",
                expected="a numpy array",
                actual=type(array).__name__,
                hint='Make one, with the type that the model takes: numpy.asarray(VALUES, dtype="float32")',
            )


def _speak_numpy(error: InvalidRequest) -> None:
    """Name a datatype that the model wants as NumPy does, and how to get there."""
    if error.code == "request.datatype" and error.expected in oip.DTYPES:
        name = oip.numpy_name(error.expected)
        if not error.hint and error.expected != "BYTES":
            error.hint = f'Convert the array with .astype("{name}")'
        error.expected = f"{name} ({error.expected})"


def _require_size(size: int) -> None:
    """Refuse inputs that no enclave takes, before they are copied and sealed; raises InvalidRequest."""
    if size > MAX_INNER_REQUEST:
        raise InvalidRequest(
            "the inputs are too large for one request",
            code="request.size",
            claim="size of the inputs",
            expected=f"at most {MAX_INNER_REQUEST} B",
            actual=f"{size} B",
            hint="Send them in several requests",
        )


def parse_stages(field: bytes | None) -> dict[str, float]:
    """Stage -> milliseconds, from a ``server-timing`` field (W3C Server Timing)."""
    stages = {}
    for part in (field or b"").decode("ascii", "replace").split(","):
        name, _, duration = part.strip().partition(";dur=")
        try:
            stages[name] = float(duration)
        except ValueError:
            continue
    return stages


def parse_batch(field: bytes | None) -> int:
    """How many requests ran together: ``batch;desc=N`` of a ``server-timing`` field; 0 where it isn't."""
    count = _described(field, "batch")
    return int(count) if count.isascii() and count.isdigit() and len(count) < 6 else 0


def parse_reuse(field: bytes | None) -> str:
    """The ladder's step: ``reuse;desc=...`` of a ``server-timing`` field; empty where it is none."""
    step = _described(field, "reuse")
    return step if step in REUSE else ""


def _described(field: bytes | None, wanted: str) -> str:
    for part in (field or b"").decode("ascii", "replace").split(","):
        name, _, text = part.strip().partition(";desc=")
        if name == wanted:
            return text
    return ""
