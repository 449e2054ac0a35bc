"""A simulated authority and ways to make evidence that is wrong in exactly one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.core.evidence import Evidence
from cloister.core.evidence.dcap import Quote
from cloister.core.verifier import TrustAnchors
from cloister.core.verifier.appraisal import SGX_ATTRIBUTES_MASK, AppraisalPolicy
from cloister.sim.authority import FLAWLESS, FMSPC, Flaws, SimulatedAuthority
from cloister.sim.quote import ATTRIBUTES

NOW = 1_800_000_000
VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "dcap"

MakeEvidence = Callable[..., Evidence]


@pytest.fixture(scope="session")
def now() -> int:
    return NOW


@pytest.fixture(scope="session")
def vectors() -> Path:
    if not VECTORS.is_dir():
        pytest.skip("real attestation evidence (../shared/vectors/dcap) is not on this machine")
    return VECTORS


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> SimulatedAuthority:
    return SimulatedAuthority.create(tmp_path_factory.mktemp("authority"), now=NOW)


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> SimulatedAuthority:
    return SimulatedAuthority.create(tmp_path_factory.mktemp("other"), now=NOW)


@pytest.fixture(scope="session")
def anchors(authority: SimulatedAuthority) -> TrustAnchors:
    return TrustAnchors.simulated(authority.roots_der)


@pytest.fixture(scope="session")
def make_evidence(authority: SimulatedAuthority) -> MakeEvidence:
    """``make_evidence(flaws=, by=, debug=, signature={field: value}, raw_quote=, **collateral)``."""

    def make(
        *,
        flaws: Flaws = FLAWLESS,
        by: SimulatedAuthority = authority,
        debug: bool = False,
        signature: dict | None = None,
        raw_quote: bytes | None = None,
        **collateral: bytes,
    ) -> Evidence:
        quote = raw_quote or by.quote(
            report_data=bytes(range(64)),
            mr_enclave=b"e" * 32,
            mr_signer=b"s" * 32,
            isv_prod_id=7,
            isv_svn=3,
            debug=debug,
            now=NOW,
        )
        if signature:
            parsed = Quote.from_bytes(quote)
            quote = replace(parsed, signature=replace(parsed.signature, **signature)).to_bytes()
        return Evidence(
            tee="sgx", quote=quote, collateral=replace(by.collateral(NOW, flaws=flaws), **collateral)
        )

    return make


@pytest.fixture(scope="session")
def policy(authority: SimulatedAuthority) -> AppraisalPolicy:
    """A policy that the flawless simulated evidence meets."""
    return AppraisalPolicy(
        tee="sgx",
        mr_enclave=frozenset({b"e" * 32}),
        attributes=bytes(a & m for a, m in zip(ATTRIBUTES, SGX_ATTRIBUTES_MASK, strict=True)),
        attributes_mask=SGX_ATTRIBUTES_MASK,
        mr_signer=frozenset({b"s" * 32}),
        isv_prod_id=7,
        min_isv_svn=3,
        allowed_tcb=frozenset({"UpToDate"}),
        platforms=frozenset({FMSPC}),
        dangerous_simulated_roots=authority.roots_der,
    )
