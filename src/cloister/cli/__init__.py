"""The command line: one file per command group; heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from typing import Final

import typer

from cloister.cli import collateral, evidence, infer, measure, owner, roles, up, user, verify
from cloister.cli.output import report
from cloister.errors import CloisterError, UsageError

app: Final = typer.Typer(
    name="cloister",
    help="Confidential inference: sealed models, sealed requests, attested enclaves, untrusted hosts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("up")(up.up)
app.command("measure")(measure.measure)
app.command("verify")(verify.verify)
app.command("infer")(infer.infer)
app.add_typer(owner.app, name="owner")
app.add_typer(user.app, name="user")
app.add_typer(evidence.app, name="evidence")
app.add_typer(collateral.app, name="collateral")
app.command("gateway", rich_help_panel="Roles (what `up` starts)")(roles.gateway)
app.command("keyservice", rich_help_panel="Roles (what `up` starts)")(roles.keyservice)
app.command("worker", rich_help_panel="Roles (what `up` starts)")(roles.worker)


def main() -> None:
    """Run one command. Refusals and bad input exit 1 with one line (or ``--json``), wrong usage exits 2."""
    try:
        app()
    except CloisterError as error:
        report(error, as_json="--json" in sys.argv)
        sys.exit(1)
    except ModuleNotFoundError as error:
        missing = UsageError(
            "this command needs a package that is not installed",
            code="usage.extra",
            claim="package",
            expected=error.name,
            actual="none",
            hint="Install cloister[all]",
        )
        report(missing, as_json="--json" in sys.argv)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
