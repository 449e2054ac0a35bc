"""A service in this process without any model, and a desk."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cloister.owner.desk import Desk
from support.stage import Theatre


@pytest.fixture
def theatre() -> Iterator[Theatre]:
    made = Theatre(publish=False)
    yield made
    made.close()


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk.create(tmp_path / "desk")
