"""``cloister proxy``: a local endpoint for clients that know nothing of Cloister."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister.cli.output import console, errors, print_json, table
from cloister.cli.policies import read_user_policy
from cloister.cli.verify import AsJson, IdentityFile, PolicyFile, Url, UserMemory, memory_beside
from cloister.errors import UsageError

if TYPE_CHECKING:
    from cloister.client.proxy.server import Places, Proxy


def proxy(
    url: Url,
    policy: PolicyFile,
    identity: IdentityFile,
    rest_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="TCP port of REST, 8500 by default; 0 picks one.")
    ] = None,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port of gRPC; 0 picks one.")] = 8501,
    no_grpc: Annotated[bool, typer.Option("--no-grpc", help="REST only.")] = False,
    unix: Annotated[
        Path | None, typer.Option("--unix", help="Unix socket (mode 0600) for REST instead of its port.")
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option("--alias", help="SHORT=<owner>/<name>; may be given often. Unique names work without."),
    ] = None,
    dangerous_listen: Annotated[
        str | None,
        typer.Option(
            "--dangerous-listen",
            metavar="HOST",
            help="Listen there instead of on localhost: requests reach the proxy in the clear.",
        ),
    ] = None,
    memory: UserMemory = None,
    as_json: AsJson = False,
) -> None:
    """Verify a service, then serve its models on localhost to any Open Inference Protocol client."""
    import asyncio
    import signal

    from cloister.client.client import AsyncClient
    from cloister.client.identity import Identity
    from cloister.client.proxy.names import parse_aliases
    from cloister.client.proxy.server import REST_PORT, Places, Proxy
    from cloister.net.loop import run

    if unix is not None and rest_port is not None:
        raise UsageError(
            "REST is served on a Unix socket or on a port",
            code="proxy.unix",
            claim="options",
            expected="one of --unix and --rest-port",
            actual="both",
        )
    user = read_user_policy(policy)
    who = Identity.load(identity)
    aliases = parse_aliases(alias or [])
    memory = memory or memory_beside(identity, user.service)
    places = Places(
        rest=REST_PORT if rest_port is None else rest_port,
        grpc=None if no_grpc else grpc_port,
        unix=unix.absolute() if unix is not None else None,
        dangerous_listen=dangerous_listen,
    )

    async def main() -> None:
        client = AsyncClient(url, policy=user, identity=who, memory=memory, aliases=aliases)
        async with Proxy(client, places) as serving:
            told = asyncio.Event()  # before anything is said: whoever reads it may end us at once
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, told.set)
            _announce(serving, places, as_json=as_json)
            sys.stdout.flush()  # whoever started us waits for it
            await told.wait()
            if not as_json:
                console.print("stopping")

    run(main())


def _announce(serving: Proxy, places: Places, *, as_json: bool) -> None:
    """Say where the proxy listens and what was verified, and loudly whatever protects nothing."""
    from cloister.client.proxy.page import facts

    found = facts(serving.forwarder)
    host = places.dangerous_listen or "localhost"
    host = f"[{host}]" if ":" in host else host
    where = {"rest": f"http+unix:{places.unix}" if places.unix else f"http://{host}:{serving.rest_port}"}
    if places.grpc is not None:
        where["grpc"] = f"{host}:{serving.grpc_port}"
    if places.dangerous_listen is not None:
        errors.print(
            f"[bold red]DANGEROUS: listening on {places.dangerous_listen}. Whoever reaches it acts with your "
            "identity, and requests and answers cross the network to this proxy IN THE CLEAR.[/bold red]"
        )
    if as_json:
        names = ("service", "simulated", "not_after", "aliases")
        print_json({**where, **{name: found[name] for name in names}})
        return
    models = [(short, model) for short, model in found["aliases"].items()]
    table(
        "Serving; stop with Ctrl-C",
        ("what", "value"),
        [*where.items(), ("service", found["service"]), ("record", f"{where['rest']}/verification"), *models],
    )
    if found["simulated"]:
        console.print(
            "[yellow]simulated: this TEE protects nothing from its machine's administrator[/yellow]"
        )
