"""What REST and gRPC share: names, limits, and the way to the enclave."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from cloister.client.client import AsyncClient, parse_reuse, parse_stages
from cloister.client.proxy.names import Names, accepted_models
from cloister.client.proxy.room import Place, Room
from cloister.client.session import model_path
from cloister.core.ohttp import bhttp
from cloister.core.ohttp.fields import Fields
from cloister.core.protocol import problem
from cloister.core.protocol.document import VerifiedDocument
from cloister.errors import AccessRefused, CloisterError, NotFound, Refused

_VERSION: Final = "1"
_NOT_HERE: Final = "model_repository"  # an extension of enclaves whose routes the proxy hasn't
_BY_CODE: Final = {
    "request.size": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "proxy.encoding": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "proxy.method": HTTPStatus.METHOD_NOT_ALLOWED,
    "proxy.timeout": HTTPStatus.REQUEST_TIMEOUT,
    "identity.none": HTTPStatus.INTERNAL_SERVER_ERROR,
}
_EDGE: Final[problem.Statuses] = ((AccessRefused, 403), (Refused, 502))


@dataclass(slots=True, kw_only=True)
class Forwarder:
    """Sends inner requests for local clients.

    Args:
        client: Verifies, seals and signs; whoever made it closes it.
        room: What is held at once.

    Attributes:
        stages: Stage -> milliseconds of the last inference, as the enclave measured them.
        reuse: Whether that was cold, warm or hot (`Record`).
    """

    client: AsyncClient
    room: Room = field(default_factory=Room)
    names: Names = field(init=False)
    stages: dict[str, float] = field(init=False, default_factory=dict)
    reuse: str = field(init=False, default="")
    _seen: VerifiedDocument | None = field(init=False, default=None)
    _seen_at: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.names = Names(self.client.session)

    @property
    def verified_at(self) -> int:
        """When the document that holds was verified, Unix seconds."""
        return self._seen_at

    async def ensure(self) -> VerifiedDocument:
        """A verified document that holds; verifies the service in full where there is none.

        Raises:
            CloisterError: what the verification refused, or why the service can't be reached.
        """
        session = self.client.session
        if not session.conversation.fresh(session.now()):
            await self.client.verify()
        self._note()
        return session.conversation.current()

    async def ready(self) -> bool:
        """Whether a verified document is held."""
        try:
            await self.ensure()
        except CloisterError:
            return False
        return True

    async def resolve(self, name: str) -> str:
        """The model id that a client means; a name that isn't known may be newer than our document.

        Raises:
            NotFound, UsageError: as `Names.resolve`.
        """
        await self.ensure()
        try:
            return self.names.resolve(name)
        except NotFound as error:
            if error.code != "not-found.model":
                raise
        await self.client.verify()
        self._note()
        return self.names.resolve(name)

    async def send(
        self, model: str, method: bytes, path: bytes, fields: Fields = (), content: bytes | bytearray = b""
    ) -> bhttp.Response:
        """Send one inner request for a model id; raises what `Session.request` raises."""
        inner = bhttp.Request(method=method, path=path, fields=fields, content=content)
        try:
            response = await self.client.send(model, inner)
        finally:
            self._note()
        timing = response.field(b"server-timing")
        if stages := parse_stages(timing):
            self.stages, self.reuse = stages, parse_reuse(timing)
        return response

    async def model(self, name: str, action: str = "", version: str = "") -> dict[str, Any]:
        """A model's metadata (no action) or readiness (``"ready"``)."""
        require_version(version)
        model = await self.resolve(name)
        path = model_path(model, f"versions/{version}" if version else "")
        path += b"/" + action.encode() if action else b""
        return _object(await self.send(model, b"GET", path))

    async def server(self) -> dict[str, Any]:
        """What an enclave of the first accepted model says of itself, without what the proxy hasn't."""
        await self.ensure()
        for model in accepted_models(self.client.session):
            found = _object(await self.send(model, b"GET", b"/v2"))
            extensions = found.get("extensions")
            if isinstance(extensions, list):
                found["extensions"] = [each for each in extensions if each != _NOT_HERE]
            return found
        return {"name": "cloister", "version": "1", "extensions": []}  # nobody to ask

    @contextmanager
    def enter(self) -> Iterator[Place]:
        """A place for one request; raises Overloaded."""
        with self.room.enter() as place:
            yield place

    def _note(self) -> None:
        session = self.client.session
        if session.conversation.verified is not self._seen:
            self._seen, self._seen_at = session.conversation.verified, session.now()


def status_of(error: CloisterError) -> int:
    """The HTTP status of an error: 403 the owner's or the proxy's no, 502 a service that can't be trusted."""
    return _BY_CODE.get(error.code) or problem.status_of(error, edge=_EDGE)


def text_of(error: CloisterError) -> str:
    """The text of an error in the protocol's form: its code, then what was compared."""
    return f"{error.code}: {error}"


def require_version(version: str) -> None:
    """Refuse another version than the one that a model has: statements replace each other. None is empty."""
    if version not in ("", _VERSION):
        raise NotFound(
            "the model has no such version",
            code="not-found.version",
            claim="model version",
            expected=f"{_VERSION}, or none",
            actual=version[:40],
        )


def _object(response: bhttp.Response) -> dict[str, Any]:
    try:
        found = json.loads(bytes(response.content))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CloisterError("the enclave's answer can't be read", code="problem")
    return found
