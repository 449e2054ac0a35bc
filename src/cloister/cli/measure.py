"""``cloister measure``: the reference values of this source tree's enclaves."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.output import console, print_json, read_text, table
from cloister.cli.pool import Tee
from cloister.core.protocol.trust import hex_digest, load_table, subtable
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import AppraisalRefused, UsageError

if TYPE_CHECKING:
    from cloister.sim.measurement import Measurement

_ROLES: Final = {"key_service": "key-service", "worker": "worker", "release": "worker"}
_DIFFER: Final = (
    "Values differ between Python versions, and between the builds of different Linux distributions: "
    "compare them with the same."
)


def measure(
    source: Annotated[
        Path | None, typer.Option(help="Folder of the cloister package; by default the installed one.")
    ] = None,
    manifest: Annotated[bool, typer.Option("--manifest", help="Show everything that is measured.")] = False,
    policy: Annotated[
        bool, typer.Option("--policy", help="Print a user policy and a model policy with these values.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(help="A user policy or model policy (TOML): does it name these values and no others?"),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="For --policy: roots of a simulated platform (PEM); by default the vendors'."),
    ] = None,
    service: Annotated[
        str | None, typer.Option(help="For --policy: the service id (64 hex digits) that the user trusts.")
    ] = None,
    tee: Annotated[Tee, typer.Option(help="For --policy: TEE that the workers simulate.")] = "sgx",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print the enclave images' reference values: the same for the same source, distributions and Python."""
    from cloister.sim.measurement import measure as measure_role

    measured = {role: measure_role(role, source) for role in ("key-service", "worker")}
    if compare is not None:
        _compare(compare, measured, as_json=as_json)
    elif policy:
        _print_policies(measured, _roots(root), service, tee, as_json=as_json)
    else:
        _show(measured, manifest=manifest, as_json=as_json)


def _show(measured: dict[str, Measurement], *, manifest: bool, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                item.role: {
                    "mr_enclave": item.mr_enclave.hex(),
                    "mr_signer": item.mr_signer.hex(),
                    "isv_prod_id": item.isv_prod_id,
                    "isv_svn": item.isv_svn,
                    **({"manifest": _plain(item.manifest)} if manifest else {}),
                }
                for item in measured.values()
            }
            | {"python": _python()}
        )
        return
    rows = [(item.role, item.mr_enclave.hex(), item.isv_prod_id, item.isv_svn) for item in measured.values()]
    table("Reference values (simulated SGX)", ("role", "mr_enclave", "isv_prod_id", "isv_svn"), rows)
    console.print(f"measured with {_python()}. {_DIFFER}", markup=False)
    if manifest:
        for item in measured.values():
            table(f"Manifest of the {item.role}", ("part", "value"), _rows(_plain(item.manifest)))


def _python() -> str:
    """This Python and where it runs."""
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        system = "Linux"
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{version} on {system}, {platform.machine()}"


def _print_policies(
    measured: dict[str, Measurement], roots: bytes | None, service: str | None, tee: str, *, as_json: bool
) -> None:
    from cloister.cli.site import reference_policy
    from cloister.core.protocol.trust import UserPolicy
    from cloister.owner.policy import ModelPolicy

    key_service = reference_policy(measured["key-service"], roots)
    worker = reference_policy(measured["worker"], roots, tee)
    pinned = bytes(32) if service is None else hex_digest(service, "service")
    user = UserPolicy(service=pinned, key_service=key_service, worker=worker).to_toml()
    if service is None:
        user = user.replace(pinned.hex(), "SERVICE ID: 64 hex digits, from somebody whom you trust", 1)
    model = ModelPolicy(release=worker, key_service=key_service).to_toml()
    if as_json:
        print_json({"user_policy": user, "model_policy": model})
        return
    print(f"# ---- user-policy.toml; measured with {_python()} ----\n\n{user}")
    print(f"# ---- model-policy.toml; measured with {_python()} ----\n\n{model}", end="")


def _roots(path: Path | None) -> bytes | None:
    from cloister.core.verifier.anchors import MAX_SIMULATED_ROOTS
    from cloister.core.verifier.chain import read_pem

    if path is None:
        return None
    return b"".join(read_pem(read_text(path, "root").encode(), most=MAX_SIMULATED_ROOTS))


def _compare(path: Path, measured: dict[str, Measurement], *, as_json: bool) -> None:
    """Say that a policy names exactly what was measured; raises AppraisalRefused where it doesn't."""
    compared = 0
    for section, policy in _sections(path):
        for name, expected, actual in _differences(policy, measured[_ROLES[section]]):
            compared += 1
            if expected != actual:
                raise AppraisalRefused(
                    f"{path} differs from this source, measured with {_python()}",
                    code="measure.difference",
                    claim=f"[{section}].{name}",
                    expected=expected,
                    actual=actual,
                    hint="Is it the same source, Python and distributions? See: cloister measure --manifest",
                )
    if as_json:
        print_json({"match": True, "compared": compared, "python": _python()})
    else:
        console.print(f"match: {path} names this source's enclaves and no others", markup=False)


def _sections(path: Path) -> Iterator[tuple[str, AppraisalPolicy]]:
    text = read_text(path, "policy")
    try:
        is_user = "worker" in tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}"[:300], code="policy.format") from error
    names = ("key_service", "worker") if is_user else ("key_service", "release")
    found = load_table(text, required=names, optional=("service", "consent") if is_user else ("options",))
    for name in names:
        yield name, AppraisalPolicy.from_table(subtable(found, name))


def _differences(policy: AppraisalPolicy, measured: Measurement) -> Iterator[tuple[str, Any, Any]]:
    """What a policy names, field by field: name, what was measured, what stands there."""
    from cloister.sim.tees import registers

    for member in policy.members:
        yield from _differences(member, measured)
    if policy.members:
        return
    if policy.tee == "sgx":
        yield "mr_enclave", measured.mr_enclave.hex(), _hex(policy.mr_enclave)
        yield "isv_prod_id", measured.isv_prod_id, policy.isv_prod_id
        yield "min_isv_svn", measured.isv_svn, policy.min_isv_svn
        if policy.mr_signer:
            yield "mr_signer", measured.mr_signer.hex(), _hex(policy.mr_signer)
        return
    for name, value in registers(measured, policy.tee).items():
        yield name, value.hex(), _hex(getattr(policy, name))


def _hex(values: frozenset[bytes]) -> str:
    return ", ".join(sorted(each.hex() for each in values))


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _rows(value: object, prefix: str = "") -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [
            row
            for name, item in value.items()
            for row in _rows(item, f"{prefix}.{name}" if prefix else str(name))
        ]
    if isinstance(value, list):
        return [row for index, item in enumerate(value) for row in _rows(item, f"{prefix}[{index}]")]
    return [(prefix, value)]
