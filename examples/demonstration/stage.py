"""Who is there: the operator's service, the owner's desk, two users. Each has a folder of its own.

Nothing of the owner's and the users' folders is given to the operator: what it holds is `Stage.operator`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import onnxruntime

from cloister.cli.site import Site
from cloister.cli.up import Service, bring_up
from cloister.client.client import Client
from cloister.client.identity import Identity
from cloister.core.protocol.trust import UserPolicy
from cloister.owner.desk import Desk
from cloister.owner.policy import ModelPolicy
from cloister.owner.publish import Publisher
from datasets import diagnosis_test, digits_test

Array = np.ndarray[Any, np.dtype[Any]]

MODELS: Final = Path(__file__).parents[1] / "models"
WORKERS: Final = 2
LEASE: Final = 6  # seconds
SETTINGS: Final = json.dumps({"lease_seconds": LEASE, "threads": 2})
POOL: Final = "default"
_LONGEST_ROOT: Final = 40  # characters; Unix sockets lie below it, and their paths end at 107


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A model of the examples with the test split that it never saw.

    Attributes:
        name: Its name at the owner.
        path: The committed ``.onnx`` file.
        source: Name of its input.
        samples: Float32, one sample a row.
        labels: Int64, the true class of each sample.
        classes: What the classes are called.
    """

    name: str
    path: Path
    source: str
    samples: Array
    labels: Array
    classes: tuple[str, ...]

    def plain(self) -> Callable[[Array], dict[str, Array]]:
        """The same file in plain ONNX Runtime, with the worker's thread settings."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(batch: Array) -> dict[str, Array]:
            return dict(zip(names, session.run(names, {self.source: batch}), strict=True))

        return run


def examples() -> tuple[Example, ...]:
    """The two models, with their test splits."""
    digits, diagnosis = digits_test(), diagnosis_test()
    return (
        Example(
            name="digits",
            path=MODELS / "digits.onnx",
            source="image",
            samples=digits[0],
            labels=digits[1],
            classes=tuple("0123456789"),
        ),
        Example(
            name="diagnosis",
            path=MODELS / "diagnosis.onnx",
            source="features",
            samples=diagnosis[0],
            labels=diagnosis[1],
            classes=("malignant", "benign"),
        ),
    )


class Witness(httpx.BaseTransport):
    """Remembers the encapsulated requests that a client sent, for the search's positive control."""

    def __init__(self) -> None:
        self._inner = httpx.HTTPTransport()
        self.sent: list[bytes] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Pass on."""
        if request.url.path == "/ohttp":
            self.sent.append(request.read())
        return self._inner.handle_request(request)

    def close(self) -> None:
        """Close the connections."""
        self._inner.close()


class Stage:
    """Folders and processes of one demonstration. `stop` ends every process; `remove` deletes the folders."""

    def __init__(self) -> None:
        folder = tempfile.gettempdir()
        short = folder if len(folder) <= _LONGEST_ROOT else "/tmp"
        self.root: Final = Path(tempfile.mkdtemp(prefix="cloister-demo-", dir=short))
        self.operator: Final = self.root / "operator"
        self.site: Final = Site(self.operator)
        self.service: Final = Service(self.site)
        self.capture: Final = self.operator / "capture.bin"
        self.user_identity: Final = self.root / "user" / "user.identity"
        self.desk: Final = Desk.create(self.root / "owner")
        self.user: Final = Identity.create(self.user_identity)
        self.visitor: Final = Identity.create(self.root / "visitor" / "visitor.identity")
        self.witness: Final = Witness()
        self.url = ""
        self._rogues: list[Service] = []
        self._client: Client | None = None

    def start(self, say: Callable[[str], None]) -> dict[str, str]:
        """Start the service; gives its facts."""
        self.operator.mkdir(mode=0o700)
        facts = bring_up(
            self.service, workers=WORKERS, settings=SETTINGS, pool=POOL, capture=self.capture, say=say
        )
        self.url = facts["url"]
        return facts

    def start_rogue(self, name: str, say: Callable[[str], None]) -> tuple[str, bytes]:
        """Start another key service, with a root and a gateway of its own; gives its URL and its id."""
        service = Service(Site(self.root / name))
        self._rogues.append(service)
        facts = bring_up(service, workers=0, settings=SETTINGS, say=say)
        return facts["url"], bytes.fromhex(facts["service"])

    def end(self, name: str) -> None:
        """End one process of the service."""
        process = self.service.processes.pop(name)
        process.terminate()
        process.wait(timeout=15)

    @cached_property
    def policy(self) -> UserPolicy:
        """What the user demands."""
        return UserPolicy.from_toml(self.site.user_policy.read_text())

    @cached_property
    def model_policy(self) -> ModelPolicy:
        """What the owner demands."""
        return ModelPolicy.from_toml(self.site.model_policy.read_text())

    @property
    def client(self) -> Client:
        """The user's client."""
        if self._client is None:
            self._client = Client(self.url, policy=self.policy, identity=self.user, transport=self.witness)
        return self._client

    def other_client(
        self, *, identity: Identity | None = None, policy: UserPolicy | None = None, **options: Any
    ) -> Client:
        """A client with another policy, identity or transport. The caller closes it."""
        return Client(self.url, policy=policy or self.policy, identity=identity or self.user, **options)

    def production_policy(self) -> UserPolicy:
        """The user's policy with the same reference values, under the vendors' roots."""
        return replace(
            self.policy,
            key_service=replace(self.policy.key_service, dangerous_simulated_roots=None),
            worker=replace(self.policy.worker, dangerous_simulated_roots=None),
        )

    def publisher(self) -> Publisher:
        """The owner's connection to the service. The caller closes it."""
        trust = self.policy.trust
        return Publisher(self.desk, self.url, service=trust.service, key_service=trust.key_service)

    def workers(self) -> dict[str, Path]:
        """Worker enclaves that the gateway knows: name -> Unix socket."""
        transport = httpx.HTTPTransport(uds=str(self.site.admin))
        with httpx.Client(transport=transport, base_url="http://gateway") as http:
            listed = http.get("/workers").json()
        return {each["id"]: Path(each["socket"]) for each in listed if each["pool"] != "key-service"}

    def stop(self) -> None:
        """End every process."""
        if self._client is not None:
            self._client.close()
            self._client = None
        for service in (*self._rogues, self.service):
            service.stop()

    def remove(self) -> None:
        """Delete every folder."""
        shutil.rmtree(self.root, ignore_errors=True)
