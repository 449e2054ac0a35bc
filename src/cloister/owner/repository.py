"""The owner's side of the model repository extension: what is in memory; load and unload (docs/protocol.md).

Which worker of a pool a request meets is the gateway's choice, and each worker obeys its own nonces alone. So
a request carries the nonces of every worker that has given one, and is tried again with more.
"""

from __future__ import annotations

import json
import os
from typing import Final

from cloister.core.ohttp import bhttp, encapsulation
from cloister.core.ohttp.keyconfig import select
from cloister.core.protocol import repository
from cloister.core.protocol.authorization import FIELD, REQUEST_ID_SIZE, RequestAuthorization, RequestContext
from cloister.core.protocol.conversation import finish_exchange
from cloister.core.protocol.document import PoolEntry
from cloister.core.protocol.flow import Flow
from cloister.errors import AccessRefused, BindingRefused, CloisterError, FormatError, NotFound
from cloister.owner.connection import Connection

LIFETIME: Final = 60  # seconds that a request may be under way
ATTEMPTS: Final = 5  # the nth asks for n nonces first
_OTHER_WORKER: Final = frozenset({"binding.challenge", "binding.challenge-expired"})


class ModelRepository(Connection):
    """What the workers of the owner's pools hold in memory."""

    def index(self) -> list[dict[str, str]]:
        """The owner's models, and whether the worker that answers holds them in memory.

        Raises:
            NotFound: the service has no pool with models of this owner.
        """
        return self._carrier.run(self._index())

    def load(self, name: str) -> None:
        """Have the worker that answers load a model; does nothing where it holds it."""
        self._carrier.run(self._act(name, "load"))

    def unload(self, name: str) -> None:
        """Have the worker that answers drop a model from memory; the next request for it loads it again.

        Raises:
            Overloaded: it is in use.
        """
        self._carrier.run(self._act(name, "unload"))

    def _index(self) -> Flow[list[dict[str, str]]]:
        yield from self._refresh()
        found: list[dict[str, str]] = []
        for pool in self._pools():
            response = yield from self._post(pool, repository.INDEX, repository.ENTIRE, bytes(32))
            try:
                found += [dict(entry) for entry in json.loads(bytes(response.content))]
            except (ValueError, TypeError, RecursionError) as error:
                raise FormatError("the index can't be read", claim="model index") from error
        return found

    def _act(self, name: str, action: repository.Action) -> Flow[None]:
        model = self._desk.model_id(name)
        nonces: list[bytes] = []
        failure: CloisterError | None = None
        for attempt in range(1, ATTEMPTS + 1):
            yield from self._refresh()
            pool = next((each for each in self._pools() if _serves(each, model)), self._pools()[0])
            for _ in range(attempt):
                nonces.append((yield from self._nonce(pool)))
            subject = repository.subject(model, action)
            path = repository.action_path(model, action)
            try:
                yield from self._post(pool, path, subject, pool.model(model).statement, nonces)
            except BindingRefused as error:
                if error.code not in _OTHER_WORKER:
                    raise
                failure = error
            except AccessRefused as error:
                if error.code != "access.statement":  # else the document at hand is behind the worker's
                    raise
                failure = error
            else:
                return
        assert failure is not None
        raise failure

    def _nonce(self, pool: PoolEntry) -> Flow[bytes]:
        configuration, suite = select(pool.keys)
        inner = bhttp.Request(method=b"GET", path=repository.NONCE)
        sealer = encapsulation.begin(configuration, suite)
        response = yield from finish_exchange(sealer, pool.pool.id.hex().encode(), inner)
        try:
            text = json.loads(bytes(response.content))["nonce"].encode()
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            raise FormatError("the nonce can't be read", claim="nonce") from error
        return repository.split_nonces(text)[0]

    def _post(
        self,
        pool: PoolEntry,
        path: bytes,
        subject: str,
        statement: bytes,
        nonces: list[bytes] | None = None,
    ) -> Flow[bhttp.Response]:
        configuration, suite = select(pool.keys)
        sealer = encapsulation.begin(configuration, suite)
        field = repository.join_nonces(nonces) if nonces else b""
        authorization = RequestAuthorization.sign(
            self._desk.key,
            RequestContext(
                service=self._conversation.trust.service,
                pool=pool.pool.id,
                epoch=pool.epoch,
                model=subject,
                enc=sealer.enc,
            ),
            statement=statement,
            request_id=repository.request_id(field) if field else os.urandom(REQUEST_ID_SIZE),
            expiry=self._now() + LIFETIME,
        )
        fields = [(FIELD, authorization.to_field())]
        if field:
            fields.append((repository.FIELD, field))
        inner = bhttp.Request(method=b"POST", path=path, fields=tuple(fields), content=b"{}")
        return (yield from finish_exchange(sealer, pool.pool.id.hex().encode(), inner))

    def _pools(self) -> list[PoolEntry]:
        """The owner's pools; raises NotFound where there is none."""
        pools = self._conversation.current().document.pools
        owned = [entry for entry in pools if entry.owner == self._desk.owner and entry.models]
        if not owned:
            raise NotFound(
                "no pool of this service has a model of the owner",
                code="not-found.pool",
                claim="pool",
                expected=f"one of owner {self._desk.owner.hex()[:16]}",
                actual="none",
            )
        return owned


def _serves(entry: PoolEntry, model: str) -> bool:
    return any(each.model == model for each in entry.models)
