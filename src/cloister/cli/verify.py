"""``cloister verify``: everything that is checked before a request would leave this machine, step by step."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister.cli.output import console, print_json, table
from cloister.cli.policies import read_user_policy
from cloister.core.times import time_text
from cloister.core.verifier.result import Step

if TYPE_CHECKING:
    from cloister.core.protocol.document import VerifiedDocument

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
        shown(record.steps, verified),
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


def shown(steps: Iterable[Step], verified: VerifiedDocument) -> list[tuple[str, str, str]]:
    """Steps for people: times as dates, yes and no, and until when the evidence is valid."""
    rows = []
    for step in steps:
        name, detail = step.name, step.detail
        if name == "expired":  # its detail is the time of the check
            name, detail = "valid until", time_text(verified.attested.evidence.not_after)
        elif name == "validity":
            detail = re.sub(r"\b\d{10}\b", lambda found: time_text(int(found[0])), detail)
        rows.append((name, step.outcome, {"True": "yes", "False": "no"}.get(detail, detail)))
    return rows
