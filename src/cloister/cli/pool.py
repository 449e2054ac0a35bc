"""``cloister pool``: the operator's pools, each for one owner or shared, with what its workers must be."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cloister.cli.output import console, print_json, table, write_text
from cloister.cli.policies import read_appraisal_policy
from cloister.cli.site import Site, reference_policy
from cloister.core.protocol.conversation import Conversation, Trust, ask_key_service
from cloister.core.protocol.exchange import PoolCreation, Receipt
from cloister.core.protocol.flow import Flow
from cloister.core.protocol.pool import Pool
from cloister.core.protocol.trust import UserPolicy, hex_digest
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import UsageError

if TYPE_CHECKING:
    from cloister.party.carry import Carrier

app = typer.Typer(help="The operator's pools of a running service.", no_args_is_help=True)
Data = Annotated[Path, typer.Option("--data", help="Data directory of the service.")]
Tee = Literal["sgx", "tdx", "snp", "nitro"]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="The pool's name: a-z 0-9 . _ -")],
    data: Data = Path("var"),
    owner: Annotated[
        str | None,
        typer.Option(help="Owner (thumbprint, 64 hex digits); by default the first to publish there."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="What workers must be (appraisal policy, TOML); by default this machine's."),
    ] = None,
    tee: Annotated[Tee, typer.Option(help="TEE that this machine's workers simulate.")] = "sgx",
    shared: Annotated[
        bool,
        typer.Option("--shared", help="For several owners, each in a child process; users must consent."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Create a pool, so that workers may join it; the same one again changes nothing."""
    if shared and owner is not None:
        raise UsageError(
            "a shared pool is for no owner alone",
            claim="--owner",
            expected="none with --shared",
            actual=owner,
        )
    from cloister.party.carry import Carrier
    from cloister.sim.measurement import measure

    site = Site(data.absolute())
    url, trust = site.url(), operator_trust(site)
    definition = Pool(
        name=name,
        policy=reference_policy(measure("worker"), site.roots(), tee)
        if policy is None
        else read_appraisal_policy(policy, "pool policy"),
        shared=shared,
    )
    carrier = Carrier(url)
    try:
        whose = None if owner is None else hex_digest(owner, "owner")
        found_pool(site, carrier, trust, PoolCreation(pool=definition, owner=whose))
    finally:
        carrier.close()
    if not (site.user_policy.exists() and site.model_policy.exists()):  # where no `cloister up` wrote them
        write_policies(site, trust.service, trust.key_service, definition.policy)
    facts = {"pool": definition.id.hex(), "name": name, "owner": owner or _nobody(definition)}
    if as_json:
        print_json({**facts, "owner": owner, "shared": shared})
        return
    for key, value in facts.items():
        console.print(f"{key:>8}  {value}")
    console.print(f"Start workers with: cloister worker --data {data} --pool {name} --name NAME")


@app.command("list")
def list_pools(data: Data = Path("var"), as_json: AsJson = False) -> None:
    """List the pools of the running service, with their owners, models and workers."""
    from cloister.party.carry import Carrier

    site = Site(data.absolute())
    carrier = Carrier(site.url())
    try:
        verified = carrier.run(Conversation(trust=operator_trust(site)).refresh(int(time.time())))
    finally:
        carrier.close()
    working = Counter(str(each["pool"]) for each in registered(site))
    pools = [
        {
            "name": entry.pool.name,
            "pool": entry.pool.id.hex(),
            "tee": entry.pool.policy.tee or "several",
            "shared": entry.pool.shared,
            "owner": entry.owner.hex() if entry.owner else None,
            "models": [served.model for served in entry.models],
            "workers": working[entry.pool.id.hex()],
        }
        for entry in verified.document.pools
    ]
    if as_json:
        print_json({"service": verified.document.service.hex(), "pools": pools})
        return
    table(
        f"Pools of service {verified.document.service.hex()}",
        ("name", "pool", "tee", "owner", "models", "workers"),
        [
            (
                p["name"],
                p["pool"],
                p["tee"],
                p["owner"] or ("shared" if entry.pool.shared else "none yet"),
                len(entry.models),
                p["workers"],
            )
            for p, entry in zip(pools, verified.document.pools, strict=True)
        ],
    )


def _nobody(pool: Pool) -> str:
    return "each that publishes" if pool.shared else "the first to publish"


def found_pool(site: Site, carrier: Carrier, trust: Trust, creation: PoolCreation) -> None:
    """Create a pool and keep its definition, for the workers that join it."""
    create_pool(site, carrier, trust, creation)
    site.write_pool(creation.pool)


def create_pool(site: Site, carrier: Carrier, trust: Trust, creation: PoolCreation) -> None:
    """Have the key service create a pool, as the operator: through the gateway's admin socket."""
    import httpx

    from cloister.party.carry import Carrier

    verified = carrier.run(Conversation(trust=trust).refresh(int(time.time())))

    def create() -> Flow[Receipt]:
        content = yield from ask_key_service(verified.document, b"/pools", creation.to_bytes())
        return Receipt.from_bytes(content)

    operator = Carrier("http://gateway", httpx.HTTPTransport(uds=str(site.admin)))
    try:
        operator.run(create())
    finally:
        operator.close()


def operator_trust(site: Site) -> Trust:
    """What the operator demands of its own key service: this machine's measurement of it."""
    from cloister.sim.measurement import measure

    return Trust(service=site.service(), key_service=reference_policy(measure("key-service"), site.roots()))


def registered(site: Site) -> list[dict[str, str]]:
    """Enclaves that the gateway knows now: their ids, pools and sockets; none where it doesn't answer."""
    import httpx

    with httpx.Client(transport=httpx.HTTPTransport(uds=str(site.admin)), base_url="http://gateway") as http:
        try:
            listed = http.get("/workers").json()
        except httpx.HTTPError:
            return []
    return list(listed["workers"] if isinstance(listed, dict) else listed)


def write_policies(site: Site, service: bytes, key_service: AppraisalPolicy, worker: AppraisalPolicy) -> None:
    """Write a user policy and a model policy that fit this service."""
    from cloister.owner.policy import ModelPolicy

    user = UserPolicy(service=service, key_service=key_service, worker=worker)
    write_text(site.user_policy, user.to_toml())
    write_text(site.model_policy, ModelPolicy(release=worker, key_service=key_service).to_toml())


def require_same_service(known: object, found: bytes) -> None:
    """Refuse another service than the data directory held before; raises UsageError."""
    if known is not None and known != found.hex():
        raise UsageError(
            "the data directory held another service before",
            code="up.service",
            claim="service id",
            expected=known,
            actual=found.hex(),
            hint="Its store is gone or from elsewhere; use another data directory for a new service",
        )
