"""How figures are shown (DESIGN, section 12): tables for people, one JSON object at the end for scripts."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

console: Final = Console(highlight=False)
_DIGITS: Final = 4  # significant ones, in JSON as in tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One table of a report.

    Attributes:
        title: What it shows.
        columns: Names, with units where a column has one.
        rows: Cells; numbers are rounded when shown.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one benchmark found.

    Attributes:
        benchmark: Its name.
        runs: How often each thing was measured.
        figures: Name -> value, with the unit in the name.
        tables: What people read.
        setting: What was measured, in one sentence.
    """

    benchmark: str
    runs: int
    figures: dict[str, Any]
    tables: tuple[Rows, ...] = ()
    setting: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the last line."""
        figures = {name: rounded(value) for name, value in self.figures.items()}
        return {"benchmark": self.benchmark, "machine": machine(), "runs": self.runs, **figures}

    def show(self) -> None:
        """Print the tables, then the JSON object on one line."""
        if self.setting:
            console.print(self.setting)
        for each in self.tables:
            shown = Table(title=each.title, title_justify="left", title_style="bold", header_style="dim")
            for index, column in enumerate(each.columns):
                shown.add_column(column, justify="left" if index == 0 else "right")
            for row in each.rows:
                shown.add_row(*map(text, row))
            console.print(shown)
        print(json.dumps(self.to_dict()), flush=True)

    def to_markdown(self, title: str, command: str, note: str = "") -> str:
        """A section of ``docs/benchmarks.md``, with the command that made it and a note on that."""
        parts = [f"## {title}\n\n`{command}`{note}"]
        if self.setting:
            parts.append(self.setting)
        parts += [f"{each.title}:\n\n{_markdown(each)}" for each in self.tables]
        return "\n\n".join(parts) + "\n"


@dataclass(slots=True)
class Samples:
    """Times of one thing, in seconds."""

    seconds: list[float] = field(default_factory=list)

    def ms(self, share: float) -> float:
        """A percentile in milliseconds."""
        return percentile(self.seconds, share) * 1e3

    def us(self, share: float) -> float:
        """A percentile in microseconds."""
        return percentile(self.seconds, share) * 1e6


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the least value that ``share`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def verdict(met: bool, bar: str) -> str:
    """A bar as it stands beside its figure."""
    return f"{bar}: {'met' if met else 'NOT met'}"


def machine() -> dict[str, Any]:
    """What the figures were measured on; nothing that names the machine itself."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "tee": "simulated",
    }
    for package in ("onnxruntime", "cryptography", "uvloop"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "none"
    return facts


def rounded(value: Any) -> Any:
    """A number to four significant digits; containers by their members; anything else as it is."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if not isinstance(value, float) or value == 0 or not math.isfinite(value):
        return value
    return round(value, max(0, _DIGITS - 1 - math.floor(math.log10(abs(value)))))


def text(cell: Any) -> str:
    """A cell as people read it."""
    return f"{rounded(cell):,}" if isinstance(cell, int | float) else str(cell)


def _markdown(table: Rows) -> str:
    lines = [
        "| " + " | ".join(table.columns) + " |",
        "|---" + "|--:" * (len(table.columns) - 1) + "|",
        *("| " + " | ".join(map(text, row)) + " |" for row in table.rows),
    ]
    return "\n".join(lines)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
