"""Simulated vendors, and a service that gives out their collateral."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cloister.sim.authority import SimulatedAuthority
from cloister.sim.snp import SimulatedAmd
from support.vendors import NOW, VendorServer


@pytest.fixture(scope="module")
def intel(tmp_path_factory: pytest.TempPathFactory) -> SimulatedAuthority:
    return SimulatedAuthority.create(tmp_path_factory.mktemp("intel"), now=NOW)


@pytest.fixture(scope="module")
def amd() -> SimulatedAmd:
    return SimulatedAmd.create(now=NOW, product="Genoa")


@pytest.fixture
def vendors(intel: SimulatedAuthority, amd: SimulatedAmd) -> Iterator[VendorServer]:
    server = VendorServer(intel, amd, NOW)
    yield server
    server.close()
