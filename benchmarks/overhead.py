"""Bare ONNX Runtime and the whole confidential path, the same model, interleaved in one run.

Bare is a call of the session in this process. Confidential is `Client.infer`: signature, encapsulation,
gateway, worker enclave (each a process of its own), checks of grant and lease, the same run, the sealed
answer. Each pair of calls has one difference; ``added`` is a percentile of these, as ``ratio`` is of the
quotients. ``--zoo`` does so for every model of `benchmarks.zoo`, ``--profile`` times every component alone.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import onnxruntime as ort

from benchmarks import zoo
from benchmarks.arguments import model as model_name
from benchmarks.arguments import positive_int
from benchmarks.models import SYNTHETIC, Array, answer, bare_session, locate, sample
from benchmarks.report import Report, Rows, Samples, console, percentile, verdict
from benchmarks.scene import Scene, scene
from cloister.client.client import Client
from cloister.core.protocol.document import verify_document
from cloister.core.protocol.flow import Outgoing
from cloister.net.messages import Answer
from cloister.party.carry import Carrier

BAR_MS: Final = {"p50": 2.0, "p99": 4.0}  # added at most, synthetic model
BAR_RATIO: Final = {"ResNet50": 1.03}  # model -> times bare ONNX Runtime's, at most
MEMORY: Final = 4096  # MiB of models in the worker: the zoo's largest takes 575 MB as a file
WARM: Final = 30  # pairs of calls before those that count
STAGES: Final = {
    "seal": "client: placement, signature, encapsulation",
    "transport": "both ways through client, gateway and kernels; sealing of the answer",
    "decrypt": "enclave: decapsulation and decryption",
    "authorize": "enclave: signature, replay, grant, lease, tensors",
    "queue": "enclave: waiting for a thread",
    "run": "enclave: ONNX Runtime",
    "open": "client: decryption and decoding of the answer",
}


class _TimedCarrier(Carrier):
    """Notes when a request left the client's hands and when its answer was there."""

    left = 0.0
    came = 0.0

    def send(self, outgoing: Outgoing, until: float = math.inf) -> Answer:
        self.left = time.perf_counter()
        answer = super().send(outgoing, until)
        self.came = time.perf_counter()
        return answer


def run(arguments: Sequence[str]) -> Report:
    """Measure; see the module."""
    options = _parser().parse_args(arguments)
    if options.zoo:
        return _zoo(options)
    with tempfile.TemporaryDirectory(prefix="cloister-bench-") as folder:
        path = locate(options.model, Path(folder))
        session = bare_session(path)
        inputs = sample(session)
        expected = answer(path, inputs)
        with scene(path, memory_mib=MEMORY) as made:
            report = _measure(made, session, inputs, expected, options)
        if options.profile:
            from benchmarks.profile import profiled

            report = profiled(report, path, options.runs)
        return report


def _zoo(options: argparse.Namespace) -> Report:
    """Every model of the zoo, one after the other, in one table."""
    names = ("bare_ms_p50", "confidential_ms_p50", "added_ms_p50", "added_ms_p99", "ratio_p50")
    rows: list[tuple[Any, ...]] = []
    found: dict[str, Any] = {}
    for model in zoo.NAMES:
        console.print(model, style="dim")
        figures = run(("--model", model, "--runs", str(options.runs))).figures
        found[model] = {name: figures[name] for name in (*names, "bar_ratio_p50", "met") if name in figures}
        bar = verdict(figures["met"], f"≤ {figures['bar_ratio_p50']}") if "bar_ratio_p50" in figures else ""
        rows.append((model, figures["input_bytes"], *(figures[name] for name in names), bar))
    columns = ("model", "input, B", "bare p50 ms", "confidential p50 ms", "added p50 ms", "added p99 ms")
    return Report(
        benchmark="overhead",
        runs=options.runs,
        figures={"models": found},
        tables=(Rows(title="Models of the zoo", columns=(*columns, "ratio", "bar"), rows=tuple(rows)),),
        setting="One request at a time, on one thread.",
    )


def _measure(
    made: Scene,
    session: ort.InferenceSession,
    inputs: dict[str, Array],
    expected: dict[str, Array],
    options: argparse.Namespace,
) -> Report:
    bare, confidential, added = Samples(), Samples(), Samples()
    stages = {name: Samples() for name in STAGES}
    carrier = _TimedCarrier(made.url)
    with made.client() as client:
        client.close()
        client._carrier = carrier
        for count in range(-min(WARM, options.runs), options.runs):
            start = time.perf_counter()
            session.run(None, inputs)
            between = time.perf_counter()
            outputs = client.infer(made.model, inputs)
            end = time.perf_counter()
            if any(not np.array_equal(outputs[name], value) for name, value in expected.items()):
                raise SystemExit("the confidential path gave another answer")
            if count < 0:
                continue
            bare.seconds.append(between - start)
            confidential.seconds.append(end - between)
            added.seconds.append((end - between) - (between - start))
            for name, seconds in _stages(client, carrier, between, end).items():
                stages[name].seconds.append(seconds)
        full, cached = _verifications(made, client, options.runs)
    size = sum(array.nbytes for array in inputs.values())
    ratios = [c / b for b, c in zip(bare.seconds, confidential.seconds, strict=True)]
    figures: dict[str, Any] = {
        "model": Path(options.model).name,
        "input_bytes": size,
        "bare_ms_p50": bare.ms(0.5),
        "bare_ms_p99": bare.ms(0.99),
        "confidential_ms_p50": confidential.ms(0.5),
        "confidential_ms_p99": confidential.ms(0.99),
        "added_ms_p50": added.ms(0.5),
        "added_ms_p99": added.ms(0.99),
        "ratio_p50": percentile(ratios, 0.5),
        "verify_full_ms_p50": full.ms(0.5),
        "verify_cached_us_p50": cached.us(0.5),
        **{f"{name}_ms_p50": samples.ms(0.5) for name, samples in stages.items()},
    }
    bars = _bars(figures)
    if bars:
        figures["met"] = all(met for _, _, met, _ in bars)
    paths = (("bare ONNX Runtime", bare), ("confidential", confidential), ("added", added))
    times = tuple((name, samples.ms(0.5), samples.ms(0.9), samples.ms(0.99)) for name, samples in paths)
    where = tuple((STAGES[name], samples.ms(0.5)) for name, samples in stages.items())
    return Report(
        benchmark="overhead",
        runs=options.runs,
        figures=figures,
        tables=(
            Rows(title="One request", columns=("path", "p50 ms", "p90 ms", "p99 ms"), rows=times),
            Rows(title="Where a confidential request's time goes", columns=("stage", "p50 ms"), rows=where),
            *(
                [
                    Rows(
                        title="What must hold",
                        columns=("what", "found", "bar"),
                        rows=tuple((what, value, verdict(met, bar)) for what, value, met, bar in bars),
                    )
                ]
                if bars
                else []
            ),
        ),
        setting=f"Model {figures['model']}, input of {size:,} B; one request at a time, on one thread.",
    )


def _bars(figures: dict[str, Any]) -> list[tuple[str, float, bool, str]]:
    """What must hold for this model: what, the figure, whether it holds, the bar. Adds the bars' figures."""
    bars: list[tuple[str, float, bool, str]] = []
    if figures["model"] == SYNTHETIC:
        for name, bar in BAR_MS.items():
            value = figures[f"added_ms_{name}"]
            figures[f"bar_added_ms_{name}"] = bar
            bars.append((f"added, {name} in ms", value, value <= bar, f"≤ {bar:g}"))
    if figures["model"] in BAR_RATIO:
        value, bar = figures["ratio_p50"], BAR_RATIO[figures["model"]]
        figures["bar_ratio_p50"] = bar
        bars.append(("ratio, p50", value, value <= bar, f"≤ {bar:g}"))
    return bars


def _stages(client: Client, carrier: _TimedCarrier, start: float, end: float) -> dict[str, float]:
    """Seconds of each stage of one request; they add up to its whole time."""
    inside = {name: milliseconds / 1e3 for name, milliseconds in client.record.stages.items()}
    waited = sum(inside.get(name, 0.0) for name in ("release", "open", "build", "wait"))  # none where hot
    known = inside["decrypt"] + inside["queue"] + inside["run"] + waited
    return {
        "seal": carrier.left - start,
        "transport": carrier.came - carrier.left - inside["enclave"],
        "decrypt": inside["decrypt"],
        "authorize": inside["enclave"] - known,
        "queue": inside["queue"],
        "run": inside["run"],
        "open": end - carrier.came,
    }


def _verifications(made: Scene, client: Client, runs: int) -> tuple[Samples, Samples]:
    """Times of verifying the service document in full, and of finding that it still holds."""
    raw = httpx.get(f"{made.url}/.well-known/cloister", trust_env=False).content
    policy, now = made.policy, int(time.time())
    full, cached = Samples(), Samples()
    for _ in range(min(runs, 200)):
        start = time.perf_counter()
        verify_document(raw, policy=policy.key_service, service=policy.service, now=now)
        full.seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(10):  # one takes little more than the clock itself
            if not client.session.conversation.fresh(client.session.now()):
                raise SystemExit("the service document expired during the benchmark")
        cached.seconds.append((time.perf_counter() - start) / 10)
    return full, cached


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks overhead", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model",
        type=model_name,
        default=SYNTHETIC,
        help="digits, diagnosis, FILE.onnx, one of the zoo's, or synthetic: convolutions over 3x224x224 "
        "float32 (602,112 B)",
    )
    parser.add_argument("--zoo", action="store_true", help="every model of the zoo")
    parser.add_argument("--profile", action="store_true", help="time every component alone, too")
    parser.add_argument("--runs", type=positive_int, default=500, help="pairs of calls")
    return parser
