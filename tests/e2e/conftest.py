"""Services that whole groups of these tests share. A test that damages one starts its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.malicious import MaliciousHost, Wire
from e2e.world import World, world


@pytest.fixture(scope="session")
def shared_root() -> Iterator[Path]:
    """A folder with a short path: Unix sockets lie in it."""
    root = Path(tempfile.mkdtemp(prefix=f"cloister-e2e-{os.getpid()}-"))
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def service(shared_root: Path) -> Iterator[World]:
    """Two workers, both models, one granted user. Leases of 4 s, so that renewals are frequent."""
    with world(shared_root / "s", models=("digits", "diagnosis")) as made:
        yield made


@pytest.fixture(scope="session")
def other(shared_root: Path) -> Iterator[World]:
    """Another service, whose keys live for 10 s."""
    with world(
        shared_root / "o", workers=1, models=("digits",), epoch_seconds=10, document_seconds=5
    ) as made:
        yield made


@pytest.fixture
def host() -> Iterator[MaliciousHost]:
    """A malicious host for one test."""
    with MaliciousHost() as made:
        yield made


@pytest.fixture
def wire() -> Iterator[Wire]:
    """What the host does with the messages of users and owners."""
    made = Wire()
    yield made
    assert not made.broken


@pytest.fixture
def url(host: MaliciousHost, service: World, wire: Wire) -> str:
    """Where users and owners reach the service through the malicious host."""
    return host.front(service.url, wire)


@pytest.fixture
def folder(shared_root: Path) -> Callable[[str], Path]:
    """Makes fresh folders with short paths."""

    def make(name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=shared_root))

    return make


@pytest.fixture(scope="session")
def second_pool(service: World) -> bytes:
    """Id of another pool of the same service, for workers of the same measurement."""
    return service.new_pool("second").id
