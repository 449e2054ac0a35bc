"""Requests per second of the confidential path, and of bare ONNX Runtime driven by as many threads.

Slices of a few seconds take turns: bare with a thread for each client, bare with a thread for each core,
confidential. The load generator is one process, and shares the cores with the service.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.arguments import model as model_name
from benchmarks.arguments import positive_float, positive_int
from benchmarks.load import Load, Slice
from benchmarks.models import locate
from benchmarks.report import Report, Rows, verdict
from benchmarks.scene import Scene, scene

# Model -> least share of bare ONNX Runtime's requests per second, at 16 clients.
BARS: Final = {"MobileNetV1": 0.80, "ResNet18": 0.93, "ResNet50": 0.97}
CLIENTS: Final = 16


def run(arguments: Sequence[str]) -> Report:
    """Measure; see the module."""
    options = _parser().parse_args(arguments)
    rows: list[tuple[Any, ...]] = []
    figures: dict[str, Any] = {"clients": options.clients, "models": {}}
    for model in options.model or BARS:
        found = _measure(model, options)
        figures["models"][model] = _figures(model, found, options.clients)
        rows += _rows(model, found, figures["models"][model])
    return Report(
        benchmark="throughput",
        runs=options.runs,
        figures=figures,
        tables=(
            Rows(
                title="Requests per second",
                columns=(
                    "model",
                    "path",
                    "per second",
                    "ratio",
                    "bar",
                    "p50 ms",
                    "p99 ms",
                    "generator, cores",
                ),
                rows=tuple(rows),
            ),
        ),
        setting=(
            f"{options.clients} clients; {options.workers} worker enclave(s) of {options.threads} threads; "
            f"{options.runs} slices of {options.seconds:g} s each, taking turns. The ratio is that to bare "
            "ONNX Runtime called by as many threads as there are clients."
        ),
    )


def _measure(model: str, options: argparse.Namespace) -> dict[str, Slice]:
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="cloister-bench-") as folder:
        path = locate(model, Path(folder))
        with scene(path, workers=options.workers, threads=options.threads) as made, Load() as load:
            load.open("bare", "bare", plain=path)
            open_cloister(load, made, path)
            turns = {
                "bare": ("bare", options.clients),
                "bare_by_core": ("bare", cores),
                "confidential": ("cloister", options.clients),
            }
            for target, clients in turns.values():  # connections, and the memory that threads keep
                load.run(target, clients=clients, seconds=min(0.5, options.seconds))
            found = {name: Slice() for name in turns}
            for _ in range(options.runs):
                for name, (target, clients) in turns.items():
                    found[name] += load.run(target, clients=clients, seconds=options.seconds)
    if found["confidential"].errors:
        raise SystemExit(f"requests failed: {found['confidential'].errors}")
    return found


def open_cloister(load: Load, made: Scene, plain: Path) -> None:
    """Make a service's first model the load generator's target ``cloister``."""
    load.open(
        "cloister",
        "cloister",
        url=made.url,
        policy=str(made.policy_file),
        identities=[str(file) for file in made.identities],
        model=made.model,
        plain=str(plain),
    )


def _figures(model: str, found: dict[str, Slice], clients: int) -> dict[str, Any]:
    ratio = found["confidential"].rps / found["bare"].rps
    figures: dict[str, Any] = {f"{name}_rps": each.rps for name, each in found.items()}
    figures |= {
        "ratio": ratio,
        "ratio_to_bare_by_core": found["confidential"].rps / found["bare_by_core"].rps,
        "confidential_ms_p50": found["confidential"].ms(0.5),
        "confidential_ms_p99": found["confidential"].ms(0.99),
        "bare_ms_p50": found["bare"].ms(0.5),
        "bare_ms_p99": found["bare"].ms(0.99),
        "load_cores": found["confidential"].cores,
    }
    if model in BARS and clients == CLIENTS:
        figures |= {"bar_ratio": BARS[model], "met": ratio >= BARS[model]}
    return figures


def _rows(model: str, found: dict[str, Slice], figures: dict[str, Any]) -> list[tuple[Any, ...]]:
    names = {
        "bare": "bare, a thread for each client",
        "bare_by_core": "bare, a thread for each core",
        "confidential": "confidential",
    }
    bar = verdict(figures["met"], f"≥ {figures['bar_ratio']}") if "met" in figures else ""
    return [
        (
            model,
            text,
            found[name].rps,
            found[name].rps / found["bare"].rps,
            bar if name == "confidential" else "",
            found[name].ms(0.5),
            found[name].ms(0.99),
            "" if name != "confidential" else found[name].cores,
        )
        for name, text in names.items()
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks throughput", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model",
        type=model_name,
        action="append",
        help=f"as in `overhead`; may be repeated. {', '.join(BARS)}",
    )
    parser.add_argument("--clients", type=positive_int, default=CLIENTS)
    parser.add_argument("--workers", type=positive_int, default=1, help="worker enclaves")
    parser.add_argument("--threads", type=positive_int, default=2, help="runs at once in each of them")
    parser.add_argument("--runs", type=positive_int, default=6, help="slices of each kind")
    parser.add_argument("--seconds", type=positive_float, default=4.0, help="of one slice")
    return parser
