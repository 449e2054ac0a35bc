"""How commands speak: tables and lines for people, one JSON object for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cloister.errors import CloisterError, UsageError
from cloister.party import files

MEASURED: Final = frozenset(
    {"mr_enclave", "mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "measurement", "pcr0", "pcr1", "pcr2"}
)

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def report(error: CloisterError, *, as_json: bool) -> None:
    """Print an error: one line on standard error, or one JSON object on standard output."""
    if not error.hint and _is_other_code(error):
        error.hint = "The other side runs other code than the policy names; compare with `cloister measure`"
    if as_json:
        print_json(error.to_dict())
    else:
        errors.print(f"[red]{escape(error.code)}[/red]: {escape(_visible(str(error)))}")


_UNPRINTABLE: Final = "\N{REPLACEMENT CHARACTER}"


def _visible(text: str) -> str:
    """Text whose control characters are shown, not obeyed: what a peer sent may be quoted in it."""
    return "".join(
        char if char == "\n" or char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def _is_other_code(error: CloisterError) -> bool:
    """Whether it was refused for what an enclave measures, or for what a pool lets its workers measure."""
    family, _, claim = error.code.partition(".")
    return family == "appraisal" and (
        claim in MEASURED or (claim == "not-subset" and error.claim in MEASURED)
    )


def print_json(value: Any) -> None:
    """Print one JSON object on one line."""
    print(json.dumps(value))


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; where nobody looks, as aligned lines that are whole, so that grep finds them."""
    heads, cells = list(columns), [[_visible(str(cell)) for cell in row] for row in rows]
    if not console.is_terminal:
        print("\n".join([title, *_lines([heads, *cells])]))
        return
    shown = Table(title=title, title_justify="left", title_style="bold", header_style="dim", expand=False)
    for column in heads:
        shown.add_column(column, overflow="fold")
    for row in cells:
        shown.add_row(*map(escape, row))
    console.print(shown, soft_wrap=False)


def _lines(rows: list[list[str]]) -> list[str]:
    """Rows as lines: columns two spaces apart, each as wide as its widest cell; the last as long as it is."""
    rows = [[" ".join(cell.splitlines()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def read_text(path: Path, what: str) -> str:
    """Read a text file that the user named; raises UsageError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(
            f"the {what} can't be read",
            code="file.read",
            claim=what,
            expected="a readable file",
            actual=f"{path}: {reason}",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; raises UsageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, text.encode(), mode=0o644)
    except OSError as error:
        raise UsageError(
            "the file can't be written", code="file.write", claim=str(path), actual=error.strerror
        ) from error
