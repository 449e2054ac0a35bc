"""The model repository extension: nobody sees another's models, only the owner loads, nothing works twice."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from cloister.core.identity import SigningKey
from cloister.core.ohttp import bhttp
from cloister.core.protocol import repository
from cloister.core.protocol.statement import model_id
from cloister.enclave.challenges import LIFETIME
from cloister.enclave.worker.membership import LiveModel
from cloister.enclave.worker.models import slot_name
from cloister.errors import (
    AccessRefused,
    BindingRefused,
    CloisterError,
    FormatError,
    InvalidRequest,
    LeaseExpired,
    NotFound,
    Overloaded,
    Replayed,
)
from enclave.conftest import hosting, seal_model
from enclave.test_routes import STRANGER, USER, Bench
from support.realm import DAY, NOW, owner_key

pytestmark = pytest.mark.asyncio
OWNER, OTHER = owner_key(), owner_key("another owner")


class Shelf(Bench):
    """A bench with three models: one granted to the user, one to nobody, one of another owner."""

    def __init__(self) -> None:
        granted = seal_model("granted", grants={USER.thumbprint: NOW + DAY})
        super().__init__(granted)
        hidden, foreign = seal_model("hidden", grants={STRANGER.thumbprint: NOW}), seal_model("foreign")
        said = dataclasses.replace(foreign.live.statement, model=model_id(OTHER.thumbprint, "foreign"))
        self.hidden, self.foreign = hidden.model, said.model
        self.membership.models[hidden.model] = hidden.live
        self.membership.models[said.model] = LiveModel(
            statement=said, digest=said.digest, key=foreign.live.key
        )
        self.cache._link = hosting(granted, hidden)  # type: ignore[assignment]

    async def nonce(self) -> bytes:
        answer = await self.ask(method=b"GET", path=b"/v2/repository/nonce", authorization=b"")
        return json.loads(bytes(answer.content))["nonce"].encode()

    def index_request(self, key: SigningKey, content: bytes = b"", **options: Any) -> Any:
        sign = {"model": repository.ENTIRE, **options.pop("sign", {})}
        return self.request(path=repository.INDEX, key=key, content=content, sign=sign, **options)

    async def index(self, key: SigningKey, content: bytes = b"") -> list[dict[str, str]]:
        return json.loads(bytes((await self.routes(self.index_request(key, content))).content))

    async def action(
        self,
        action: Any,
        model: str = "",
        *,
        nonce: bytes | None = None,
        key: SigningKey = OWNER,
        content: bytes = b"",
        **options: Any,
    ) -> Any:
        """One request, right but for what is said; a nonce of b"" leaves the field out."""
        model = model or self.model.model
        nonce = await self.nonce() if nonce is None else nonce
        live = self.membership.models.get(model)
        fields = ((repository.FIELD, nonce),) if nonce else ()
        sign = {"model": repository.subject(model, action), **options.pop("sign", {})}
        signed = {"request_id": repository.request_id(nonce), "statement": live.digest if live else bytes(32)}
        return self.request(
            path=repository.action_path(model, action),
            key=key,
            content=content,
            sign=sign,
            fields=fields,
            **{**signed, **options},
        )

    async def act(self, action: Any, model: str = "", **options: Any) -> bhttp.Response:
        return await self.routes(await self.action(action, model, **options))

    async def denied(self, kind: type[CloisterError], code: str, request: Any) -> None:
        spent, held = self.membership.spent, self.cache.held
        with pytest.raises(kind) as caught:
            await self.routes(request)
        assert caught.value.code == code, str(caught.value)
        assert (self.membership.spent, self.cache.held) == (spent, held)


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    made = Shelf()
    yield made
    made.scheduler.close()


def names(entries: list[dict[str, str]]) -> set[str]:
    return {entry["name"] for entry in entries}


# -- the index -----------------------------------------------------------------


async def test_everybody_sees_what_is_theirs_and_nothing_else(shelf):
    assert names(await shelf.index(USER)) == {shelf.model.model}
    assert names(await shelf.index(OWNER)) == {shelf.model.model, shelf.hidden}
    assert names(await shelf.index(OTHER)) == {shelf.foreign}


async def test_a_stranger_learns_nothing_and_leaves_nothing(shelf):
    """Nor does one whose grant ended."""
    await shelf.denied(AccessRefused, "access.grant", shelf.index_request(STRANGER))
    await shelf.denied(AccessRefused, "access.grant", shelf.index_request(owner_key("nobody")))
    assert len(shelf.routes._replays) == 0


async def test_an_index_is_signed_for_the_index_of_this_pool(shelf):
    for sign in (
        {"model": shelf.model.model},
        {"pool": b"Q" * 32},
        {"service": b"T" * 32},
        {"enc": b"e" * 32},
    ):
        await shelf.denied(BindingRefused, "binding.request", shelf.index_request(USER, sign=sign))
    await shelf.denied(
        AccessRefused, "access.authorization", shelf.request(path=repository.INDEX, authorization=b"")
    )
    infer = shelf.request(sign={"model": repository.ENTIRE})
    await shelf.denied(BindingRefused, "binding.request", infer)


async def test_an_index_is_answered_once_and_counts(shelf):
    request = shelf.index_request(USER)
    await shelf.routes(request)
    assert shelf.membership.spent == 1
    await shelf.denied(Replayed, "replayed.request", request)
    shelf.membership.active = False
    await shelf.denied(LeaseExpired, "lease-expired", shelf.index_request(USER))


async def test_the_states_of_models(shelf):
    unloaded = {
        "name": shelf.model.model,
        "version": "1",
        "state": "UNAVAILABLE",
        "reason": "not in memory: the next request loads it",
    }
    loaded = {**unloaded, "state": "READY", "reason": ""}
    assert await shelf.index(USER) == [unloaded]
    assert await shelf.index(USER, b'{"ready": true}') == []
    await shelf.act("load")
    assert await shelf.index(USER, b'{"ready": true}') == [loaded]
    await shelf.act("unload")
    assert await shelf.index(USER, b"{}") == [unloaded]


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"1", b"[" * 60_000, b" " * 70_000])
async def test_an_index_request_that_is_none(shelf, content):
    await shelf.denied(InvalidRequest, "request.header", shelf.index_request(USER, content))


# -- load and unload -----------------------------------------------------------


async def test_the_owner_loads_and_unloads(shelf):
    assert (await shelf.act("load")).status == 200
    assert shelf.cache.holds(slot_name(shelf.model.live.statement))
    assert (await shelf.act("load")).status == 200  # again changes nothing
    assert len(shelf.cache._slots) == 1
    assert (await shelf.act("unload", content=b'{"parameters": {"unload_dependents": true}}')).status == 200
    await asyncio.wait(set(shelf.cache._freeing), timeout=5)  # a thread wipes it
    assert shelf.cache.held == 0
    assert (await shelf.act("unload")).status == 200
    assert (await shelf.ask()).status == 200  # the next request loads it
    assert shelf.membership.spent == 5


@pytest.mark.parametrize("action", ["load", "unload"])
async def test_nobody_else_does(shelf, action):
    for key in (USER, STRANGER, OTHER):
        request = await shelf.action(action, key=key)
        await shelf.denied(AccessRefused, "access.owner", request)
    request = await shelf.action(action, shelf.foreign)
    await shelf.denied(AccessRefused, "access.owner", request)
    assert len(shelf.routes._replays) == 0


@pytest.mark.parametrize("action", ["load", "unload"])
async def test_a_copy_of_a_request(shelf, action):
    request = await shelf.action(action)
    await shelf.routes(request)
    await shelf.denied(Replayed, "replayed.challenge", request)


async def test_a_nonce_that_was_used_in_a_new_request(shelf):
    nonce = await shelf.nonce()
    await shelf.act("load", nonce=nonce)
    await shelf.denied(Replayed, "replayed.challenge", await shelf.action("unload", nonce=nonce))
    both = b",".join((nonce, await shelf.nonce()))
    await shelf.denied(Replayed, "replayed.challenge", await shelf.action("unload", nonce=both))


async def test_a_copy_at_another_worker_or_after_a_restart(shelf):
    """What inference may answer twice, a worker's memory must not obey twice."""
    request = await shelf.action("unload")
    await shelf.routes(request)
    again = Shelf()
    again.membership.models = shelf.membership.models
    try:
        await again.denied(BindingRefused, "binding.challenge", request)
    finally:
        again.scheduler.close()


async def test_a_stale_nonce(shelf):
    nonce = await shelf.nonce()
    shelf.clock.time += LIFETIME + 1
    request = await shelf.action("load", nonce=nonce, expiry=shelf.clock.time + 60)
    await shelf.denied(BindingRefused, "binding.challenge-expired", request)


async def test_no_nonce(shelf):
    await shelf.denied(AccessRefused, "access.nonce", await shelf.action("load", nonce=b""))


@pytest.mark.parametrize(
    "nonce",
    [
        b"x",
        b",",
        b"AAAA",
        base64.urlsafe_b64encode(bytes(57)),
        b",".join([base64.urlsafe_b64encode(bytes(56))] * (repository.MAX_NONCES + 1)),
    ],
)
async def test_nonces_that_are_none(shelf, nonce):
    request = await shelf.action("load", nonce=nonce)
    with pytest.raises(FormatError):
        await shelf.routes(request)


async def test_a_made_up_nonce(shelf):
    nonce = base64.urlsafe_b64encode(os.urandom(56))
    await shelf.denied(BindingRefused, "binding.challenge", await shelf.action("load", nonce=nonce))


async def test_nonces_that_the_signature_does_not_cover(shelf):
    request = await shelf.action("load", request_id=os.urandom(16))
    await shelf.denied(BindingRefused, "binding.nonce", request)


async def test_one_of_several_nonces_is_enough(shelf):
    """A pool has several workers, and which one a request meets is the gateway's choice."""
    elsewhere = [base64.urlsafe_b64encode(os.urandom(56)) for _ in range(repository.MAX_NONCES - 1)]
    assert (await shelf.act("load", nonce=b",".join([*elsewhere, await shelf.nonce()]))).status == 200


async def test_a_signature_for_another_action_or_model(shelf):
    for subject in (
        repository.subject(shelf.model.model, "unload"),
        repository.subject(shelf.hidden, "load"),
        shelf.model.model,
        repository.ENTIRE,
    ):
        request = await shelf.action("load", sign={"model": subject})
        await shelf.denied(BindingRefused, "binding.request", request)


async def test_another_statement_than_the_current_one(shelf):
    await shelf.denied(AccessRefused, "access.statement", await shelf.action("load", statement=b"s" * 32))
    assert shelf.refreshed == 1


async def test_a_model_that_the_pool_does_not_serve(shelf):
    request = await shelf.action("load", model_id(OWNER.thumbprint, "nonesuch"))
    await shelf.denied(NotFound, "not-found.model", request)


async def test_a_model_in_use_stays(shelf):
    live = shelf.model.live
    async with shelf.cache.use(live) as (loaded, _):
        with pytest.raises(Overloaded) as caught:
            await shelf.act("unload")
        assert caught.value.code == "overloaded.in-use"
        assert shelf.cache.holds(slot_name(live.statement))
        assert loaded.session is not None
    assert (await shelf.act("unload")).status == 200


async def test_a_statement_that_is_replaced_while_the_model_loads(shelf):
    real = shelf.cache.use

    def slow(live):
        shelf.membership.models = {}
        return real(live)

    shelf.cache.use = slow
    with pytest.raises(AccessRefused) as caught:
        await shelf.act("load")
    assert caught.value.code == "access.statement"


@pytest.mark.parametrize("name", ["config", "file:1/model.onnx"])
async def test_another_model_than_the_sealed_one_is_not_loaded(shelf, name):
    content = json.dumps({"parameters": {name: "e30="}}).encode()
    await shelf.denied(InvalidRequest, "request.parameters", await shelf.action("load", content=content))
    content = json.dumps({"parameters": [name]}).encode()
    await shelf.denied(InvalidRequest, "request.parameters", await shelf.action("load", content=content))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        (b"GET", b"index"),
        (b"POST", b"nonce"),
        (b"POST", b""),
        (b"POST", b"models/x"),
        (b"POST", b"models/load"),
        (b"GET", b"models/x/load"),
        (b"POST", b"models/x/reload"),
        (b"POST", b"x/load"),
    ],
)
async def test_other_routes(shelf, method, path):
    request = shelf.request(method=method, path=repository.PREFIX + path)
    await shelf.denied(NotFound, "not-found.route", request)


@pytest.mark.parametrize("name", [b"%ff", b"x", b"%2f"])
async def test_a_model_that_is_no_id(shelf, name):
    path = repository.MODELS + name + b"/load"
    with pytest.raises(CloisterError) as caught:
        await shelf.routes(shelf.request(path=path, content=b""))
    assert caught.value.code in ("format", "binding.request")


async def test_nonces_are_free_and_leave_nothing(shelf):
    assert len({await shelf.nonce() for _ in range(50)}) == 50
    assert (shelf.membership.spent, len(shelf.routes._replays)) == (0, 0)


async def test_a_load_takes_a_place(shelf):
    places = shelf.scheduler._places
    held = [shelf.scheduler.enter(bytes([number]) * 32) for number in range(places.capacity)]
    with pytest.raises(Overloaded) as caught:
        await shelf.act("load")
    assert caught.value.claim == "queue"
    assert not shelf.cache.holds(slot_name(shelf.model.live.statement))
    held.pop().__exit__(None, None, None)
    assert (await shelf.act("load")).status == 200
