"""The owner's index, load and unload, against a service in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister.core.protocol import repository
from cloister.core.secret import Secret
from cloister.enclave.worker.models import slot_name
from cloister.errors import AccessRefused, BindingRefused, CloisterError, FormatError, NotFound, UsageError
from cloister.owner.desk import Desk
from cloister.owner.repository import ModelRepository
from support.stage import Theatre


@pytest.fixture
def theatre() -> Iterator[Theatre]:
    made = Theatre()
    yield made
    made.close()


def connection(theatre: Theatre, folder: Path, **options: Any) -> ModelRepository:
    policy = theatre.stage.user_policy()
    return ModelRepository(
        options.pop("desk", None) or Desk(folder, theatre.realm.owner),
        "http://service.test",
        service=policy.service,
        key_service=policy.key_service,
        now=theatre.realm.clock.now,
        transport=theatre.transport(),
    )


def in_memory(theatre: Theatre) -> bool:
    return theatre.stage.worker._models.holds(slot_name(theatre.stage.current))


def test_load_and_unload(theatre, tmp_path):
    with connection(theatre, tmp_path) as made:
        assert [(each["name"], each["state"]) for each in made.index()] == [
            (theatre.stage.model, "UNAVAILABLE")
        ]
        made.load("digits")
        assert in_memory(theatre)
        assert [each["state"] for each in made.index()] == ["READY"]
        made.load("digits")
        made.unload("digits")
        assert not in_memory(theatre)


def test_a_model_that_is_not_served(theatre, tmp_path):
    with connection(theatre, tmp_path) as made:
        with pytest.raises(NotFound):
            made.load("nonesuch")
        with pytest.raises(UsageError):
            made.load("a/b")


def test_somebody_elses_desk(theatre, tmp_path):
    with connection(theatre, tmp_path, desk=Desk.create(tmp_path / "other")) as made:
        for act in (made.index, lambda: made.load("digits"), lambda: made.unload("digits")):
            with pytest.raises(NotFound) as caught:
                act()
            assert caught.value.code == "not-found.pool"


@pytest.mark.parametrize("others", [1, 2, 3])
def test_a_pool_of_several_workers(theatre, tmp_path, others):
    """The gateway deals requests out in turn: a nonce comes from one worker, the request meets the next."""
    mine = theatre.stage.routes._repository._nonces
    workers = [mine, *(type(mine)() for _ in range(others))]
    real, turn = theatre.stage.worker.server._handler, iter(range(1000))

    async def dealing(request):
        theatre.stage.routes._repository._nonces = workers[next(turn) % len(workers)]
        return await real(request)

    theatre.stage.worker.server._handler = dealing
    with connection(theatre, tmp_path) as made:
        made.load("digits")
        made.unload("digits")


def test_workers_that_never_know_their_nonces(theatre, tmp_path):
    real = theatre.stage.worker.server._handler

    async def forgetting(request):
        theatre.stage.routes._repository._nonces._key = Secret(b"another key of thirty-two bytes.")
        answer = await real(request)
        theatre.stage.routes._repository._nonces._key = Secret(b"one more key of thirty-two bytes")
        return answer

    theatre.stage.worker.server._handler = forgetting
    with connection(theatre, tmp_path) as made:
        made.index()
        real_split = forgetting

        async def broken(request):
            if request.http.path == repository.NONCE:
                return await real_split(request)
            return await real(request)

        theatre.stage.worker.server._handler = broken
        with pytest.raises(BindingRefused) as caught:
            made.load("digits")
        assert caught.value.code == "binding.challenge"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"nonce": 1}', b'{"nonce": "x"}', b"\xff"])
def test_a_nonce_that_is_none(theatre, tmp_path, content):
    from cloister.core.ohttp import bhttp

    async def answering(request):
        return bhttp.Response(status=200, content=content)

    theatre.stage.worker.server._handler = answering
    with connection(theatre, tmp_path) as made:
        with pytest.raises(FormatError):
            made.load("digits")
        if content not in (b"[]", b"{}"):
            with pytest.raises(CloisterError):
                made.index()


def test_a_refusal_is_passed_on(theatre, tmp_path):
    async def refusing(request):
        if request.http.path == repository.NONCE:
            return await theatre.stage.routes(request)
        raise AccessRefused(code="access.owner", claim="owner", expected="a", actual="b")

    theatre.stage.worker.server._handler = refusing
    with connection(theatre, tmp_path) as made, pytest.raises(AccessRefused) as caught:
        made.unload("digits")
    assert caught.value.code == "access.owner"
