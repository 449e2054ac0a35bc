"""``cloister verify``: everything that is checked before a request would leave this machine, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.cli.output import console, print_json, table
from cloister.cli.policies import read_user_policy
from cloister.party.steps import told

Url = Annotated[str, typer.Argument(help="URL of a gateway.")]
PolicyFile = Annotated[Path, typer.Option("--policy", help="User policy (TOML).")]
Memory = Annotated[
    Path | None,
    typer.Option("--memory", help="File that keeps what was seen of the service between runs."),
]
IdentityFile = Annotated[Path, typer.Option("--identity", help="User identity file.")]
UserMemory = Annotated[
    Path | None,
    typer.Option("--memory", help="As for `verify`; by default beside the identity, one for each service."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def verify(url: Url, policy: PolicyFile, memory: Memory = None, as_json: AsJson = False) -> None:
    """Verify a service under a policy and print the record."""
    from cloister.client.client import Client

    user = read_user_policy(policy)
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
        [(step.name, step.outcome, step.detail) for step in told(record.steps, record.evidence)],
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


def memory_beside(identity: Path, service: bytes) -> Path:
    """Where a user's memory of a service lies unless they name another file."""
    return identity.with_suffix(f".{service.hex()[:16]}.memory")
