"""The command line: `main` is its entry point, `cloister.cli.app` says which commands there are."""

from __future__ import annotations

import json
import sys

from cloister.errors import CloisterError, UsageError


def main() -> None:
    """Run one command. Refusals and bad input exit 1 with one line (or ``--json``), wrong usage exits 2."""
    as_json = "--json" in sys.argv
    try:
        # Imported in here: a package may be missing, and whoever is in a hurry interrupts while it loads.
        from cloister.cli.app import app

        app()
    except CloisterError as error:
        from cloister.cli.output import report

        report(error, as_json=as_json)
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "cloister"):  # none that could be installed
            raise
        _report_missing(package, as_json=as_json)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _report_missing(package: str, *, as_json: bool) -> None:
    """As `output.report`, without what that imports: it may be just what is missing."""
    error = UsageError(
        "this command needs a package that is not installed",
        code="usage.extra",
        claim="package",
        expected=package,
        actual="none",
        hint="Install cloister[all], or the extras that the README names",
    )
    if as_json:
        print(json.dumps(error.to_dict()))
    else:
        print(f"{error.code}: {error}", file=sys.stderr)
