"""A service in this process, for tests of one client each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.stage import Theatre


@pytest.fixture
def theatre() -> Iterator[Theatre]:
    made = Theatre()
    yield made
    made.close()
