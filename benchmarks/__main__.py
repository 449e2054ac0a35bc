"""Benchmarks, one by one or into a document.

::

    python -m benchmarks                        all of them, into docs/benchmarks.md
    python -m benchmarks --publish NAME...      the parts of that document that these make, the rest as it is
    python -m benchmarks NAME [ARGS...]         one; --help after its name lists its arguments

`make bench` does the same: ``make bench BENCH=NAME ARGS=...``.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
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
_MINUTES: Final = re.compile(r"^`make bench .*, ([0-9.]+) min\)$", re.MULTILINE)
DOCUMENT: Final = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"


_HELP: Final = ("-h", "--help")
_PUBLISH: Final = "--publish"


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments name; gives the exit status."""
    if not arguments:
        return publish(tuple(BENCHMARKS))
    name, *rest = arguments
    unknown = {*rest} - BENCHMARKS.keys() if name == _PUBLISH else {name} - {*BENCHMARKS, *_HELP}
    if unknown or name in _HELP:
        _explain()
        for each in sorted(unknown):
            print(f"no benchmark is called {each[:80]}", file=sys.stderr)
        return 2 if unknown else 0
    if name == _PUBLISH:
        return publish(rest or tuple(BENCHMARKS))
    measure(name, rest).show()
    return 0


def measure(name: str, arguments: Sequence[str]) -> Report:
    """Run one benchmark."""
    report: Report = importlib.import_module(f"benchmarks.{_MODULES.get(name, name)}").run(arguments)
    return report


def publish(names: Sequence[str], document: Path = DOCUMENT) -> int:
    """Run these and write their parts of the document again; the last line holds all results.

    The document is written after each of them: what was measured stays where a later one fails.
    """
    sections, results = _sections(document), []
    for name, *rest in PUBLISHED:
        if name not in names:
            continue
        title = shlex.join((name, *rest))
        console.rule(title)
        began = time.monotonic()
        report = measure(name, rest)
        report.show()
        note = f" ({datetime.now(UTC):%Y-%m-%d}, {(time.monotonic() - began) / 60:.1f} min)"
        sections[title] = report.to_markdown(title, command(name, rest), note)
        results.append(report.to_dict())
        document.parent.mkdir(exist_ok=True)
        document.write_text(_document(sections), encoding="utf-8")
    total = sum(result["runs"] for result in results)
    print(json.dumps({"benchmark": "all", "machine": machine(), "runs": total, "results": results}))
    return 0


def command(name: str, arguments: Sequence[str]) -> str:
    """What a reader types to get a benchmark's figures."""
    rest = f' ARGS="{shlex.join(arguments)}"' if arguments else ""
    return f"make bench BENCH={name}{rest}"


def _explain() -> None:
    assert __doc__ is not None
    print(__doc__.partition("::\n")[2])
    for known, question in BENCHMARKS.items():
        print(f"{known:12} {question}")


def _sections(document: Path) -> dict[str, str]:
    """Title -> text of each part of the document, as it stands."""
    try:
        text = document.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    _, *parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return {part.partition("\n")[0].removeprefix("## "): part.rstrip() + "\n" for part in parts}


def _document(sections: Mapping[str, str]) -> str:
    titles = [shlex.join(each) for each in PUBLISHED]
    parts = [sections[title] for title in titles if title in sections]
    return "\n".join([_head(parts), *parts])


def _head(parts: Sequence[str]) -> str:
    facts = "\n".join(f"| {name} | {value} |" for name, value in machine().items())
    minutes = sum(float(found) for part in parts for found in _MINUTES.findall(part))
    return (
        "# Benchmarks\n\n"
        f"`make bench` writes this file, in about {minutes:.0f} minutes, and\n"
        '`make bench ARGS="--publish NAME"` one benchmark\'s part of it. The command at the head of each\n'
        "part measures the same and prints it; behind it stands when that was done last, and how long it\n"
        "took.\n\n"
        "What is compared ran interleaved, in one run, on one machine; p50 and p99 are nearest-rank\n"
        "percentiles. In the simulated TEE no memory is encrypted and no enclave is entered, so these are\n"
        "the costs of the protocol, not of the hardware.\n\n"
        f"Measured on:\n\n| | |\n|---|---|\n{facts}\n"
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
