"""How commands speak: tables and lines for people, one JSON object for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cloister.errors import CloisterError, UsageError
from cloister.party import files

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def report(error: CloisterError, *, as_json: bool) -> None:
    """Print an error: one line on standard error, or one JSON object on standard output."""
    if as_json:
        print_json(error.to_dict())
    else:
        errors.print(f"[red]{escape(error.code)}[/red]: {escape(str(error))}")


def print_json(value: Any) -> None:
    """Print one JSON object on one line."""
    print(json.dumps(value))


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table."""
    shown = Table(title=title, title_justify="left", title_style="bold", header_style="dim", expand=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(escape(str(cell)) for cell in row))
    console.print(shown)


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
