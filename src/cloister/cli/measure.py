"""``cloister measure``: the reference values of this source tree's enclaves."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from cloister.cli.output import console, print_json, read_text, table
from cloister.cli.policies import read_policy
from cloister.cli.pool import Tee
from cloister.core.protocol.trust import UserPolicy, hex_digest
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.core.verifier.subset import compare_claims
from cloister.errors import AppraisalRefused, UsageError
from cloister.owner.policy import ModelPolicy

if TYPE_CHECKING:
    from cloister.sim.measurement import Measurement

_ROLES: Final = {"key_service": "key-service", "worker": "worker", "release": "worker"}
_DIFFER: Final = (
    "Values differ between Python versions, and between the builds of different Linux distributions: "
    "compare them with the same."
)
_PINS: Final = "requirements/demo.txt"
_HARDWARE: Final = (
    "For hardware, take the measurements from the build (deploy/README.md) and write the policy after the "
    "examples in docs/policies.md"
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
        typer.Option(
            help="A user policy or model policy (TOML): does it name these values and no others, "
            "and admit no more than what --policy prints?"
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="For --policy, which needs it: roots of the simulated platform (PEM)."),
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
    measured: dict[str, Measurement], roots: bytes, service: str | None, tee: str, *, as_json: bool
) -> None:
    from cloister.cli.site import reference_policy

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


def _roots(path: Path | None) -> bytes:
    from cloister.core.verifier.anchors import MAX_SIMULATED_ROOTS
    from cloister.core.verifier.certificates import read_pem

    if path is None:
        raise UsageError(
            "these measurements are the simulated platform's: a policy with them and the vendors' roots "
            "could be met by nothing",
            code="measure.roots",
            claim="--root",
            expected="the simulated service's roots (PEM), which its operator has in var/roots.pem",
            actual="none",
            hint=_HARDWARE,
        )
    return b"".join(read_pem(read_text(path, "root").encode(), most=MAX_SIMULATED_ROOTS))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """An appraisal policy of one TEE in a policy file, and what it should be about.

    Attributes:
        place: Where it stands: ``[worker]``, or ``[worker].any_of[2]``.
        policy: As it stands there.
        measured: The enclave of that section.
    """

    place: str
    policy: AppraisalPolicy
    measured: Measurement


def _compare(path: Path, measured: dict[str, Measurement], *, as_json: bool) -> None:
    """Say that a policy names exactly what was measured, and admits no more than the reference policy.

    Raises:
        AppraisalRefused: code ``measure.difference``, naming the first difference, or ``measure.weaker``,
            naming every key by which it admits more.
    """
    policy = read_policy(path)
    sections = _sections(policy)
    parts = [
        part
        for name, each in sections.items()
        for part in _members(f"[{name}]", each, measured[_ROLES[name]])
    ]
    compared = _require_same(path, parts)
    roots = {name: _roots_of(each) for name, each in sections.items()}
    if weaker := [*_weaker_claims(parts), *_weaker_consent(policy)]:
        _refuse(path, weaker, roots, as_json=as_json)
    if as_json:
        print_json({"match": True, "compared": compared, "roots": roots, "python": _python()})
        return
    console.print(
        f"match: {path} names this source's enclaves and no others, and admits no more than the policies of "
        "`cloister measure --policy`",
        markup=False,
    )
    if isinstance(policy, UserPolicy):
        console.print(
            f"not judged: whether {policy.service.hex()} is the service that you mean", markup=False
        )
    under: dict[str, list[str]] = {}
    for name, each in roots.items():
        under.setdefault(_under(each), []).append(f"[{name}]")
    for line, names in under.items():
        console.print(f"{' and '.join(names)} stand under {line}", style="bold red", markup=False)


def _require_same(path: Path, parts: list[_Part]) -> int:
    """Refuse another measurement than this source's; gives how many values were compared."""
    found = [(part, *difference) for part in parts for difference in _differences(part.policy, part.measured)]
    for part, name, expected, actual in found:
        if expected != actual:
            same = f"Is it the same source, Python and distributions? {_distributions(part.measured)}"
            hardware = f"It demands hardware, and what is measured here is simulated. {_HARDWARE}"
            raise AppraisalRefused(
                f"{path} differs from this source, measured with {_python()}, by {part.place}.{name}",
                code="measure.difference",
                claim=f"{part.place}.{name}",
                expected=expected,
                actual=actual,
                hint=same if part.policy.anchors.is_simulated else hardware,
            )
    return len(found)


def _distributions(measured: Measurement) -> str:
    """Which distributions are other versions than the checkout pins; all that were measured without one."""
    installed = {name: str(each["version"]) for name, each in measured.manifest["distributions"].items()}
    pins = _pins()
    if pins is None:
        versions = ", ".join(f"{name} {version}" for name, version in installed.items())
        return f"Measured were {versions}; the pins are in {_PINS} of the checkout"
    other = [
        f"{name} {version} (pinned: {' or '.join(sorted(pins[name]))})"
        for name, version in installed.items()
        if name in pins and version not in pins[name]
    ]
    install = f"pip install --require-hashes -r {_PINS}"
    if other:
        return f"Not the pinned versions: {', '.join(other)}. In the checkout: {install}"
    return f"The versions are those of {_PINS} here; see the rest with: cloister measure --manifest"


def _pins() -> dict[str, set[str]] | None:
    """Distribution -> versions that the checkout pins, found where the source lies or where we stand."""
    for folder in (*Path(__file__).resolve().parents[2:4], Path.cwd()):
        try:
            text = (folder / _PINS).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        pins: dict[str, set[str]] = {}
        for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE):
            pins.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version)
        return pins
    return None


def _refuse(
    path: Path, weaker: list[tuple[str, str, str, str]], roots: dict[str, list[str]], *, as_json: bool
) -> NoReturn:
    keys = ", ".join(f"{place}.{key}" for place, key, _, _ in weaker)
    error = AppraisalRefused(
        f"{path} names this source's enclaves, but admits more than the reference policy by {keys}",
        code="measure.weaker",
        claim=keys,
        hint="The reference policy is what `cloister measure --policy` prints",
    )
    columns = ("section", "key", "reference", "found")
    if as_json:
        rows = [dict(zip(columns, row, strict=True)) for row in weaker]
        print_json({**error.to_dict(), "weaker": rows, "roots": roots, "python": _python()})
        raise typer.Exit(1) from error
    table("Weaker than the reference policy", columns, weaker)
    raise error


def _sections(policy: UserPolicy | ModelPolicy) -> dict[str, AppraisalPolicy]:
    if isinstance(policy, UserPolicy):
        return {"key_service": policy.key_service, "worker": policy.worker}
    return {"key_service": policy.key_service, "release": policy.release}


def _members(place: str, policy: AppraisalPolicy, measured: Measurement) -> Iterator[_Part]:
    """The policy itself, or those that it joins, until each is about one TEE."""
    join = "any_of" if policy.any_of else "all_of"
    for number, member in enumerate(policy.members, start=1):
        yield from _members(f"{place}.{join}[{number}]", member, measured)
    if not policy.members:
        yield _Part(place=place, policy=policy, measured=measured)


def _weaker_claims(parts: list[_Part]) -> Iterator[tuple[str, str, str, str]]:
    """Section, key, reference and found, of each claim by which a policy admits more than the reference."""
    from cloister.cli.site import reference_policy

    for part in parts:
        policy = part.policy
        reference = reference_policy(part.measured, policy.dangerous_simulated_roots, policy.tee)
        for refusal in compare_claims(reference, policy):
            yield part.place, refusal.claim, refusal.expected, refusal.actual


def _weaker_consent(policy: UserPolicy | ModelPolicy) -> Iterator[tuple[str, str, str, str]]:
    if isinstance(policy, UserPolicy):
        for field in fields(policy.consent):
            if getattr(policy.consent, field.name):
                yield "[consent]", field.name, "false", "true"


def _roots_of(policy: AppraisalPolicy) -> list[str]:
    """SHA-256 of each simulated root's certificate; none where the vendors' roots are meant."""
    anchors = policy.anchors
    found = [root.fingerprint.hex() for roots in anchors.roots.values() for root in roots]
    return found if anchors.is_simulated else []


def _under(roots: list[str]) -> str:
    if roots:
        return (
            f"SIMULATED ROOTS, sha256 {', '.join(roots)}: "
            "whoever has their keys can forge everything that this policy asks for"
        )
    return (
        "the vendors' roots: what is measured here is the simulated platform's, so no hardware meets this "
        f"policy. {_HARDWARE}"
    )


def _differences(policy: AppraisalPolicy, measured: Measurement) -> Iterator[tuple[str, Any, Any]]:
    """What a policy of one TEE names, field by field: name, what was measured, what stands there."""
    from cloister.sim.tees import registers

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
