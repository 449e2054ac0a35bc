"""What verification costs: a quote, a service document, the same again from the cache; proofs for many.

Quote and document are those of a real service in the simulated TEE: genuine formats, real signatures and
certificate chains, so the work is that of a vendor's quote.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Final

import httpx

from benchmarks.arguments import positive_int
from benchmarks.models import EXAMPLES
from benchmarks.report import Report, Rows, Samples
from benchmarks.scene import Scene, scene
from cloister import appraise, verify_evidence
from cloister.core.identity import SigningKey
from cloister.core.merkle import MerkleTree
from cloister.core.protocol.document import ServiceDocument, SignedDocument, verify_document
from cloister.core.protocol.exchange import MAX_BATCH, HeadRequest, Possession
from cloister.core.protocol.head import TreeHead

BATCHES: Final = (1, 16, 256, MAX_BATCH)  # proofs under one signature


def run(arguments: Sequence[str]) -> Report:
    """Measure; see the module."""
    options = _parser().parse_args(arguments)
    with scene(EXAMPLES / "digits.onnx") as made:
        times, size = _verifications(made, options.runs)
    batches = tuple(size for size in BATCHES if size <= options.largest_batch)
    proofs = {size: _possession(size, max(1, min(options.runs, 2 * MAX_BATCH // size))) for size in batches}
    names = {
        "quote": "quote: chain, TCB, signatures, appraisal",
        "document": "service document, in full",
        "refresh": "refresh: fetch it, verify it, have the service prove that it lives",
        "cached": "the same document while it holds",
    }
    rows = tuple((names[name], samples.ms(0.5), samples.ms(0.99)) for name, samples in times.items())
    largest = batches[-1]
    return Report(
        benchmark="attestation",
        runs=options.runs,
        figures={
            "document_bytes": size,
            "verify_quote_ms_p50": times["quote"].ms(0.5),
            "verify_full_ms_p50": times["document"].ms(0.5),
            "verify_full_ms_p99": times["document"].ms(0.99),
            "refresh_ms_p50": times["refresh"].ms(0.5),
            "verify_cached_us_p50": times["cached"].us(0.5),
            "ratio_full_to_cached_p50": times["document"].us(0.5) / times["cached"].us(0.5),
            "possession_single_us_p50": proofs[1][0].us(0.5),
            "possession_batch": largest,
            "possession_batched_us_p50": proofs[largest][0].us(0.5) / largest,
            "possession_verify_us_p50": proofs[largest][1].us(0.5),
        },
        tables=(
            Rows(title="Verification by a client", columns=("what", "p50 ms", "p99 ms"), rows=rows),
            Rows(
                title="Proof of possession",
                columns=("clients in a batch", "service: µs for each", "client: µs to verify"),
                rows=tuple(
                    (batch, made.us(0.5) / batch, checked.us(0.5))
                    for batch, (made, checked) in proofs.items()
                ),
            ),
        ),
        setting=f"A service document of {size:,} B; everything on one core.",
    )


def _verifications(made: Scene, runs: int) -> tuple[dict[str, Samples], int]:
    """Times of each kind of verification, interleaved, and the document's size."""
    raw = httpx.get(f"{made.url}/.well-known/cloister", trust_env=False).content
    policy, now = made.policy, int(time.time())
    evidence = ServiceDocument.from_bytes(SignedDocument.from_bytes(raw).text).attestation.evidence

    def quote() -> None:
        verified = verify_evidence(evidence, anchors=policy.key_service.anchors, now=now)
        appraise(verified, policy.key_service, now=now)

    def document() -> None:
        verify_document(raw, policy=policy.key_service, service=policy.service, now=now)

    with made.client() as client:
        client.verify()
        session = client.session

        def cached() -> None:
            if not session.conversation.fresh(session.now()):
                raise SystemExit("the service document expired during the benchmark")

        calls: dict[str, Callable[[], object]] = {
            "quote": quote,
            "document": document,
            "refresh": client.verify,
            "cached": cached,
        }
        times = {name: Samples() for name in calls}
        for count in range(-1, runs):
            for name, call in calls.items():
                seconds = _timed(call, times=10 if call is cached else 1)
                if count >= 0:
                    times[name].seconds.append(seconds)
    return times, len(raw)


def _possession(size: int, runs: int) -> tuple[Samples, Samples]:
    """Times to prove possession to ``size`` clients at once, and for one of them to verify it."""
    key = SigningKey.generate()
    head = TreeHead.sign(key, size=1, root=bytes(32), time=0)
    document = os.urandom(32)
    requests = [HeadRequest(nonce=os.urandom(32), head=None) for _ in range(size)]

    def prove() -> list[Possession]:
        tree = MerkleTree(request.nonce for request in requests)
        signature = Possession.sign(key, document, tree)
        return [
            Possession(
                document=document,
                root=tree.root(),
                size=size,
                index=index,
                path=tuple(tree.inclusion_proof(index)),
                signature=signature,
                head=head,
                consistency=(),
            )
            for index in range(size)
        ]

    last = prove()[-1]

    def check() -> None:
        last.verify(requests[-1], service=key.thumbprint, service_key=key.public)

    made, checked = Samples(), Samples()
    for _ in range(runs):
        made.seconds.append(_timed(prove))
        checked.seconds.append(_timed(check))
    return made, checked


def _timed(call: Callable[[], object], times: int = 1) -> float:
    """Seconds of one call; several are timed together where one takes little more than the clock itself."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks attestation", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=positive_int, default=200)
    parser.add_argument(
        "--largest-batch", type=positive_int, default=MAX_BATCH, help="clients under one signature"
    )
    return parser
