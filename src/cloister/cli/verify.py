"""``cloister verify``: everything that is checked before a request would leave this machine, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.cli.output import console, print_json, read_text, table
from cloister.client.client import Client
from cloister.core.protocol.trust import UserPolicy

Url = Annotated[str, typer.Argument(help="URL of a gateway.")]
PolicyFile = Annotated[Path, typer.Option("--policy", help="User policy (TOML).")]
Memory = Annotated[
    Path | None,
    typer.Option("--memory", help="File that keeps what was seen of the service between runs."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def verify(url: Url, policy: PolicyFile, memory: Memory = None, as_json: AsJson = False) -> None:
    """Verify a service under a policy and print the record."""
    user = UserPolicy.from_toml(read_text(policy, "user policy"))
    with Client(url, policy=user, memory=memory) as client:
        verified = client.verify()
        for entry in verified.document.pools:
            user.require_pool(entry)
        record = client.record
    pools = [
        {
            "pool": entry.pool.id.hex(),
            "name": entry.pool.name,
            "epoch": entry.epoch,
            "models": [model.model for model in entry.models],
        }
        for entry in verified.document.pools
    ]
    if as_json:
        print_json({**record.to_dict(), "pools": pools})
        return
    table(
        f"Verified: service {record.service.hex()}",
        ("step", "outcome", "detail"),
        [(s.name, s.outcome, s.detail) for s in record.steps],
    )
    table(
        "Pools that the policy accepts",
        ("name", "epoch", "models"),
        [
            (entry.pool.name, entry.epoch, "\n".join(served.model for served in entry.models) or "none")
            for entry in verified.document.pools
        ],
    )
    if record.simulated:
        console.print(
            "[yellow]simulated: this TEE protects nothing from its machine's administrator[/yellow]"
        )
