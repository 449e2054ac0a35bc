"""The command line: one file per command group; heavy imports happen inside the commands."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from cloister import __version__
from cloister.cli import (
    collateral,
    describe,
    evidence,
    infer,
    measure,
    owner,
    pool,
    proxy,
    roles,
    up,
    user,
    verify,
)

_ROLES: Final = "Roles (what `up` starts)"

app: Final = typer.Typer(
    name="cloister",
    help="Confidential inference: sealed models, sealed requests, attested enclaves, untrusted hosts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"cloister {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `cloister` itself."""


app.command("up")(up.up)
app.command("measure")(measure.measure)
app.command("verify")(verify.verify)
app.command("describe")(describe.describe)
app.command("infer")(infer.infer)
app.command("proxy")(proxy.proxy)
app.add_typer(owner.app, name="owner")
app.add_typer(user.app, name="user")
app.add_typer(pool.app, name="pool")
app.add_typer(evidence.app, name="evidence")
app.add_typer(collateral.app, name="collateral")
app.command("gateway", rich_help_panel=_ROLES)(roles.gateway)
app.command("keyservice", rich_help_panel=_ROLES)(roles.keyservice)
app.command("worker", rich_help_panel=_ROLES)(roles.worker)
