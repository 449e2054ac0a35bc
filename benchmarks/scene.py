"""A real service to measure: its processes, an owner who published models, users who may use them."""

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
from cloister.client.session import model_path
from cloister.core.ohttp import bhttp
from cloister.errors import CloisterError
from cloister.owner.desk import Desk
from cloister.owner.policy import ModelPolicy
from cloister.owner.publish import Publisher
from cloister.owner.seal import seal_model

NAME: Final = "model"
_DAY: Final = 86400  # seconds
_PATIENCE: Final = 20.0  # seconds for a worker to learn of a model


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A running service.

    Attributes:
        url: Of its gateway.
        model: Id of the first published model.
        policy: What the users demand.
        identity: The first user.
        root: The service's folder.
        service: Its processes.
        settings: The enclaves' settings, as JSON.
        desk: The owner's.
        identities: Files of all users; each is granted every model.
    """

    url: str
    model: str
    policy: UserPolicy
    identity: Identity
    root: Path
    service: Service
    settings: str
    desk: Desk
    identities: tuple[Path, ...]

    @property
    def policy_file(self) -> Path:
        """Where `policy` stands as TOML."""
        return self.service.site.user_policy

    def client(self) -> Client:
        """A client of the first user."""
        return Client(self.url, policy=self.policy, identity=self.identity)

    def publish(self, name: str, model: Path) -> str:
        """Publish an ``.onnx`` file, or its next version; gives its id once a worker knows of it.

        Nothing loads it before its first request.
        """
        sealed = self.root / f"{name}.sealed"
        sealed.unlink(missing_ok=True)
        seal_model(self.desk, name, model, sealed)
        terms = ModelPolicy.from_toml(self.service.site.model_policy.read_text())
        policy = self.policy
        with Publisher(
            self.desk, self.url, service=policy.service, key_service=policy.key_service
        ) as publisher:
            publisher.publish(name, terms, sealed)
            for file in self.identities:
                user = Identity.load(file).user_id(self.desk.owner)
                publisher.grant(name, user, int(time.time()) + _DAY)
        sealed.unlink()
        self.wait(self.desk.model_id(name))
        return self.desk.model_id(name)

    def wait(self, model: str) -> None:
        """Wait until a worker serves the model: workers ask for what is new at most twice a second."""
        until = time.monotonic() + _PATIENCE
        inner = bhttp.Request(method=b"GET", path=model_path(model, "ready"))
        with self.client() as client:
            while True:
                try:
                    client.send(model, inner)
                    return
                except CloisterError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.1)

    def start_worker(self, name: str) -> None:
        """Start a worker enclave and its launcher; it may be one that ended."""
        self.service.start(name, "worker", "--name", name, "--pool", "default", "--settings", self.settings)


@contextmanager
def scene(
    model: Path, *, workers: int = 1, threads: int = 1, users: int = 1, memory_mib: int = 2048
) -> Iterator[Scene]:
    """A service that serves ``model`` (an ``.onnx`` file) until the block ends.

    Args:
        model: Published as `NAME`.
        workers: Worker enclaves.
        threads: Runs at once in each of them.
        users: How many may use every model.
        memory_mib: Models that a worker holds, in MiB.
    """
    root = Path(tempfile.mkdtemp(prefix="cloister-bench-"))  # short: Unix sockets lie in it
    service = Service(Site(root / "site"))
    settings = json.dumps(
        {"lease_seconds": 60, "document_seconds": 3600, "threads": threads, "memory_mib": memory_mib}
    )
    try:
        facts = bring_up(service, workers=workers, settings=settings)
        files = tuple(root / "users" / f"{number}.identity" for number in range(users))
        identities = [Identity.create(file) for file in files]
        desk = Desk.create(root / "desk")
        made = Scene(
            url=facts["url"],
            model=desk.model_id(NAME),
            policy=UserPolicy.from_toml(service.site.user_policy.read_text()),
            identity=identities[0],
            root=root,
            service=service,
            settings=settings,
            desk=desk,
            identities=files,
        )
        made.publish(NAME, model)
        yield made
    finally:
        service.stop()
        shutil.rmtree(root, ignore_errors=True)
