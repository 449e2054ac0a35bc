"""A user's side of the protocol without I/O: which pool, which key, which signature, what to do on failure.

A request goes through these steps, numbered as the body cites them:

1. the service document holds (verified in full once per validity), or is fetched and verified;
2. a pool serves the model, and every worker that it admits is one that the user's policy accepts;
3. a fresh encapsulation to the pool's preferred key that is on our list;
4. a signature over this service, pool, epoch, model, statement and encapsulation; both are made while the
   request before waits for its answer, where there was one;
5. the exchange; on a failure that may pass, all of it again with a new encapsulation.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes

from cloister.client.identity import Identity
from cloister.core.ohttp import bhttp, encapsulation
from cloister.core.ohttp.keyconfig import select
from cloister.core.protocol import outer, repository
from cloister.core.protocol.authorization import FIELD, REQUEST_ID_SIZE, RequestAuthorization, RequestContext
from cloister.core.protocol.conversation import Conversation, StaleKey, finish_exchange
from cloister.core.protocol.document import PoolEntry, ServedModel, ServiceDocument, VerifiedDocument
from cloister.core.protocol.flow import Flow, Pause
from cloister.core.protocol.statement import owner_of
from cloister.core.protocol.trust import UserPolicy
from cloister.errors import (
    AccessRefused,
    BindingRefused,
    CloisterError,
    DeadlineExceeded,
    FormatError,
    NotFound,
    TransportError,
    Unavailable,
    UsageError,
)
from cloister.party.memory import Memory

REQUEST_LIFETIME: Final = 120  # seconds
PREPARED_LIFETIME: Final = 30  # seconds that an encapsulation may wait for its request
MAX_PREPARED: Final = 8  # models for which one waits
RETRY_PAUSES: Final = (0.05, 0.2, 0.5, 1.0)  # seconds before each further attempt
SHARED_PAUSE: Final = 0.005  # seconds between looks at a verification that another task makes
_MODELS: Final = b"/v2/models/"
_MOST_COMPARED: Final = 256  # names that an unknown one is compared with
_HOW_TO_NAME: Final = (
    "Give <owner>/<name>, as `cloister verify URL` lists it; short names come from Client(aliases=...) and "
    "`cloister proxy --alias`"
)
# A model that fits no worker won't fit in a second; and nobody wants to wait five times as long.
_FINAL: Final = frozenset({"overloaded.model", "transport.timeout"})
_STALE: Final = frozenset({"access.statement", "binding.epoch", "binding.request"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where requests for a model go under one service document."""

    entry: PoolEntry
    served: ServedModel
    pool_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A key encapsulated, and the signature over it, for one request that is yet to be made."""

    place: _Place
    sealer: encapsulation.Encapsulation
    authorization: RequestAuthorization
    made: int  # Unix seconds
    process: int  # a fork has a copy of its keys, which no two requests may use


@dataclass(slots=True, kw_only=True)
class Session:
    """Everything a client knows of one service.

    Args:
        policy: What the user demands.
        identity: Who signs; None for a client that only verifies.
        now: The user's own clock, Unix seconds.
        memory: File that keeps the newest tree head and collateral between runs; None: for this run only.
        aliases: Short names for model ids; resolved here and nowhere else.
        pool_only: Leave the model out of the visible routing hints.
    """

    policy: UserPolicy
    identity: Identity | None
    now: Callable[[], int]
    memory: Path | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    pool_only: bool = True
    conversation: Conversation = field(init=False)
    _places: dict[str, _Place] = field(init=False, default_factory=dict)
    _placed: VerifiedDocument | None = field(init=False, default=None)  # the document that _places are of
    _prepared: dict[str, _Prepared] = field(init=False, default_factory=dict)  # by model
    _refreshing: bool = field(init=False, default=False)
    _failure: TransportError | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.conversation = Conversation(trust=self.policy.trust)
        Memory.load(self.memory).remind(self.conversation)

    def ensure(self) -> Flow[VerifiedDocument]:
        """The service document, verified in full unless it still holds (step 1)."""
        if self.conversation.fresh(self.now()):
            return self.conversation.current()
        return (yield from self.refresh())

    def refresh(self) -> Flow[VerifiedDocument]:
        """Fetch and verify the service document anew, and remember the head.

        Where another task does so already, its result serves this one too.
        """
        if self._refreshing:
            before, self._failure = self.conversation.verifications, None
            while self._refreshing:
                yield Pause(SHARED_PAUSE)
            if self.conversation.verifications > before:
                return self.conversation.current()
            if self._failure is not None:  # what the other could not reach, this one can't either
                raise TransportError(self._failure.message, code=self._failure.code) from self._failure
        self._refreshing = True
        try:
            Memory.load(self.memory).remind(self.conversation)  # another process may have seen more
            try:
                return (yield from self.conversation.refresh(self.now()))
            finally:
                Memory.of(self.conversation).save(self.memory)
        except TransportError as error:
            self._failure = error
            raise
        finally:
            self._refreshing = False

    def request(self, model: str, inner: bhttp.Request) -> Flow[bhttp.Response]:
        """Send one inner request for a model; retries by encapsulating anew (step 5).

        Args:
            model: Model id or alias.
            inner: Method, path, fields and content; the authorization is added here.

        Raises:
            CloisterError: the enclave's own answer, or why it could not be asked.
        """
        model = self.resolve(model)
        failure: CloisterError | None = None
        for pause in (0.0, *RETRY_PAUSES):
            if pause:
                yield Pause(pause)
            try:
                if failure is not None and _wants_refresh(failure):
                    yield from self._refresh_newer(failure)
                else:
                    yield from self.ensure()
                return (yield from self._attempt(model, inner))
            except DeadlineExceeded:
                raise  # another attempt would have a deadline of its own
            except Unavailable as error:
                if error.code in _FINAL:
                    raise
                failure = error
            except (AccessRefused, BindingRefused, NotFound) as error:
                # The enclave may hold a newer document than we; a cache on the way may lag behind.
                again = (
                    failure is not None and failure.code == error.code and error.code != "access.statement"
                )
                if again or not _wants_refresh(error):
                    raise
                failure = error
        assert failure is not None
        raise failure

    def resolve(self, model: str) -> str:
        """The model id that an alias stands for; raises FormatError where it is none."""
        model = self.aliases.get(model, model)
        try:
            owner_of(model)
        except FormatError as error:
            error.hint = error.hint or _HOW_TO_NAME
            raise
        return model

    def place(self, model: str) -> tuple[PoolEntry, ServedModel]:
        """The pool that serves a model and that the user's policy accepts (step 2).

        Raises:
            NotFound: no pool serves it.
            AppraisalRefused, AccessRefused: the user's policy accepts none of those that do.
        """
        place = self._place(model)
        return place.entry, place.served

    def _place(self, model: str) -> _Place:
        """`place`, looked up and compared with the policy once for each document."""
        verified = self.conversation.current()
        if verified is not self._placed:
            self._places.clear()
            self._prepared.clear()
            self._placed = verified
        place = self._places.get(model)
        if place is None:
            place = self._places[model] = self._find(verified.document, model)
        return place

    def _find(self, document: ServiceDocument, model: str) -> _Place:
        refusal: CloisterError = NotFound(
            "no pool of this service serves the model",
            code="not-found.model",
            claim="model",
            expected=model,
            actual=f"{sum(len(entry.models) for entry in document.pools)} other models",
            hint=_nearest(document, model),
        )
        for entry in document.pools_of(model):
            try:
                _require_owner(entry, model)
                self.policy.require_pool(entry)
            except CloisterError as error:
                refusal = error
                continue
            return _Place(entry=entry, served=entry.model(model), pool_id=entry.pool.id)
        raise refusal

    def _attempt(self, model: str, inner: bhttp.Request) -> Flow[bhttp.Response]:
        if self.identity is None:
            raise UsageError(
                "the client has no identity to sign with", code="identity.none", hint="Pass identity=..."
            )
        place = self._place(model)
        subject = repository.ENTIRE if inner.path == repository.INDEX else model
        identity, prepared = self.identity, self._prepared.pop(model, None) if subject == model else None
        if (
            prepared is None
            or prepared.place is not place
            or prepared.process != os.getpid()
            or not 0 <= self.now() - prepared.made <= PREPARED_LIFETIME
        ):
            prepared = self._prepare(place, model, identity, subject)
        field_line = (FIELD, prepared.authorization.to_field())
        signed = replace(inner, fields=(*inner.fields, field_line))
        hints = () if self.pool_only else ((outer.MODEL, model.encode()),)

        def meanwhile() -> None:
            if model in self._prepared or len(self._prepared) < MAX_PREPARED:
                self._prepared[model] = self._prepare(place, model, identity, model)

        pool = place.pool_id.hex().encode()
        return (yield from finish_exchange(prepared.sealer, pool, signed, hints, meanwhile))

    def _prepare(self, place: _Place, model: str, identity: Identity, subject: str) -> _Prepared:
        """Encapsulate a key (step 3) and sign it (step 4): both can be done before there is a request."""
        configuration, suite = select(place.entry.keys)
        sealer, now, consent = encapsulation.begin(configuration, suite), self.now(), self.policy.consent
        context = RequestContext(
            service=self.policy.service,
            pool=place.pool_id,
            epoch=place.entry.epoch,
            model=subject,
            enc=sealer.enc,
        )
        authorization = RequestAuthorization.sign(
            identity.key_at(owner_of(model)),
            context,
            statement=place.served.statement,
            request_id=os.urandom(REQUEST_ID_SIZE),
            expiry=now + REQUEST_LIFETIME,
            allow_cross_user_batching=consent.allow_cross_user_batching,
            allow_outside_stages=consent.allow_outside_stages,
        )
        return _Prepared(
            place=place, sealer=sealer, authorization=authorization, made=now, process=os.getpid()
        )

    def _refresh_newer(self, failure: CloisterError) -> Flow[VerifiedDocument]:
        """Fetch again; a service that can't be reached leaves us with the document that still holds."""
        try:
            return (yield from self.refresh())
        except TransportError:
            if isinstance(failure, StaleKey) or not self.conversation.fresh(self.now()):
                raise
            return self.conversation.current()


def _nearest(document: ServiceDocument, model: str) -> str:
    """A hint: the model of the same owner whose name is nearest. Another owner's may be bait."""
    owner, _, name = model.partition("/")
    served = {each.model for entry in document.pools for each in entry.models}
    names = sorted(each.partition("/")[2] for each in served if each.partition("/")[0] == owner)
    close = difflib.get_close_matches(name, names[:_MOST_COMPARED], n=1)
    return f"Did you mean {owner}/{close[0]}?" if close else "`cloister verify URL` lists what is served"


def _require_owner(entry: PoolEntry, model: str) -> None:
    """Refuse a pool that isn't shared and yet serves another owner's models; raises AccessRefused."""
    if not entry.pool.shared and entry.owner != owner_of(model):
        raise AccessRefused(
            "the pool belongs to another owner than the model",
            code="access.pool",
            claim="pool owner",
            expected=owner_of(model).hex(),
            actual=entry.owner.hex() if entry.owner else "none",
        )


def model_path(model: str, action: str = "") -> bytes:
    """Path of a model in the Open Inference Protocol."""
    return _MODELS + model.encode() + (b"/" + action.encode() if action else b"")


def model_of(path: bytes) -> str:
    """The model id or alias in a path of the Open Inference Protocol; raises UsageError."""
    return unquote_to_bytes(_model_part(path)).decode("ascii", "replace")


def path_of(path: bytes, model: str) -> bytes:
    """The same path with another model in it: an alias means nothing to an enclave; raises UsageError."""
    return _MODELS + model.encode() + path[len(_MODELS) + len(_model_part(path)) :]


def _model_part(path: bytes) -> bytes:
    rest = path.partition(b"?")[0]
    if not rest.startswith(_MODELS):
        raise UsageError(
            "only paths of models can be sent",
            code="request.path",
            claim="path",
            expected="/v2/models/...",
            actual=rest[:80].decode("ascii", "replace"),
        )
    rest = rest[len(_MODELS) :]
    for suffix in (b"/infer", b"/ready"):
        rest = rest.removesuffix(suffix)
    return rest.partition(b"/versions/")[0]


def _wants_refresh(failure: CloisterError) -> bool:
    return isinstance(failure, StaleKey) or failure.code in _STALE or failure.code == "not-found.model"
