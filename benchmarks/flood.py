"""Many clients at once with a tiny model, beside the same server without encryption.

Slices of some seconds take turns. Nothing may fail but by declared overload, and memory stays bounded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.arguments import model as model_name
from benchmarks.arguments import positive_float, positive_int
from benchmarks.load import Load, Slice, question
from benchmarks.models import locate
from benchmarks.plain_server import FIELDS, PATH, Plain, request_of
from benchmarks.processes import peak_mib, resident_mib
from benchmarks.report import Report, Rows, verdict
from benchmarks.scene import Scene, scene
from benchmarks.throughput import open_cloister

BAR_P99: Final = 3.0  # times the p99 of the same server without encryption
BAR_GROWTH: Final = 256.0  # MiB: as many bytes of requests as a front holds at once
QUEUE: Final = 1024  # requests inside a worker, as by its default
USERS: Final = 8


def run(arguments: Sequence[str]) -> Report:
    """Measure; see the module."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="cloister-bench-") as name:
        folder = Path(name)
        model = locate(options.model, folder)
        inputs, expected = question(model)
        (folder / "body").write_bytes(request_of(model.stem, inputs))
        (folder / "answer").write_bytes(list(expected.values())[-1].tobytes())
        with (
            scene(model, threads=options.threads, users=USERS) as made,
            Plain("worker", str(model), str(options.threads), str(QUEUE)) as plain,
            Load() as load,
        ):
            open_cloister(load, made, model)
            load.open(
                "plain",
                "http",
                port=plain.port,
                path=PATH,
                fields=FIELDS,
                body=str(folder / "body"),
                answer=str(folder / "answer"),
            )
            return _measure(options, load, made)


def _measure(options: argparse.Namespace, load: Load, made: Scene) -> Report:
    found = {"plain": Slice(), "cloister": Slice()}
    pids = {name: made.service.processes[name].pid for name in ("gateway", "worker-1")}
    before = {name: resident_mib(pid) for name, pid in pids.items()}
    after: list[dict[str, float]] = []
    for _ in range(options.runs):
        for name in found:
            found[name] += load.run(name, clients=options.clients, seconds=options.seconds)
        after.append({name: resident_mib(pid) for name, pid in pids.items()})
    ratio = found["cloister"].ms(0.99) / found["plain"].ms(0.99)
    grown = {name: after[-1][name] - before[name] for name in pids}
    failed = found["cloister"].undeclared
    checks = {
        "errors other than declared overload": (failed == 0, f"{failed}", "0"),
        "p99, times that without encryption": (ratio <= BAR_P99, ratio, f"≤ {BAR_P99:g}"),
        **{
            f"memory of {name}, MiB more": (grown[name] <= BAR_GROWTH, grown[name], f"≤ {BAR_GROWTH:g}")
            for name in pids
        },
    }
    figures: dict[str, Any] = {
        "clients": options.clients,
        "ratio_p99": ratio,
        "bar_ratio_p99": BAR_P99,
        "errors": found["cloister"].errors,
        "undeclared_errors": failed,
        "met": all(met for met, *_ in checks.values()),
    }
    for name, each in found.items():
        figures |= {
            f"{name}_rps": each.rps,
            f"{name}_ms_p50": each.ms(0.5),
            f"{name}_ms_p99": each.ms(0.99),
            f"{name}_load_cores": each.cores,
            f"{name}_overloaded": each.declared,
        }
    for name, pid in pids.items():
        key = name.replace("-1", "")
        figures |= {
            f"{key}_before_mib": before[name],
            f"{key}_first_mib": after[0][name],
            f"{key}_after_mib": after[-1][name],
            f"{key}_peak_mib": peak_mib(pid),
        }
    paths = {"plain": "without encryption", "cloister": "confidential"}
    return Report(
        benchmark="flood",
        runs=options.runs,
        figures=figures,
        tables=(
            Rows(
                title="All clients at once",
                columns=("path", "per second", "p50 ms", "p99 ms", "overloaded", "load, cores"),
                rows=tuple(
                    (text, each.rps, each.ms(0.5), each.ms(0.99), each.declared, each.cores)
                    for name, text in paths.items()
                    for each in (found[name],)
                ),
            ),
            Rows(
                title="Memory of launcher and enclave, and of the gateway, MiB resident",
                columns=("process", "before", "after the first slice", "after the last", "at most"),
                rows=tuple(
                    (name, before[name], after[0][name], after[-1][name], peak_mib(pid))
                    for name, pid in pids.items()
                ),
            ),
            Rows(
                title="What must hold",
                columns=("what", "found", "bar"),
                rows=tuple((what, value, verdict(met, bar)) for what, (met, value, bar) in checks.items()),
            ),
        ),
        setting=(
            f"{options.clients} clients of {USERS} users, model {Path(options.model).stem}; one worker of "
            f"{options.threads} threads; {options.runs} slices of {options.seconds:g} s each, taking turns."
        ),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks flood", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=model_name, default="diagnosis", help="as in `overhead`")
    parser.add_argument("--clients", type=positive_int, default=512)
    parser.add_argument("--threads", type=positive_int, default=2, help="runs at once in the worker")
    parser.add_argument("--runs", type=positive_int, default=4, help="slices of each kind")
    parser.add_argument("--seconds", type=positive_float, default=5.0, help="of one slice")
    return parser
