"""The model repository extension: who may see which models, and the owner's load and unload.

Numbered as the body cites it:

1. the lease holds; the signature is over this service, pool, epoch, encapsulation, and this route and model;
2. index: the signer owns a model, or is granted one; each sees those alone;
3. load, unload: the signer is the model's owner, under the current statement;
4. load, unload: one of the request's nonces is this worker's, fresh and unspent, and the signature covers it;
5. nothing is answered twice, and everything counts against the lease.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from cloister.core import oip
from cloister.core.ohttp import bhttp
from cloister.core.protocol import repository
from cloister.core.protocol.authorization import RequestAuthorization
from cloister.core.protocol.statement import owner_of
from cloister.enclave.challenges import Challenges
from cloister.enclave.clock import HintedClock
from cloister.enclave.server import InnerRequest, route_not_found
from cloister.enclave.worker.access import verify_request
from cloister.enclave.worker.answers import json_response, model_name
from cloister.enclave.worker.membership import LiveModel, Membership, lease_expired
from cloister.enclave.worker.models import ModelCache, slot_name
from cloister.enclave.worker.replay import ReplayGuard
from cloister.enclave.worker.scheduler import Scheduler
from cloister.errors import AccessRefused, BindingRefused, InvalidRequest, Overloaded

MAX_BODY: Final = 64 << 10  # bytes of JSON
_OVERRIDES: Final = ("config", "file:")  # parameters that would load another model than the sealed one


class RepositoryRoutes:
    """Answers ``/v2/repository/...``.

    Args:
        membership: Keys, statements, lease.
        models: Opened models.
        clock: Hinted by the host.
        replays: What was answered already; shared with inference.
        scheduler: Whose places loads take.
        current: The live model of an id under the statement that the signer accepted.
        require_live: Refuses a model whose statement was replaced since, or a lease that ran out.
    """

    def __init__(
        self,
        membership: Membership,
        models: ModelCache,
        clock: HintedClock,
        replays: ReplayGuard,
        scheduler: Scheduler,
        *,
        current: Callable[[str, bytes], Awaitable[LiveModel]],
        require_live: Callable[[str, LiveModel], None],
    ) -> None:
        self._membership = membership
        self._models = models
        self._clock = clock
        self._replays = replays
        self._scheduler = scheduler
        self._current = current
        self._require_live = require_live
        self._nonces = Challenges()

    async def __call__(self, request: InnerRequest) -> bhttp.Response:
        """Answer one inner request."""
        method, path = request.http.method, request.http.path
        if (method, path) == (b"GET", repository.NONCE):
            nonce = self._nonces.issue(self._clock.now())
            return json_response({"nonce": repository.join_nonces([nonce]).decode()})
        if (method, path) == (b"POST", repository.INDEX):
            return json_response(self._index(request))
        name, slash, action = path.removeprefix(repository.MODELS).rpartition(b"/")
        known = path.startswith(repository.MODELS) and slash and action in (b"load", b"unload")
        if method != b"POST" or not known:
            raise route_not_found(request)
        if action == b"load":
            await self._load(request, model_name(name))
        else:
            await self._unload(request, model_name(name))
        return json_response({})

    def _index(self, request: InnerRequest) -> list[dict[str, str]]:
        authorization, now = self._verified(request, repository.ENTIRE)  # step 1
        signer = authorization.user
        visible = [
            live
            for live in self._membership.models.values()
            if live.statement.owner == signer or live.statement.grants.get(signer, now) > now
        ]
        if not visible:  # step 2
            raise AccessRefused(
                "no model of this pool is the signer's, or granted to it",
                code="access.grant",
                claim="grant",
                expected="one model at least",
                actual="none",
            )
        only_ready = _parameters(request, "ready").get("ready") is True
        self._admit(request, authorization, now)  # step 5
        entries = [self._entry(live) for live in sorted(visible, key=lambda live: live.statement.model)]
        return [entry for entry in entries if entry["state"] == "READY" or not only_ready]

    def _entry(self, live: LiveModel) -> dict[str, str]:
        ready = self._models.holds(slot_name(live.statement))
        return {
            "name": live.statement.model,
            "version": oip.VERSION,
            "state": "READY" if ready else "UNAVAILABLE",
            "reason": "" if ready else "not in memory: the next request loads it",
        }

    async def _load(self, request: InnerRequest, model: str) -> None:
        parameters = _parameters(request, "parameters").get("parameters", {})
        if not isinstance(parameters, dict) or any(name.startswith(_OVERRIDES) for name in parameters):
            raise InvalidRequest(
                "a model is loaded as it was sealed",
                code="request.parameters",
                claim="parameters of load",
                expected="none of config and file:...",
                actual="one of them",
            )
        live = await self._authorized(request, model, "load")
        with self._scheduler.enter(live.statement.owner):  # a load takes a place, as an inference does
            async with self._models.use(live):
                self._require_live(model, live)  # the host may have made the load last

    async def _unload(self, request: InnerRequest, model: str) -> None:
        _parameters(request, "parameters")
        live = await self._authorized(request, model, "unload")
        if not self._models.drop(slot_name(live.statement)):
            raise Overloaded(
                "the model is in use",
                code="overloaded.in-use",
                claim="requests that use the model",
                expected=0,
                actual="some",
            )

    async def _authorized(self, request: InnerRequest, model: str, action: repository.Action) -> LiveModel:
        authorization, now = self._verified(request, repository.subject(model, action))  # step 1
        if authorization.user != owner_of(model):  # step 3
            raise AccessRefused(
                f"only the model's owner may {action} it",
                code="access.owner",
                claim="owner",
                expected=owner_of(model).hex(),
                actual=authorization.user.hex(),
            )
        live = await self._current(model, authorization.statement)
        authorization, now = self._verified(request, repository.subject(model, action))  # time went on
        self._spend_nonce(request, authorization, now)  # step 4
        self._admit(request, authorization, now)  # step 5
        return live

    def _spend_nonce(self, request: InnerRequest, authorization: RequestAuthorization, now: int) -> None:
        field = request.http.field(repository.FIELD)
        nonces = repository.split_nonces(field)
        if authorization.request_id != repository.request_id(cast(bytes, field)):
            raise BindingRefused(
                "the signature doesn't cover the nonces",
                code="binding.nonce",
                claim="request id",
                expected="the digest of the nonces",
                actual="another",
            )
        refusal: BindingRefused | None = None
        for nonce in nonces:
            try:
                self._nonces.spend(nonce, now)
            except BindingRefused as error:  # another worker's, or an old one
                refusal = error
            else:
                return
        assert refusal is not None
        raise refusal

    def _verified(self, request: InnerRequest, subject: str) -> tuple[RequestAuthorization, int]:
        if not self._membership.active:
            raise lease_expired()
        now = self._clock.now()
        return verify_request(self._membership, request, subject, now=now), now

    def _admit(self, request: InnerRequest, authorization: RequestAuthorization, now: int) -> None:
        self._replays.admit(
            enc=hashlib.sha256(request.enc).digest(),
            user=authorization.user,
            request_id=authorization.request_id,
            expiry=authorization.expiry,
            now=now,
        )
        self._membership.spend()


def _parameters(request: InnerRequest, known: str) -> dict[str, Any]:
    """The JSON object of a request, which may also be empty; raises InvalidRequest."""
    content = bytes(request.http.content[: MAX_BODY + 1])
    try:
        value = json.loads(content) if content and len(content) <= MAX_BODY else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or len(content) > MAX_BODY:
        raise InvalidRequest(
            code="request.header",
            claim=f"repository request ({known})",
            expected=f"a JSON object of at most {MAX_BODY} B",
            actual="something else",
        )
    return value
