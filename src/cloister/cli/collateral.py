"""``cloister collateral``: keeps a host's folder of the vendors' collateral for its enclaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cloister.cli.output import console, print_json, table
from cloister.core.evidence.vek import CHIP_ID_SIZE
from cloister.core.verifier.collateral_key import DcapKey, SnpKey, crl_file
from cloister.errors import NotFound, Refused, Unavailable, UsageError
from cloister.party.evidence import TEE_NAMES, Signed, read_signed
from cloister.party.file_kinds import read_file

if TYPE_CHECKING:
    from cloister.host.collateral import CollateralFolder, Entry, Service

app = typer.Typer(
    help="The vendors' collateral, which a host fetches for its enclaves.", no_args_is_help=True
)
_OPTIONS: Final = MappingProxyType({"sgx": "--quote", "tdx": "--quote", "snp": "--report"})

Into = Annotated[
    Path, typer.Option("--into", help="Folder that the enclaves' CLOISTER_COLLATERAL names.", dir_okay=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.command("fetch")
def fetch(
    into: Into = Path("collateral"),
    quote: Annotated[
        Path | None, typer.Option(help="An SGX or TDX quote to fetch for; binary, hex or base64.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="An SEV-SNP report to fetch for; likewise.")] = None,
    tee: Annotated[str, typer.Option(help="sgx or tdx, with --fmspc and --ca.")] = "sgx",
    fmspc: Annotated[str | None, typer.Option(help="Platform family, 12 hex digits.")] = None,
    ca: Annotated[str, typer.Option(help="CA of the PCK certificate: processor or platform.")] = "platform",
    product: Annotated[
        str | None,
        typer.Option(help="Milan, Genoa or Turin; alone it fetches the revocation list only."),
    ] = None,
    chip_id: Annotated[str | None, typer.Option(help="CHIP_ID of a report, 128 hex digits.")] = None,
    tcb: Annotated[str | None, typer.Option(help="REPORTED_TCB of a report, 16 hex digits.")] = None,
    pcs: Annotated[
        str | None, typer.Option(help="Service with Intel's PCS v4 interface; by default Intel's own.")
    ] = None,
    root_crl: Annotated[
        str, typer.Option(help="URL of the SGX root's revocation list; by default Intel's, or the cache's.")
    ] = "",
    update: Annotated[str, typer.Option(help="standard or early TCB info.")] = "standard",
    kds: Annotated[
        str | None, typer.Option(help="Service with AMD's KDS interface; by default AMD's own.")
    ] = None,
    tls_ca: Annotated[
        str | None, typer.Option(help="Certificates (PEM) to believe, for a private cache.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch collateral for one platform and check that it fits; what is there stays where that fails."""
    from cloister.host.collateral import AMD_KDS, INTEL_PCS, CollateralFolder, Service

    folder = CollateralFolder(into)
    wanted = _wanted(quote, report, tee, fmspc, ca, product, chip_id, tcb)
    with Service(tls_ca=tls_ca) as service, _progress(quiet=as_json) as say, _keeping(folder, wanted):
        if isinstance(wanted, DcapKey):
            entries = _fetch_dcap(service, folder, wanted, pcs or INTEL_PCS, root_crl, update, say)
        else:
            entries = _fetch_snp(service, folder, *wanted, kds or AMD_KDS, say)
    _show(folder, entries, as_json=as_json)


@app.command("list")
def list_files(into: Into = Path("collateral"), as_json: AsJson = False) -> None:
    """List what the folder holds, and how old it is."""
    from cloister.host.collateral import CollateralFolder

    folder = CollateralFolder(into)
    _show(folder, list(folder.entries()), as_json=as_json)


_Wanted = DcapKey | tuple[SnpKey | None, str]


def _wanted(
    quote: Path | None,
    report: Path | None,
    tee: str,
    fmspc: str | None,
    ca: str,
    product: str | None,
    chip_id: str | None,
    tcb: str | None,
) -> _Wanted:
    named = {"--quote": quote, "--report": report, "--fmspc": fmspc}
    if report is None:
        named["--product"] = product  # beside a report it only adds what the report may lack
    given = [name for name, value in named.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            "say for what to fetch, in one way",
            code="collateral.what",
            claim="options",
            expected="one of --quote, --report, --fmspc and --product",
            actual=", ".join(given) or "none",
        )
    if quote is not None:
        return DcapKey.from_quote(_signed(quote, "--quote").raw)
    if report is not None:
        return _from_report(_signed(report, "--report").raw, product)
    if fmspc is not None:
        return DcapKey(tee=tee, fmspc=_unhex("--fmspc", fmspc), ca=ca)
    if (chip_id is None) != (tcb is None):
        raise UsageError(
            "a chip's certificates are those of one TCB", code="collateral.what", claim="--chip-id and --tcb"
        )
    key = None
    if chip_id is not None and tcb is not None:
        key = SnpKey(
            chip_id=_unhex("--chip-id", chip_id).ljust(CHIP_ID_SIZE, b"\0"), tcb=_unhex("--tcb", tcb)
        )
    return key, product or ""


def _signed(path: Path, option: str) -> Signed:
    """The evidence in a file, in any form, as long as its option is the right one."""
    found = read_signed(read_file(path, option.removeprefix("--")))
    right = _OPTIONS.get(found.tee, "")
    if right != option:
        raise UsageError(
            "the file holds another kind of evidence",
            code="collateral.what",
            claim=option,
            expected=" or ".join(TEE_NAMES[tee] for tee, each in _OPTIONS.items() if each == option),
            actual=f"{path}: {TEE_NAMES[found.tee]}",
            hint=f"Give it with {right}" if right else "It brings its certificates: nothing is to be fetched",
        )
    return found


def _from_report(raw: bytes, product: str | None) -> tuple[SnpKey, str]:
    from cloister.core.evidence.snp import SnpReport

    found = SnpReport.from_bytes(raw)
    return SnpKey(chip_id=found.chip_id, tcb=found.reported_tcb), product or found.product


def _fetch_dcap(
    service: Service,
    folder: CollateralFolder,
    key: DcapKey,
    pcs: str,
    root_crl: str,
    update: str,
    say: Callable[[str], None],
) -> list[Entry]:
    from cloister.host.collateral import fetch_dcap

    collateral = fetch_dcap(
        service, key, now=int(time.time()), pcs=pcs, root_crl=root_crl, update=update, say=say
    )
    return [folder.write(key.file, collateral.to_json().encode())]


def _fetch_snp(
    service: Service,
    folder: CollateralFolder,
    key: SnpKey | None,
    product: str,
    kds: str,
    say: Callable[[str], None],
) -> list[Entry]:
    from cloister.host.collateral import fetch_snp, fetch_snp_crl

    now = int(time.time())
    if key is None:
        shared = fetch_snp_crl(service, product, now=now, kds=kds, say=say)
        return [folder.write(crl_file(shared.ark), shared.crl)]
    certificates, shared = fetch_snp(service, key, product, now=now, kds=kds, say=say)
    return [
        folder.write(key.file, certificates),
        folder.write(crl_file(shared.ark), shared.crl),
    ]


@contextmanager
def _keeping(folder: CollateralFolder, wanted: _Wanted) -> Iterator[None]:
    """Say with a failure that what was fetched before is still there, and how old it is."""
    try:
        yield
    except (NotFound, Refused, Unavailable, UsageError) as error:
        key = wanted[0] if isinstance(wanted, tuple) else wanted
        kept = folder.find(key.file) if key is not None else None
        if kept is not None:
            hint = f"Kept {folder.root / kept.name}, which is {_age(kept.age)} old"
            error.hint = f"{error.hint}. {hint}" if error.hint else hint
        raise


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Tells a person what is being fetched."""
    if quiet:
        yield lambda _: None
        return
    with console.status("fetching") as status:
        yield lambda what: status.update(f"fetching {what}")


def _show(folder: CollateralFolder, entries: list[Entry], *, as_json: bool) -> None:
    if as_json:
        files = [{"file": e.name, "mode": f"{e.mode:04o}", "bytes": e.size, "age": e.age} for e in entries]
        print_json({"folder": str(folder.root), "files": files})
        return
    table(
        f"Collateral in {folder.root}",
        ("file", "mode", "bytes", "age"),
        [(e.name, f"{e.mode:04o}", e.size, _age(e.age)) for e in entries],
    )


def _age(seconds: int) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _unhex(claim: str, text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise UsageError(
            "not hex digits", code="collateral.what", claim=claim, expected="hex digits", actual=text[:40]
        ) from error
