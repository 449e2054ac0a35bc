"""A real service to measure: its processes, an owner who published one model, a user who may use it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister import Client, Identity, UserPolicy
from cloister.cli.site import Site
from cloister.cli.up import Service, bring_up
from cloister.errors import NotFound
from cloister.owner.desk import Desk
from cloister.owner.policy import ModelPolicy
from cloister.owner.publish import Publisher
from cloister.owner.seal import seal_model

NAME: Final = "model"
_DAY: Final = 86400  # seconds
_PATIENCE: Final = 20.0  # seconds for a worker to learn of the model


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A running service.

    Attributes:
        url: Of its gateway.
        model: Id of the published model.
        policy: What the user demands.
        identity: The user, who is granted the model.
        root: The service's folder.
    """

    url: str
    model: str
    policy: UserPolicy
    identity: Identity
    root: Path

    def client(self) -> Client:
        """A client of the user."""
        return Client(self.url, policy=self.policy, identity=self.identity)


@contextmanager
def scene(model: Path, *, workers: int = 1, threads: int = 1) -> Iterator[Scene]:
    """A service that serves ``model`` (an ``.onnx`` file) until the block ends."""
    root = Path(tempfile.mkdtemp(prefix="cloister-bench-"))  # short: Unix sockets lie in it
    service = Service(Site(root / "site"))
    settings = {"lease_seconds": 60, "document_seconds": 3600, "threads": threads, "memory_mib": 2048}
    try:
        facts = bring_up(service, workers=workers, settings=json.dumps(settings))
        yield _published(root, service.site, facts["url"], model)
    finally:
        service.stop()
        shutil.rmtree(root, ignore_errors=True)


def _published(root: Path, site: Site, url: str, model: Path) -> Scene:
    policy = UserPolicy.from_toml(site.user_policy.read_text())
    desk, identity = Desk.create(root / "desk"), Identity.create(root / "user" / "user.identity")
    sealed = root / "model.sealed"
    seal_model(desk, NAME, model, sealed)
    with Publisher(desk, url, service=policy.service, key_service=policy.key_service) as publisher:
        publisher.publish(NAME, ModelPolicy.from_toml(site.model_policy.read_text()), sealed)
        publisher.grant(NAME, identity.user_id(desk.owner), int(time.time()) + _DAY)
    made = Scene(url=url, model=desk.model_id(NAME), policy=policy, identity=identity, root=root)
    _wait(made)
    return made


def _wait(made: Scene) -> None:
    """Wait until a worker serves the model: workers ask for what is new at most twice a second."""
    until = time.monotonic() + _PATIENCE
    with made.client() as client:
        while True:
            try:
                client.metadata(made.model)
                return
            except NotFound:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
