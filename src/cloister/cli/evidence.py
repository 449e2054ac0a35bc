"""``cloister evidence``: what a quote, report or document says, and whether it is genuine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cloister.cli.output import console, print_json, read_text, table
from cloister.core.verifier import verify as verify_evidence
from cloister.core.verifier.anchors import MAX_SIMULATED_ROOTS, TrustAnchors
from cloister.core.verifier.appraisal import AppraisalPolicy, appraise
from cloister.core.verifier.chain import load_chain, read_pem
from cloister.core.verifier.result import Step
from cloister.errors import CloisterError, EvidenceError, UsageError
from cloister.party.evidence import Signed, read_evidence, read_signed

app = typer.Typer(help="Evidence of any TEE: show it, verify it.", no_args_is_help=True)
File = Annotated[
    Path, typer.Argument(help="A quote (SGX, TDX), SEV-SNP report or Nitro document; binary, hex or base64.")
]
Tee = Annotated[
    Literal["sgx", "tdx", "snp", "nitro"] | None,
    typer.Option("--tee", help="What it must be; by default whatever it is."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.command("show")
def show(file: File, tee: Tee = None, as_json: AsJson = False) -> None:
    """Print every field of a piece of evidence. Nothing is verified, so nothing of it is to be believed."""
    signed = read_signed(_read(file), tee)
    facts = dict(_facts(signed))
    if as_json:
        print_json({"tee": signed.tee, "verified": False, "fields": facts})
        return
    table(f"{signed.tee} evidence, NOT verified", ("field", "value"), facts.items())


@app.command("verify")
def verify(
    file: File,
    collateral: Annotated[
        list[Path] | None,
        typer.Option(
            "--collateral",
            help="DCAP collateral (JSON), or AMD certificates and revocation list (PEM, DER, table, JSON).",
        ),
    ] = None,
    policy: Annotated[Path | None, typer.Option("--policy", help="Appraisal policy (TOML).")] = None,
    at: Annotated[int | None, typer.Option("--at", help="Unix seconds to verify at; by default now.")] = None,
    root: Annotated[
        Path | None,
        typer.Option("--simulated-root", help="Believe these roots of a simulated platform (PEM) instead."),
    ] = None,
    tee: Tee = None,
    as_json: AsJson = False,
) -> None:
    """Verify evidence: signatures, chains, revocation, dates; under a policy also what it says."""
    now = int(time.time()) if at is None else at
    wanted = None if policy is None else AppraisalPolicy.from_toml(read_text(policy, "policy"))
    evidence = read_evidence(_read(file), [_read(each) for each in collateral or ()], tee)
    steps: list[Step] = []
    try:
        verified = verify_evidence(evidence, anchors=_anchors(wanted, root), now=now, steps=steps)
        accepted = None if wanted is None else appraise(verified, wanted, now=now)
    except CloisterError as error:
        if as_json:
            record = {"tee": evidence.tee, "steps": [step.to_dict() for step in steps]}
            print_json({**error.to_dict(), **record})
            raise typer.Exit(1) from error
        _print_steps(f"{evidence.tee} evidence, REFUSED after these steps", steps)
        raise
    if as_json:
        appraised = [] if accepted is None else [step.to_dict() for step in accepted.steps]
        found = verified.to_dict()
        found["steps"] = [*found["steps"], *appraised]
        print_json({**found, "policy": None if accepted is None else accepted.policy_digest.hex()})
        return
    shown = [*verified.steps, *(accepted.steps if accepted else ())]
    _print_steps(f"{verified.tee} evidence, {'accepted' if accepted else 'genuine'}", shown)
    facts = {"TCB status": verified.tcb_status or "none given", "debug": verified.debug}
    if verified.advisories:
        facts["advisories"] = ", ".join(verified.advisories)
    table("What it says", ("field", "value"), [*facts.items(), *_flat(dict(verified.measurements))])
    if accepted is None:
        console.print("[yellow]no policy: whether this is the code that you want was not looked at[/yellow]")
    if verified.simulated:
        console.print("[yellow]simulated: this TEE protects nothing from its administrator[/yellow]")


def _anchors(policy: AppraisalPolicy | None, root: Path | None) -> TrustAnchors:
    if policy is not None:
        if root is not None:
            raise UsageError(
                "the policy names its own roots",
                code="usage.roots",
                claim="--simulated-root",
                expected="no policy beside it",
                actual="both",
            )
        return policy.anchors
    if root is None:
        return TrustAnchors.vendor()
    pem = read_text(root, "simulated roots").encode()
    return TrustAnchors.simulated(b"".join(read_pem(pem, most=MAX_SIMULATED_ROOTS)))


def _print_steps(title: str, steps: list[Step]) -> None:
    table(title, ("step", "outcome", "detail"), [(step.name, step.outcome, step.detail) for step in steps])


def _facts(signed: Signed) -> Iterator[tuple[str, str | int]]:
    """Every field of the parsed evidence, nested ones with dots; certificates by subject and dates."""
    yield from _flat(signed.parsed)
    if signed.table:
        yield "certificate_table", f"{len(signed.table)} B"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str | int]]:
    if is_dataclass(value):
        for field in fields(value):
            yield from _flat(getattr(value, field.name), f"{prefix}.{field.name}" if prefix else field.name)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, bytes) and value.startswith(b"-----BEGIN"):
        yield from _chain(value, prefix)
    elif isinstance(value, bytes):
        yield prefix, value.hex()
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _flat(item, f"{prefix}[{index}]")
    elif value is not None:
        yield prefix, value if type(value) is int else str(value)


def _chain(pem: bytes, prefix: str) -> Iterator[tuple[str, str]]:
    try:
        for index, each in enumerate(load_chain(pem)):
            yield f"{prefix}[{index}]", f"{each.common_name} sha256:{each.fingerprint.hex()}"
    except EvidenceError as error:
        yield prefix, f"{len(pem)} B of PEM that is no chain of Intel's: {error.message}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            "the file can't be read",
            code="file.read",
            claim="evidence or collateral",
            expected="a readable file",
            actual=f"{path}: {error.strerror}",
        ) from error
