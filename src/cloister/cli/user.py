"""``cloister user``: a user's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.cli.output import console, print_json
from cloister.core.protocol.trust import hex_digest

app = typer.Typer(help="A user's identity, which never leaves this machine.", no_args_is_help=True)
IdentityFile = Annotated[Path, typer.Option("--identity", help="User identity file.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.command("init")
def init(identity: IdentityFile = Path("user.identity"), as_json: AsJson = False) -> None:
    """Make a new identity."""
    from cloister.client.identity import Identity

    Identity.create(identity)
    if as_json:
        print_json({"identity": str(identity)})
    else:
        console.print(f"identity written to {identity}; keep it secret")


@app.command("id")
def user_id(
    owner: Annotated[str, typer.Argument(help="The owner's thumbprint (64 hex digits), as in the model id.")],
    identity: IdentityFile = Path("user.identity"),
    as_json: AsJson = False,
) -> None:
    """Print the user id at one owner: what the owner grants to. Ids at two owners don't link."""
    from cloister.client.identity import Identity

    found = Identity.load(identity).user_id(hex_digest(owner, "owner")).hex()
    if as_json:
        print_json({"user": found, "owner": owner})
    else:
        console.print(found, soft_wrap=True)
