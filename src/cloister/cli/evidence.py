"""``cloister evidence``: what a quote, report or document says, and whether it is genuine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from cloister.cli.output import console, print_json, read_text, table
from cloister.cli.policies import read_appraisal_policy
from cloister.core.times import time_text
from cloister.core.verifier import verify as verify_evidence
from cloister.core.verifier.anchors import MAX_SIMULATED_ROOTS, TrustAnchors
from cloister.core.verifier.appraisal import AppraisalPolicy, AppraisalResult, appraise
from cloister.core.verifier.certificates import load_chain, read_pem
from cloister.core.verifier.result import Step, VerifiedEvidence
from cloister.errors import CloisterError, EvidenceError, UsageError
from cloister.party.evidence import Signed, open_evidence, read_signed
from cloister.party.file_kinds import read_file

REPORT_DATA_SIZE: Final = 64  # bytes, of every TEE but Nitro
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
    signed = read_signed(read_file(file, "evidence"), tee)
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
            help="A folder that `cloister collateral fetch` filled; or DCAP collateral (JSON), or AMD "
            "certificates and revocation list (PEM, DER, table, JSON). Nitro needs none.",
        ),
    ] = None,
    policy: Annotated[Path | None, typer.Option("--policy", help="Appraisal policy (TOML).")] = None,
    at: Annotated[int | None, typer.Option("--at", help="Unix seconds to verify at; by default now.")] = None,
    root: Annotated[
        Path | None,
        typer.Option("--simulated-root", help="Believe these roots of a simulated platform (PEM) instead."),
    ] = None,
    report_data: Annotated[
        str | None,
        typer.Option(
            "--report-data",
            help="What it must bind (hex): REPORTDATA, zeros behind it may be left out; Nitro's user_data.",
        ),
    ] = None,
    tee: Tee = None,
    as_json: AsJson = False,
) -> None:
    """Verify evidence: signatures, chains, revocation, dates; under a policy also what it says."""
    now = int(time.time()) if at is None else at
    bound = None if report_data is None else _unhex(report_data)
    wanted = None if policy is None else read_appraisal_policy(policy)
    evidence = open_evidence(file, collateral or (), tee)
    steps: list[Step] = []
    try:
        verified = verify_evidence(evidence, anchors=_anchors(wanted, root), now=now, steps=steps)
        if bound is not None:
            _require_bound(verified, bound, steps)
        accepted = None if wanted is None else appraise(verified, wanted, now=now, steps=steps)
    except CloisterError as error:
        detail = f"expected {error.expected}, found {error.actual}" if error.expected else error.message
        steps.append(Step(name=error.claim or error.code, outcome="refused", detail=detail))
        if as_json:
            record = {"tee": evidence.tee, "verdict": "refused", "steps": [step.to_dict() for step in steps]}
            print_json({**error.to_dict(), **record})
            raise typer.Exit(1) from error
        _print_steps(f"{evidence.tee} evidence, REFUSED", steps)
        raise
    verdict = "genuine" if accepted is None else "accepted"
    until = verified.not_after if accepted is None else accepted.not_after
    if as_json:
        print_json(
            verified.to_dict()
            | {
                "verdict": verdict,
                "policy": None if accepted is None else accepted.policy_digest.hex(),
                "not_after": until,
                "steps": [step.to_dict() for step in steps],
            }
        )
        return
    _print_steps(f"{verified.tee} evidence, {verdict}", steps)
    table("What it says", ("field", "value"), _findings(verified, until))
    for line in _warnings(verified, accepted, bound):
        console.print(line, style="yellow", markup=False)


def _findings(verified: VerifiedEvidence, until: int) -> Iterator[tuple[str, object]]:
    """What a person wants to know of genuine evidence."""
    yield "TCB status", verified.tcb_status or "the vendor gives none"
    yield "advisories", ", ".join(verified.advisories) or "none"
    yield "debug", "YES" if verified.debug else "no"
    yield from _flat(verified.measurements)
    yield "user_data" if verified.tee == "nitro" else "report_data", verified.report_data.hex()
    yield "to be verified again", f"by {time_text(until)}"


def _warnings(
    verified: VerifiedEvidence, accepted: AppraisalResult | None, bound: bytes | None
) -> Iterator[str]:
    """What a person must not overlook."""
    if verified.debug:
        yield "DEBUG: whoever runs this machine can read all of its memory; do not send it anything"
    if accepted is None:
        yield "no policy: whether this is the code that you want was not looked at"
    if bound is None:
        yield "no --report-data: whose evidence this is, and whether it is fresh, was not looked at"
    if verified.simulated:
        yield "simulated: this TEE protects nothing from its administrator"


def _require_bound(verified: VerifiedEvidence, bound: bytes, steps: list[Step]) -> None:
    expected = bound if verified.tee == "nitro" else bound.ljust(REPORT_DATA_SIZE, b"\0")
    verified.require_report_data(expected)
    steps.append(Step(name="report data", outcome="ok", detail=expected.hex()))


def _unhex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise UsageError(
            "not hex digits",
            code="usage.report-data",
            claim="--report-data",
            expected="hex digits",
            actual=text[:40],
        ) from error


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
    """Every field of the parsed evidence, nested ones with dots; certificates by subject and digest."""
    for name, value in _flat(signed.parsed):
        yield name.replace("pcrs.", "pcr"), value  # as policies call them
    if signed.table:
        yield "certificate_table", f"{len(signed.table)} B"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str | int]]:
    if is_dataclass(value):
        for field in fields(value):
            yield from _flat(getattr(value, field.name), f"{prefix}.{field.name}" if prefix else field.name)
    elif isinstance(value, Mapping):
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
