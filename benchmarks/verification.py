"""What it costs to verify the evidence of each TEE, side by side, and beside dcap-qvl for Intel's quotes.

The evidence is the simulated platform's: genuine formats, so the same parsing, chains and signatures as a
vendor's. "First sight" empties every cache of parsed certificates and documents before each verification.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import dcap_qvl

from benchmarks.arguments import positive_int
from benchmarks.report import Report, Rows, Samples
from cloister import TrustAnchors, verify_evidence
from cloister.core.evidence import pck
from cloister.core.evidence.bundle import Collateral, Evidence
from cloister.core.verifier import certificates, chain, qe, tcb
from cloister.sim import tees
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.measurement import measure

_CACHES: Final = (
    certificates.load_certificate,
    certificates.load_chain,
    certificates.load_crl,
    chain._issued,
    chain._listed,
    chain._signed,
    pck._parse,
    tcb._parse,
    qe._parse,
)


def run(arguments: Sequence[str]) -> Report:
    """Measure; see the module."""
    parser = argparse.ArgumentParser(prog="verification", description=__doc__)
    parser.add_argument(
        "--runs", type=positive_int, default=400, help="rounds; each verifies everything once"
    )
    options = parser.parse_args(arguments)
    now = int(time.time())
    with tempfile.TemporaryDirectory() as folder:
        authority = SimulatedAuthority.create(Path(folder), now=now)
    measured = measure("worker")
    evidence = {tee: tees.evidence(authority, measured, tee, os.urandom(64), now) for tee in tees.TEES}
    warm, first, other = _times(evidence, authority, options.runs, now)
    rows: list[tuple[Any, ...]] = [(tee, *_row(warm[tee]), first[tee].ms(0.5)) for tee in evidence]
    rows += [(f"dcap-qvl, {tee}", *_row(samples), "") for tee, samples in other.items()]
    return Report(
        benchmark="verification",
        runs=options.runs,
        figures={
            **{f"{tee}_ms_p50": warm[tee].ms(0.5) for tee in evidence},
            **{f"{tee}_ms_p99": warm[tee].ms(0.99) for tee in evidence},
            **{f"{tee}_first_sight_ms_p50": first[tee].ms(0.5) for tee in evidence},
            **{f"{tee}_per_s": 1e3 / warm[tee].ms(0.5) for tee in evidence},
            "dcap_qvl_ms_p50": other["sgx"].ms(0.5),
            "dcap_qvl_tdx_ms_p50": other["tdx"].ms(0.5),
            "ratio_sgx_to_dcap_qvl_p50": warm["sgx"].ms(0.5) / other["sgx"].ms(0.5),
            "ratio_tdx_to_dcap_qvl_p50": warm["tdx"].ms(0.5) / other["tdx"].ms(0.5),
        },
        tables=(
            Rows(
                title="Full verification of one piece of evidence",
                columns=("what", "p50 ms", "p99 ms", "per second", "first sight, p50 ms"),
                rows=tuple(rows),
            ),
        ),
        setting="Evidence of the simulated platform in the vendors' formats; on one core, interleaved.",
    )


def _times(
    evidence: dict[str, Evidence], authority: SimulatedAuthority, runs: int, now: int
) -> tuple[dict[str, Samples], dict[str, Samples], dict[str, Samples]]:
    """Ours with warm caches, ours at first sight, and dcap-qvl's."""
    anchors = TrustAnchors.simulated(authority.roots_der)
    warm, first = ({tee: Samples() for tee in evidence} for _ in range(2))
    other = {tee: Samples() for tee in ("sgx", "tdx")}
    collateral = {tee: _theirs(evidence[tee]) for tee in other}
    for _ in range(runs):
        for tee, each in evidence.items():
            for cache in _CACHES:
                cache.cache_clear()
            verify = partial(verify_evidence, each, anchors=anchors, now=now)
            first[tee].seconds.append(_timed(verify))
            warm[tee].seconds.append(_timed(verify))
        for tee, samples in other.items():
            call = partial(
                dcap_qvl.verify_with_root_ca, evidence[tee].quote, collateral[tee], authority.root_der, now
            )
            samples.seconds.append(_timed(call))
    return warm, first, other


def _row(samples: Samples) -> tuple[float, float, float]:
    return samples.ms(0.5), samples.ms(0.99), 1e3 / samples.ms(0.5)


def _theirs(evidence: Evidence) -> dcap_qvl.QuoteCollateralV3:
    assert isinstance(evidence.collateral, Collateral)
    return dcap_qvl.QuoteCollateralV3(
        **{
            name: value if name.endswith(("_crl", "_signature")) else value.decode()
            for name, value in evidence.collateral.to_data().items()
        }
    )


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
