"""The lines of the demonstration: each is checked, printed, and counted at the end."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.rule import Rule
from rich.table import Table

from cloister.errors import CloisterError

_LONG_HEX: Final = re.compile(r"[0-9a-f]{24,}")


class Failed(Exception):
    """A line does not hold; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the demonstration and how it went."""

    section: str
    name: str
    holds: bool
    detail: str
    seconds: float


class Task:
    """What a running line shows of its progress."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def say(self, text: str) -> None:
        """Name what is being done."""
        self._progress.update(self._task, description=text)

    def expect(self, total: int) -> None:
        """Say how many steps there are."""
        self._progress.update(self._task, total=total, completed=0)

    def advance(self) -> None:
        """One step is done."""
        self._progress.advance(self._task)

    def at(self, done: int, total: int) -> None:
        """So many steps of all are done."""
        self._progress.update(self._task, completed=done, total=total)


Check = Callable[[Task], str]


class Report:
    """Runs lines, prints them, and remembers which hold."""

    def __init__(self, console: Console) -> None:
        self.console: Final = console
        self.lines: Final[list[Line]] = []
        self._section = ""

    def section(self, title: str, text: str) -> None:
        """Begin a section."""
        self._section = title
        self.console.print()
        self.console.print(Rule(f"[bold]{escape(title)}[/bold]", align="left"))
        self.console.print(escape(text), style="dim")

    def check(self, name: str, check: Check) -> bool:
        """Run one line. It holds when ``check`` returns what it found; whatever that raises is a failure."""
        started = time.monotonic()
        try:
            with self._task(name) as task:
                detail = check(task)
            holds = True
        except Failed as failure:
            holds, detail = False, str(failure)
        except CloisterError as error:
            holds, detail = False, describe(error)
        except Exception as error:  # one broken line must not hide what the others show
            holds, detail = False, f"{type(error).__name__}: {error}"
        line = Line(
            section=self._section,
            name=name,
            holds=holds,
            detail=detail,
            seconds=time.monotonic() - started,
        )
        self.lines.append(line)
        self._print(line)
        return holds

    def refused(self, name: str, code: str, attempt: Callable[[Task], object]) -> bool:
        """Run one line that holds when ``attempt`` is refused with exactly this error code."""

        def check(task: Task) -> str:
            return require_refusal(code, lambda: attempt(task))

        return self.check(name, check)

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
        """Print a table."""
        shown = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
        for column in columns:
            shown.add_column(column, overflow="fold")
        for row in rows:
            shown.add_row(*(escape(str(cell)) for cell in row))
        self.console.print(Padding(shown, (0, 0, 0, 2), expand=False))

    def summary(self) -> bool:
        """Print every line once more; gives whether all of them hold."""
        table = Table(title="Summary", title_justify="left", title_style="bold", header_style="dim")
        table.add_column("line", overflow="fold")
        table.add_column("result")
        table.add_column("seconds", justify="right")
        section = ""
        for line in self.lines:
            if line.section != section:
                section = line.section
                table.add_row(f"[bold]{escape(section)}[/bold]")
            table.add_row(Padding(escape(line.name), (0, 0, 0, 2)), _mark(line), f"{line.seconds:.1f}")
        self.console.print()
        self.console.print(table)
        good = sum(line.holds for line in self.lines)
        holds = good == len(self.lines) > 0
        style = "bold green" if holds else "bold red"
        self.console.print(f"{good} of {len(self.lines)} lines hold", style=style)
        for line in self.lines:
            if not line.holds:
                self.console.print(f"[red]failed[/red]: {escape(line.name)}: {escape(line.detail)}")
        return holds

    def _print(self, line: Line) -> None:
        self.console.print(f"{_mark(line)}  [bold]{escape(line.name)}[/bold]")
        if line.detail:
            self.console.print(
                Padding(escape(line.detail), (0, 0, 0, 6), expand=False), style="" if line.holds else "red"
            )

    @contextmanager
    def _task(self, name: str) -> Iterator[Task]:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        quiet = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=quiet) as progress:
            yield Task(progress, progress.add_task(escape(name), total=None))


def require_refusal(code: str, attempt: Callable[[], object]) -> str:
    """Describe the refusal that ``attempt`` meets; raises Failed where it meets none, or another."""
    try:
        attempt()
    except CloisterError as error:
        if error.code != code:
            raise Failed(f"refused, but not with {code}: {describe(error)}") from error
        return describe(error)
    raise Failed(f"not refused; {code} was expected")


def describe(error: CloisterError) -> str:
    """Code and message of an error, with long digests cut."""
    return f"{error.code}: {_LONG_HEX.sub(lambda found: found[0][:12] + '...', str(error))}"


def _mark(line: Line) -> str:
    return "[green]  ok[/green]" if line.holds else "[red]FAIL[/red]"
