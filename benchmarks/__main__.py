"""``python -m benchmarks [NAME] [ARGS...]``: one benchmark, or all of them into ``docs/benchmarks.md``."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benchmarks.report import Report, console, machine

# Name -> what it answers. Each is a module here with `run(arguments) -> Report`, but for those of `_MODULES`.
BENCHMARKS: Final = {
    "overhead": "What does the confidential path add to bare ONNX Runtime?",
    "throughput": "How many requests per second, beside bare ONNX Runtime?",
    "peers": "How does it compare with plaintext Python servers?",
    "flood": "What happens to 512 clients at once?",
    "ladder": "How long do cold, warm and hot requests take, and at what?",
    "chaos": "Is every answer right while workers are killed and started?",
    "attestation": "What does it cost to verify a service, and to prove it alive to many?",
    "verification": "What does it cost to verify the evidence of each TEE?",
    "sealing": "How fast are models sealed and opened?",
    "sealed-load": "What does it take to load a sealed model, beside its plaintext file?",
}

_MODULES: Final = {"chaos": "soak", "sealed-load": "sealed_load"}

# What `docs/benchmarks.md` shows, in its order.
PUBLISHED: Final = (
    ("overhead", "--profile"),
    ("overhead", "--model", "digits"),
    ("overhead", "--model", "diagnosis"),
    ("overhead", "--zoo", "--runs", "30"),
    ("throughput",),
    ("peers",),
    ("flood",),
    ("ladder",),
    ("chaos", "--runs", "10000"),
    ("attestation",),
    ("verification",),
    ("sealing",),
    ("sealed-load",),
)
DOCUMENT: Final = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments name; gives the exit status."""
    if not arguments:
        return publish()
    name, *rest = arguments
    if name not in BENCHMARKS:
        for known, question in BENCHMARKS.items():
            console.print(f"{known:12} {question}", style="" if name in ("-h", "--help") else "dim")
        if name not in ("-h", "--help"):
            print(f"no benchmark is called {name[:80]}", file=sys.stderr)
            return 2
        return 0
    measure(name, rest).show()
    return 0


def measure(name: str, arguments: Sequence[str]) -> Report:
    """Run one benchmark."""
    report: Report = importlib.import_module(f"benchmarks.{_MODULES.get(name, name)}").run(arguments)
    return report


def publish() -> int:
    """Run everything and write the document again; the last line holds all results."""
    sections, results = [_head()], []
    for name, *rest in PUBLISHED:
        console.rule(shlex.join((name, *rest)))
        report = measure(name, rest)
        report.show()
        sections.append(report.to_markdown(shlex.join((name, *rest)), command(name, rest)))
        results.append(report.to_dict())
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text("\n".join(sections), encoding="utf-8")
    total = sum(result["runs"] for result in results)
    print(json.dumps({"benchmark": "all", "machine": machine(), "runs": total, "results": results}))
    return 0


def command(name: str, arguments: Sequence[str]) -> str:
    """What a reader types to get a benchmark's figures."""
    rest = f' ARGS="{shlex.join(arguments)}"' if arguments else ""
    return f"make bench BENCH={name}{rest}"


def _head() -> str:
    facts = "\n".join(f"| {name} | {value} |" for name, value in machine().items())
    return (
        "# Benchmarks\n\n"
        "`make bench` writes this file. What is compared ran interleaved, in one run, on one machine;\n"
        "p50 and p99 are nearest-rank percentiles. In the simulated TEE no memory is encrypted and no\n"
        "enclave is entered, so these are the costs of the protocol, not of the hardware.\n\n"
        f"Measured {datetime.now(UTC):%Y-%m-%d} on:\n\n| | |\n|---|---|\n{facts}\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
