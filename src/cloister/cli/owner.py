"""``cloister owner``: seal models, publish statements, grant and revoke; what workers have in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress as ProgressBar

from cloister.cli.output import console, print_json, table
from cloister.cli.policies import read_model_policy, read_user_policy
from cloister.core.protocol.statement import Statement
from cloister.core.protocol.trust import hex_digest
from cloister.core.times import time_text
from cloister.errors import UsageError
from cloister.owner.desk import Desk, DeskModel

if TYPE_CHECKING:
    from cloister.owner.publish import Publisher
    from cloister.owner.repository import ModelRepository

app = typer.Typer(help="The owner's desk.", no_args_is_help=True)
DeskDir = Annotated[Path, typer.Option("--desk", help="The owner's desk (a folder with secrets).")]
Name = Annotated[str, typer.Argument(help="The model's name.")]
Url = Annotated[str, typer.Argument(help="URL of a gateway.")]
Trusted = Annotated[
    Path,
    typer.Option("--service-policy", help="User policy (TOML) that names the service and its key service."),
]
User = Annotated[str, typer.Argument(help="The user's id at this owner (64 hex digits).")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
DAY = 86400


@app.command("init")
def init(desk: DeskDir = Path("owner"), as_json: AsJson = False) -> None:
    """Make an owner's desk with a new key; print the owner's thumbprint."""
    owner = Desk.create(desk).owner.hex()
    if as_json:
        print_json({"owner": owner, "desk": str(desk)})
    else:
        console.print(f"owner {owner}\ndesk in {desk}; keep it secret", soft_wrap=True)


@app.command("seal")
def seal(
    name: Name,
    model: Annotated[Path, typer.Argument(help="An .onnx file.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="The sealed file; by default NAME.sealed on the desk.")
    ] = None,
    desk: DeskDir = Path("owner"),
    as_json: AsJson = False,
) -> None:
    """Check a model, seal it under a fresh key, keep the key on the desk."""
    from cloister.owner.seal import seal_model

    opened = Desk.open(desk)
    if model.is_dir():
        raise UsageError(
            "the model is a folder",
            code="model.file",
            claim="model",
            expected="an .onnx file",
            actual=str(model.absolute()),
        )
    target = output or desk / f"{name}.sealed"
    replaces = target.exists()
    with _bar("sealing", quiet=as_json) as progress:
        kept = seal_model(opened, name, model, target, progress=progress)
    facts = {
        "model": opened.model_id(name),
        "sealed": str(target),
        "bytes": kept.sealed.size,
        "header": kept.sealed.header.hex(),
        "blob": kept.sealed.blob.hex(),
    }
    _print(facts, as_json=as_json)
    if replaces and not as_json:
        console.print(
            "replaces the sealed file that was there; workers serve what was published last until the next "
            "`cloister owner publish`",
            markup=False,
        )


@app.command("publish")
def publish(
    name: Name,
    url: Url,
    policy: Annotated[Path, typer.Option("--policy", help="Model policy (TOML).")],
    service_policy: Trusted,
    sealed: Annotated[
        Path | None, typer.Option("--sealed", help="The sealed file; by default NAME.sealed on the desk.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="Pool id (64 hex digits); by default the owner's own, or the only one.")
    ] = None,
    desk: DeskDir = Path("owner"),
    as_json: AsJson = False,
) -> None:
    """Verify the service, upload the sealed model, publish the next signed statement."""
    model_policy = read_model_policy(policy)
    with _publisher(desk, url, service_policy) as publisher, _bar("uploading", quiet=as_json) as progress:
        statement = publisher.publish(
            name,
            model_policy,
            sealed or desk / f"{name}.sealed",
            pool=None if pool is None else hex_digest(pool, "pool"),
            progress=progress,
        )
    _print_statement(statement, as_json=as_json)


@app.command("grant")
def grant(
    name: Name,
    user: User,
    url: Url,
    service_policy: Trusted,
    days: Annotated[int, typer.Option(min=1, max=3660, help="Days until the grant ends.")] = 30,
    desk: DeskDir = Path("owner"),
    as_json: AsJson = False,
) -> None:
    """Grant a model to a user."""
    with _publisher(desk, url, service_policy) as publisher:
        statement = publisher.grant(name, _user_id(user), int(time.time()) + days * DAY)
    _print_statement(statement, as_json=as_json)


@app.command("revoke")
def revoke(
    name: Name,
    user: User,
    url: Url,
    service_policy: Trusted,
    desk: DeskDir = Path("owner"),
    as_json: AsJson = False,
) -> None:
    """Take a grant back. Workers follow within their lease, in seconds and in requests."""
    with _publisher(desk, url, service_policy) as publisher:
        statement = publisher.revoke(name, _user_id(user))
    _print_statement(statement, as_json=as_json)


def _user_id(text: str) -> bytes:
    try:
        return hex_digest(text, "user")
    except UsageError as error:
        error.hint = "The user prints it with: cloister user id OWNER"
        raise


@app.command("list")
def list_models(desk: DeskDir = Path("owner"), as_json: AsJson = False) -> None:
    """List the models on the desk: what was published last where, and who is granted what until when."""
    opened = Desk.open(desk)
    models = [_facts(opened, opened.model(name)) for name in opened.models()]
    if as_json:
        print_json({"owner": opened.owner.hex(), "models": models})
        return
    table(
        f"Models of owner {opened.owner.hex()}",
        ("name", "statement", "service", "pool", "grants"),
        [
            (m["name"], m["version"] or "sealed only", m["service"] or "", m["pool"] or "", len(m["grants"]))
            for m in models
        ],
    )
    now = int(time.time())
    grants = [
        (m["name"], each["user"], time_text(each["expiry"]), "granted" if each["expiry"] > now else "over")
        for m in models
        for each in m["grants"]
    ]
    table("Grants", ("model", "user", "until", "state"), grants)


@app.command("index")
def index(
    url: Url,
    service_policy: Trusted,
    desk: DeskDir = Path("owner"),
    as_json: AsJson = False,
) -> None:
    """List the owner's models in service, and whether the worker that answers has them in memory."""
    opened = Desk.open(desk)
    with _repository(opened, url, service_policy) as repository:
        models = repository.index()
    if as_json:
        print_json({"owner": opened.owner.hex(), "models": models})
        return
    columns = ("name", "version", "state", "reason")
    rows = [[model.get(column, "") for column in columns] for model in models]
    table(f"Models in service of owner {opened.owner.hex()}", columns, rows)


@app.command("load")
def load(
    name: Name,
    url: Url,
    service_policy: Trusted,
    desk: DeskDir = Path("owner"),
    as_json: AsJson = False,
) -> None:
    """Have the worker that answers load a model, so that no user waits for that."""
    opened = Desk.open(desk)
    with _repository(opened, url, service_policy) as repository:
        repository.load(name)
    _print({"model": opened.model_id(name), "state": "READY"}, as_json=as_json)


@app.command("unload")
def unload(
    name: Name,
    url: Url,
    service_policy: Trusted,
    desk: DeskDir = Path("owner"),
    as_json: AsJson = False,
) -> None:
    """Have the worker that answers drop a model from memory. The next request for it loads it again."""
    opened = Desk.open(desk)
    with _repository(opened, url, service_policy) as repository:
        repository.unload(name)
    _print({"model": opened.model_id(name), "state": "UNAVAILABLE"}, as_json=as_json)


def _facts(desk: Desk, model: DeskModel) -> dict[str, Any]:
    statement = model.current()
    grants = sorted(statement.grants.items(), key=lambda each: each[1]) if statement else []
    return {
        "name": model.name,
        "model": desk.model_id(model.name),
        "version": statement.version if statement else None,
        "service": statement.service.hex() if statement else None,
        "pool": model.pool.hex() if model.pool else None,
        "grants": [{"user": user.hex(), "expiry": expiry} for user, expiry in grants],
    }


def _publisher(desk: Path, url: str, service_policy: Path) -> Publisher:
    from cloister.owner.publish import Publisher

    trusted = read_user_policy(service_policy, "service policy")
    return Publisher(Desk.open(desk), url, service=trusted.service, key_service=trusted.key_service)


def _repository(desk: Desk, url: str, service_policy: Path) -> ModelRepository:
    from cloister.owner.repository import ModelRepository

    trusted = read_user_policy(service_policy, "service policy")
    return ModelRepository(desk, url, service=trusted.service, key_service=trusted.key_service)


def _print_statement(statement: Statement, *, as_json: bool) -> None:
    facts: dict[str, object] = {
        "model": statement.model,
        "version": statement.version,
        "statement": statement.digest.hex(),
        "grants": len(statement.grants),
    }
    _print(facts, as_json=as_json)


def _print(facts: Mapping[str, object], *, as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        console.print(f"{name:>10}  {value}", soft_wrap=True)


@contextmanager
def _bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for work that may take over a second."""
    if quiet or not console.is_terminal:
        yield None
        return
    with ProgressBar(console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
