"""The worker's inner routes: Open Inference Protocol v2, behind the user's signature and the owner's grant.

An inference, numbered as the body cites it:

1. authorization: a signature over this service, pool, epoch, model and encapsulation, not seen before;
2. consent: the statement that the user accepted is the current one, it grants the model to this user, and the
   worker's lease holds;
3. admission: a place in the worker, of which there are so many (`scheduler`);
4. the model, opened and built where it isn't in memory;
5. the tensors, checked against the model's inputs;
6. execution, when it is the user's turn (`scheduler`);
7. the answer, with the time that each stage took; the outputs are wiped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from cloister.core import oip
from cloister.core.ohttp import bhttp
from cloister.core.protocol import repository
from cloister.core.protocol.authorization import RequestAuthorization
from cloister.enclave.clock import HintedClock
from cloister.enclave.server import InnerRequest, route_not_found
from cloister.enclave.worker.access import verify_request
from cloister.enclave.worker.answers import (
    JSON,
    json_response,
    model_metadata,
    model_route,
    server_metadata,
)
from cloister.enclave.worker.batching import wipe_arrays
from cloister.enclave.worker.jobs import Call, Outcome, Place
from cloister.enclave.worker.membership import LiveModel, Membership, lease_expired
from cloister.enclave.worker.models import LoadedModel, ModelCache, slot_name
from cloister.enclave.worker.replay import ReplayGuard
from cloister.enclave.worker.repository import RepositoryRoutes
from cloister.enclave.worker.scheduler import Scheduler
from cloister.enclave.worker.stages import Ladder, Times, Waits
from cloister.errors import (
    AccessRefused,
    InvalidRequest,
    NotFound,
    Overloaded,
)

BINARY: Final = b"application/octet-stream"
TIMING: Final = b"server-timing"
DEADLINE: Final = b"cloister-deadline-ms"
MAX_WAITING: Final = 64  # requests that wait for a renewal


class WorkerRoutes:
    """Routes inner requests to models.

    Args:
        membership: Keys, statements, lease.
        models: Opened models.
        clock: Hinted by the host.
        scheduler: Runs models; owned by the caller.
        refresh: Asks the key service anew, at most once at a time, where a user knows a newer statement.
    """

    def __init__(
        self,
        membership: Membership,
        models: ModelCache,
        clock: HintedClock,
        scheduler: Scheduler,
        *,
        refresh: Callable[[], Awaitable[None]],
    ) -> None:
        self._membership = membership
        self._models = models
        self._clock = clock
        self._scheduler = scheduler
        self._refresh = refresh
        self._waiting = 0  # requests that wait for a renewal
        self._replays = ReplayGuard()
        self.ladder: Final = Ladder(membership.steps)
        self._repository = RepositoryRoutes(
            membership,
            models,
            clock,
            self._replays,
            self._scheduler,
            current=self._current,
            require_live=self._require_live,
        )

    async def __call__(self, request: InnerRequest) -> bhttp.Response:
        """Answer one inner request."""
        method, path = request.http.method, request.http.path
        if method == b"GET" and path == b"/v2/health/live":
            return json_response({"live": True})
        if method == b"GET" and path == b"/v2/health/ready":
            if not self._membership.active:
                raise lease_expired()  # the protocol's "no" is an error status
            return json_response({"ready": True})
        if method == b"GET" and path == b"/v2":
            return json_response(server_metadata())
        if path.startswith(repository.PREFIX):
            return await self._repository(request)
        model, action = model_route(path)
        if (method, action) not in ((b"POST", b"infer"), (b"GET", b""), (b"GET", b"ready")):
            raise route_not_found(request)
        waits = Waits()
        live, signed = await self._authorize(request, model, waits)
        # After the grant: strangers can't take places.
        with self._scheduler.enter(signed.user, request.body) as place:
            self._membership.spend()  # after the place: what is refused for load costs nothing of the lease
            if action == b"ready":
                return json_response({"name": model, "ready": True})
            there, began = self._models.holds(slot_name(live.statement)), time.monotonic()
            async with self._models.use(live) as (loaded, fresh):
                if fresh:
                    waits.open, waits.build = loaded.open_seconds, loaded.build_seconds
                elif not there:
                    waits.wait = time.monotonic() - began
                self._require_live(model, live)  # the host may have made the load last
                if action == b"":
                    return json_response(model_metadata(model, loaded))
                asked = _Asked(request=request, live=live, signed=signed, place=place, waits=waits)
                return await self._infer(asked, loaded)

    def _require_live(self, model: str, live: LiveModel) -> None:
        """Refuse a request whose statement was replaced, or whose lease ran out, since it was authorized."""
        current = self._membership.models.get(model)
        if current is None or current.digest != live.digest:
            raise _superseded(current, live.digest)
        if not self._membership.active:
            raise lease_expired()

    async def _authorize(
        self, request: InnerRequest, model: str, waits: Waits
    ) -> tuple[LiveModel, RequestAuthorization]:
        membership = self._membership
        if not membership.active:
            await self._wait_for_renewal(waits)
        now = self._clock.now()
        authorization = verify_request(membership, request, model, now=now)  # step 1
        live = await self._current(model, authorization.statement, waits)  # step 2
        if (later := self._clock.now()) > now:  # the host may have made the renewal last
            authorization, now = verify_request(membership, request, model, now=later), later
        live.statement.require_grant(authorization.user, now)
        self._replays.admit(  # after the grant: strangers leave nothing behind
            enc=hashlib.sha256(request.enc).digest(),
            user=authorization.user,
            request_id=authorization.request_id,
            expiry=authorization.expiry,
            now=now,
        )
        return live, authorization

    async def _current(self, model: str, accepted: bytes, waits: Waits | None = None) -> LiveModel:
        """The model under the statement that the user accepted; asks the key service where they differ."""
        live = self._membership.models.get(model)
        if live is None or live.digest != accepted:
            await self._wait_for_renewal(waits or Waits())
            live = self._membership.models.get(model)
        if live is None:
            raise NotFound(
                "the pool does not serve this model",
                code="not-found.model",
                claim="model",
                expected="one that the pool serves",
                actual=model[-80:],
            )
        if live.digest != accepted:
            raise _superseded(live, accepted)
        return live

    async def _wait_for_renewal(self, waits: Waits) -> None:
        """Anyone's request may lead here, so only a few wait at once; raises Overloaded for the others."""
        if self._waiting >= MAX_WAITING:
            raise Overloaded(
                claim="requests that wait for a renewal",
                expected=f"at most {MAX_WAITING}",
                actual=self._waiting,
            )
        self._waiting += 1
        began = time.monotonic()
        try:
            await self._refresh()
        finally:
            self._waiting -= 1
            waits.release += time.monotonic() - began

    async def _infer(self, asked: _Asked, loaded: LoadedModel) -> bhttp.Response:
        request, http = asked.request, asked.request.http
        inference = oip.decode_request(memoryview(http.content), http.field(oip.HEADER_LENGTH))
        outcome = await self._run(asked, loaded, inference)  # steps 5, 6
        ran = time.monotonic()
        try:
            header, buffers = oip.encode_response(  # step 7
                asked.live.statement.model,
                outcome.outputs,
                binary=inference.binary,
                forms=inference.forms,
                request_id=inference.id,
            )
            content = bytearray().join((header, *buffers))  # unlike bytes, it can be wiped
        finally:
            wipe_arrays(outcome.outputs)
        ended = time.monotonic()
        times = Times(
            decrypt=request.opened - request.arrived,
            queue=outcome.queue_seconds,
            run=outcome.run_seconds,
            encode=ended - ran,
            enclave=ended - request.arrived,
            batch=outcome.batch,
        )
        timing = self.ladder.answered(asked.waits, times)
        fields = [(b"content-type", BINARY if buffers else JSON), (TIMING, timing)]
        if buffers:
            fields.append((oip.HEADER_LENGTH, b"%d" % len(header)))
        return bhttp.Response(status=200, fields=tuple(fields), content=content)

    async def _run(self, asked: _Asked, loaded: LoadedModel, inference: oip.InferenceRequest) -> Outcome:
        statement = asked.live.statement
        call = Call(
            name=slot_name(statement),
            model=loaded,
            options=statement.options,
            inputs=_checked(inference, loaded),
            outputs=inference.outputs,
            deadline=_deadline(asked.request),
            shareable=asked.signed.allow_cross_user_batching,
            admit=partial(self._require_live, statement.model, asked.live),
        )
        return await self._scheduler.run(asked.place, call)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """An authorized request: what it says, under which statement, by whom signed, its place and waits."""

    request: InnerRequest
    live: LiveModel
    signed: RequestAuthorization
    place: Place
    waits: Waits


def _checked(inference: oip.InferenceRequest, loaded: LoadedModel) -> dict[str, oip.Array]:
    if inference.inputs.keys() != loaded.inputs.keys():
        raise InvalidRequest(
            code="request.inputs",
            claim="input names",
            expected=", ".join(sorted(loaded.inputs)),
            actual=", ".join(sorted(inference.inputs))[:400],
        )
    unknown = set(inference.outputs) - {spec.name for spec in loaded.outputs}
    if unknown:
        raise InvalidRequest(
            code="request.outputs",
            claim="output names",
            expected=", ".join(spec.name for spec in loaded.outputs),
            actual=", ".join(sorted(unknown))[:400],
        )
    return {name: spec.require(inference.inputs[name]) for name, spec in loaded.inputs.items()}


def _deadline(request: InnerRequest) -> float:
    """Monotonic seconds by which the request must have begun to run."""
    field = request.http.field(DEADLINE)
    if field is None:
        return float("inf")
    if not field.isdigit() or len(field) > 9:
        raise InvalidRequest(
            code="request.deadline", claim="deadline", expected="milliseconds", actual="no number"
        )
    return request.arrived + int(field) / 1e3


def _superseded(current: LiveModel | None, accepted: bytes) -> AccessRefused:
    return AccessRefused(
        "the user accepted another statement than the current one",
        code="access.statement",
        claim="accepted statement",
        expected=current.digest.hex() if current else "none: the model is gone",
        actual=accepted.hex(),
        hint="Fetch the service document again",
    )
