"""A whole service in real processes, with an owner, two published models and a granted user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import onnxruntime as ort

from cloister.cli.site import Site
from cloister.cli.up import Service, bring_up, create_pool
from cloister.client.client import Client
from cloister.client.identity import Identity
from cloister.core.protocol.conversation import Trust
from cloister.core.protocol.document import SignedDocument, VerifiedDocument, verify_document
from cloister.core.protocol.exchange import PoolCreation
from cloister.core.protocol.pool import Pool
from cloister.core.protocol.statement import Statement
from cloister.core.protocol.trust import UserPolicy
from cloister.owner.desk import Desk
from cloister.owner.policy import ModelPolicy
from cloister.owner.publish import Publisher
from cloister.owner.seal import seal_model
from cloister.party.carry import Carrier

MODELS: Final = Path(__file__).resolve().parents[2] / "examples" / "models"
SHAPES: Final = {"digits": ("image", (1, 8, 8)), "diagnosis": ("features", (30,))}
DAY: Final = 86400
Array = np.ndarray[Any, np.dtype[Any]]


class World:
    """One service and the people around it, each with a folder of their own.

    Args:
        root: Folder for everything.
        settings: Of the enclaves.
    """

    def __init__(self, root: Path, **settings: int) -> None:
        self.root: Final = root
        self.site: Final = Site(root / "site")
        self.settings: Final = {"lease_seconds": 4, "threads": 1, "memory_mib": 256, **settings}
        self.service: Final = Service(self.site)
        self.url = ""
        self.pool = b""
        self.desk: Final = Desk.create(root / "desk")
        self.user: Final = Identity.create(root / "user" / "user.identity")
        self.stranger: Final = Identity.create(root / "stranger" / "user.identity")
        self._sessions = {
            name: ort.InferenceSession(MODELS / f"{name}.onnx", providers=["CPUExecutionProvider"])
            for name in SHAPES
        }

    def start(self, workers: int = 2, *, capture: Path | None = None, port: int = 0) -> None:
        """Bring the service up."""
        facts = bring_up(
            self.service, workers=workers, settings=json.dumps(self.settings), port=port, capture=capture
        )
        self.url, self.pool = facts["url"], bytes.fromhex(facts["pool"])

    def publish(self, *names: str, pool: bytes | None = None) -> None:
        """Seal models, publish them, grant them to the user."""
        for name in names:
            self.seal(name)
            with self.publisher() as publisher:
                publisher.publish(name, self.model_policy, self.sealed(name), pool=pool or self.pool)
                publisher.grant(name, self.user.user_id(self.desk.owner), int(time.time()) + DAY)

    def seal(self, name: str, source: Path | None = None) -> None:
        """Seal a model on the desk."""
        seal_model(self.desk, name, source or MODELS / f"{name}.onnx", self.sealed(name))

    def stop(self) -> None:
        """End every process."""
        self.service.stop()

    def sealed(self, name: str) -> Path:
        """The sealed file of a model."""
        return self.root / "desk" / f"{name}.sealed"

    @property
    def user_policy(self) -> UserPolicy:
        """What the user demands."""
        return UserPolicy.from_toml(self.site.user_policy.read_text())

    @property
    def model_policy(self) -> ModelPolicy:
        """What the owner demands."""
        return ModelPolicy.from_toml(self.site.model_policy.read_text())

    def model(self, name: str) -> str:
        """A model's id."""
        return self.desk.model_id(name)

    def client(self, url: str = "", **options: Any) -> Client:
        """The user's client."""
        return Client(url or self.url, **{"policy": self.user_policy, "identity": self.user, **options})

    def publisher(self, url: str = "", desk: Desk | None = None, **options: Any) -> Publisher:
        """The owner's connection."""
        trust = self.user_policy
        options = {"service": trust.service, "key_service": trust.key_service, **options}
        return Publisher(desk or self.desk, url or self.url, **options)

    def document(self) -> SignedDocument:
        """The service document as it is now."""
        return SignedDocument.from_bytes(self.raw_document())

    def raw_document(self) -> bytes:
        """Its bytes, straight from the gateway."""
        response = httpx.get(f"{self.url}/.well-known/cloister", trust_env=False)
        response.raise_for_status()
        return response.content

    def verified(self) -> VerifiedDocument:
        """The service document, verified."""
        policy = self.user_policy
        return verify_document(
            self.raw_document(), policy=policy.key_service, service=policy.service, now=int(time.time())
        )

    def new_pool(self, name: str) -> Pool:
        """Have the operator create a second pool of the same workers' measurements."""
        pool = Pool(name=name, policy=self.site.read_pool("default").policy)
        trust = Trust(service=self.user_policy.service, key_service=self.user_policy.key_service)
        carrier = Carrier(self.url)
        try:
            create_pool(self.site, carrier, trust, PoolCreation(pool=pool, owner=None))
        finally:
            carrier.close()
        self.site.write_pool(pool)
        return pool

    def statement(self, name: str) -> Statement:
        """What the desk believes to be the current statement of a model."""
        statement = self.desk.model(name).current()
        assert statement is not None
        return statement

    def sample(self, name: str, seed: int, rows: int = 2) -> dict[str, Array]:
        """An input of a model."""
        tensor, shape = SHAPES[name]
        values = np.random.default_rng(seed).random((rows, *shape), dtype=np.float32)
        return {tensor: values}

    def right(self, name: str, inputs: dict[str, Array], outputs: dict[str, Array]) -> bool:
        """Whether an answer is the one that plain ONNX Runtime gives, bit for bit."""
        session = self._sessions[name]
        names = [each.name for each in session.get_outputs()]
        wanted = dict(zip(names, session.run(names, inputs), strict=True))
        return outputs.keys() == wanted.keys() and all(
            outputs[each].dtype == wanted[each].dtype and np.array_equal(outputs[each], wanted[each])
            for each in names
        )

    def serves(self, client: Client, name: str = "digits", seed: int = 1) -> bool:
        """Whether a client gets a right answer now."""
        inputs = self.sample(name, seed)
        return self.right(name, inputs, client.infer(self.model(name), inputs))

    def enclave(self, name: str) -> int:
        """Process id of the enclave that a role's process launched (not of its sandbox)."""
        return enclaves_below(self.service.processes[name].pid)[0]

    def kill_enclave(self, name: str) -> int:
        """Kill -9 an enclave; gives the process id that it had."""
        pid = self.enclave(name)
        os.kill(pid, signal.SIGKILL)
        return pid

    def copy_store(self, target: Path) -> None:
        """Copy the key service's records, as an operator with a snapshot would; its process must be down."""
        target.mkdir(parents=True)
        for path in self.site.records.parent.glob("records.sqlite*"):
            shutil.copy2(path, target / path.name)

    def put_back(self, source: Path) -> None:
        """Put a copied store in the place of the present one; its process must be down."""
        for path in self.site.records.parent.glob("records.sqlite*"):
            path.unlink()
        for path in source.iterdir():
            shutil.copy2(path, self.site.records.parent / path.name)

    def halt_key_service(self) -> None:
        """End the key service's launcher and its enclave, and wait until both are gone."""
        process = self.service.processes["key-service"]
        enclave = self.enclave("key-service")
        process.terminate()
        process.wait(20)
        _gone(enclave)

    def resume_key_service(self) -> None:
        """Start it again and wait until the gateway has a document of the new start."""
        before = self.raw_document()
        self.service.revive()
        until = time.monotonic() + 40
        while self.raw_document() == before:
            assert time.monotonic() < until, "the key service did not come back"
            time.sleep(0.05)


@contextmanager
def world(root: Path, *, workers: int = 2, models: tuple[str, ...] = (), **settings: int) -> Iterator[World]:
    """A world that ends with the block."""
    made = World(root, **settings)
    try:
        made.start(workers)
        made.publish(*models)
        yield made
    finally:
        made.stop()


def enclaves_below(pid: int) -> list[int]:
    """Processes below ``pid`` that run an enclave's Python, not the sandbox around it."""
    found = []
    for child in children(pid):
        line = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        if b"bwrap" not in line[0] and b"cloister.enclave" in line:
            found.append(child)
        found += enclaves_below(child)
    return found


def children(pid: int) -> list[int]:
    """Direct children of a process, whichever of its threads started them."""
    found = []
    with suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError):
                found += [int(each) for each in (task / "children").read_text().split()]
    return found


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                if os.fsencode(folder) in line:
                    found.append(line.replace(b"\0", b" ").decode(errors="replace"))
    return found


def _gone(pid: int) -> None:
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until, f"process {pid} is still there"
        time.sleep(0.02)
