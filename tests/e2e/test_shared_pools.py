"""Two owners and three users in one shared pool, in real processes: a child process for each owner."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cloister.client.identity import Identity
from cloister.core.protocol.trust import Consent
from cloister.errors import AccessRefused, Unavailable, UsageError
from cloister.owner.desk import Desk
from cloister.owner.seal import seal_model
from e2e.malicious import eventually
from e2e.world import DAY, MODELS, World, children, enclaves_below, world

CHILD = b"cloister.enclave.worker.child"


def operator(world: World, *arguments: str) -> Any:
    """What ``cloister pool`` says."""
    command = [sys.executable, "-m", "cloister.cli", "pool", *arguments, "--data", str(world.site.root)]
    return json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)


class Shared:
    """A shared pool with one worker: the world's desk publishes digits there, another owner diagnosis."""

    def __init__(self, world: World) -> None:
        self.world = world
        made = operator(world, "create", "shared", "--shared")
        assert made == {**made, "shared": True, "owner": None}
        self.pool = bytes.fromhex(made["pool"])
        self.desks = {"digits": world.desk, "diagnosis": Desk.create(world.root / "other-desk")}
        self.users = {
            name: Identity.create(world.root / name / "user.identity") for name in ("ann", "ben", "cem")
        }
        self.granted = {"ann": {"digits"}, "ben": {"diagnosis"}, "cem": {"digits", "diagnosis"}}
        for model, desk in self.desks.items():
            sealed = world.root / f"shared-{model}.sealed"
            seal_model(desk, model, MODELS / f"{model}.onnx", sealed)
            with world.publisher(desk=desk) as publisher:
                with pytest.raises(UsageError):  # nobody gets there unasked
                    publisher.publish(model, world.model_policy, sealed)
                publisher.publish(model, world.model_policy, sealed, pool=self.pool)
                for name, models in self.granted.items():
                    if model in models:
                        user = self.users[name].user_id(desk.owner)
                        publisher.grant(model, user, int(time.time()) + DAY)
        settings = json.dumps(world.settings)
        world.service.start(
            "shared-1", "worker", "--name", "shared-1", "--pool", "shared", "--settings", settings
        )
        eventually(lambda: _served(self), "the worker is there")

    def infer(self, user: str, model: str, seed: int, **options: object) -> bool:
        inputs = self.world.sample(model, seed)
        policy = dataclasses.replace(self.world.user_policy, consent=Consent(allow_shared_pools=True))
        options = {"policy": policy, "identity": self.users[user], **options}
        with self.world.client(**options) as client:
            return self.world.right(model, inputs, client.infer(self.desks[model].model_id(model), inputs))

    @property
    def worker(self) -> int:
        (found,) = enclaves_below(self.world.service.processes["shared-1"].pid)
        return found

    def children(self) -> list[int]:
        return [each for each in children(self.worker) if CHILD in Path(f"/proc/{each}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def shared(shared_root: Path) -> Iterator[Shared]:
    with world(shared_root / "h", workers=0, lease_seconds=10, threads=2) as made:
        yield Shared(made)


def test_the_operator_sees_what_is_shared(shared: Shared) -> None:
    pools = {each["name"]: each for each in operator(shared.world, "list")["pools"]}
    assert pools["shared"]["shared"]
    assert not pools["default"]["shared"]
    assert pools["shared"]["owner"] is None
    assert len(pools["shared"]["models"]) == 2
    with pytest.raises(subprocess.CalledProcessError) as caught:
        operator(shared.world, "create", "mine", "--shared", "--owner", "00" * 32)
    assert json.loads(caught.value.stdout or caught.value.stderr)["claim"] == "--owner"


def test_without_consent_nothing_is_sent(shared: Shared) -> None:
    with pytest.raises(AccessRefused) as caught:
        shared.infer("ann", "digits", 1, policy=shared.world.user_policy)
    assert caught.value.code == "access.shared-pool"


def test_each_owner_has_a_child_and_grants_hold(shared: Shared) -> None:
    with ThreadPoolExecutor(6) as threads:
        asked = [
            threads.submit(shared.infer, user, model, seed)
            for seed in range(4)
            for user, models in shared.granted.items()
            for model in models
        ]
        assert all(each.result(60) for each in asked)
    assert len(shared.children()) == 2
    for user, model in (("ann", "diagnosis"), ("ben", "digits")):
        with pytest.raises(AccessRefused) as caught:
            shared.infer(user, model, 1)
        assert caught.value.code == "access.grant"


def test_a_child_has_its_socket_and_its_models_and_nothing_else(shared: Shared) -> None:
    assert shared.infer("cem", "digits", 1)
    assert shared.infer("cem", "diagnosis", 1)
    for child in shared.children():
        links = [os.readlink(each) for each in Path(f"/proc/{child}/fd").iterdir()]
        kinds = sorted({link.split(":")[0].split(" ")[0] for link in links})
        assert kinds in (["/dev/null", "/memfd", "socket"], ["/memfd", "socket"]), links
        assert sum(link.startswith("socket") for link in links) == 1
        status = Path(f"/proc/{child}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
        image = str(shared.world.site.run_dir("shared-1") / "image").encode()
        paths = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        assert image in paths  # the measured one
        assert not any(b"site-packages" in each or each.endswith(b"/src") for each in paths)
        assert Path(f"/proc/{child}/environ").read_bytes().count(b"\0") == 2


def test_a_killed_child_fails_its_own_owner_alone_and_comes_back(shared: Shared) -> None:
    for model in ("digits", "diagnosis"):
        assert shared.infer("cem", model, 1)
    before = set(shared.children())
    victim = min(before)
    codes: list[str] = []
    right = {"digits": 0, "diagnosis": 0}
    stop = threading.Event()

    def ask(user: str, model: str) -> None:
        seed = 0
        while not stop.is_set():
            seed += 1
            try:
                assert shared.infer(user, model, seed)
                right[model] += 1
            except Unavailable as error:  # where the client's own attempts were used up
                codes.append(error.code)

    with ExitStack() as stack:
        threads = [
            threading.Thread(target=ask, args=each) for each in (("ann", "digits"), ("ben", "diagnosis"))
        ]
        for thread in threads:
            thread.start()
        stack.callback(lambda: [thread.join(60) for thread in threads])
        stack.callback(stop.set)
        eventually(lambda: min(right.values()) > 1, "both are served")
        os.kill(victim, signal.SIGKILL)
        counts = dict(right)
        eventually(lambda: all(right[each] > counts[each] + 2 for each in right), "both are served again")
    assert set(codes) <= {"unavailable.child"}
    after = set(shared.children())
    assert victim not in after
    assert len(after & before) == 1  # the other owner's child is the one it was
    assert len(after) == 2


def test_no_child_outlives_a_worker_that_is_killed(shared: Shared) -> None:
    assert shared.infer("ann", "digits", 1)
    worker, left = shared.worker, shared.children()
    assert left
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: not any(Path(f"/proc/{each}/exe").is_symlink() for each in left), "children are gone")
    shared.world.service.revive()
    eventually(lambda: _served(shared), "the worker is back")


def _served(shared: Shared) -> bool:
    try:
        return shared.infer("ann", "digits", 2)
    except Unavailable:
        return False
