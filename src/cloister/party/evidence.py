"""Evidence and collateral in the forms in which people have them: binary, hex or base64; JSON, PEM or DER."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from cloister.core import encoding
from cloister.core.evidence.bundle import AnyCollateral, Collateral, Evidence
from cloister.core.evidence.dcap import TEE_TDX, Quote
from cloister.core.evidence.nitro import MAX_CABUNDLE, NitroDocument
from cloister.core.evidence.snp import REPORT_SIZE, SnpReport
from cloister.core.evidence.snp_table import MAX_TABLE
from cloister.core.verifier.certificates import read_pem
from cloister.core.verifier.collateral_key import DcapKey
from cloister.errors import EvidenceError, FormatError, UsageError
from cloister.party import file_kinds
from cloister.party.amd_files import read_amd_collateral
from cloister.party.collateral_folders import CollateralFolders
from cloister.party.file_kinds import (
    DCAP_FIELDS,
    DCAP_JSON,
    GivenFile,
    json_object,
    kind_of,
    read_file,
    require_length,
    text_field,
)

TEE_NAMES: Final = MappingProxyType(
    {
        "sgx": "an SGX quote",
        "tdx": "a TDX quote",
        "snp": "an SEV-SNP report",
        "nitro": "a Nitro document",
    }
)

_MAX_QUOTED: Final = 256 << 10  # bytes; nothing longer is evidence in any form
_MAX_TSM: Final = MAX_TABLE + (4 << 10)  # bytes: a table, a report, and what surrounds them
_DCAP: Final = "one JSON file of DCAP collateral"

Parsed = Quote | SnpReport | NitroDocument


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """What a TEE signed, and what came along in the same file.

    Attributes:
        tee: ``"sgx"``, ``"tdx"``, ``"snp"`` or ``"nitro"``.
        raw: The quote, report or document.
        parsed: The same, parsed.
        table: An SNP certificate table; empty where there was none.
    """

    tee: str
    raw: bytes
    parsed: Parsed
    table: bytes = b""


def read_signed(data: bytes, tee: str | None = None) -> Signed:
    """Recognise a quote, report or document.

    Args:
        data: Binary, hex or base64; for SNP also with its certificate table behind it, or the CBOR map of
            configfs-tsm's ``outblob`` and ``auxblob``.
        tee: What it must be; by default whatever it is.

    Raises:
        EvidenceError: it is none that is known, or another than ``tee``.
        UsageError: it is too long.
    """
    require_length(data, "evidence")
    raw, table = _tsm(_binary(data))
    found = _recognised(raw, table)
    if found is None:
        kind = kind_of(data)
        raise EvidenceError(
            "this is no evidence that Cloister knows",
            code="evidence.format",
            claim="evidence",
            expected="a DCAP quote (SGX, TDX), an SEV-SNP report or a Nitro document",
            actual=kind,
            hint=_EVIDENCE_HINTS.get(kind, ""),
        )
    if tee is not None and tee != found.tee:
        raise EvidenceError(
            "the evidence is another TEE's", code="evidence.tee", claim="tee", expected=tee, actual=found.tee
        )
    return found


def read_evidence(data: bytes, collateral: Iterable[bytes] = (), tee: str | None = None) -> Evidence:
    """Put evidence together from the contents of files.

    Args:
        data: As for `read_signed`.
        collateral: For SGX and TDX one JSON file (the form of ``dcap-qvl``); for SNP certificates in PEM or
            DER, a revocation list in DER, a certificate table, or JSON with ``certificates`` (PEM) and
            ``crl`` (hex). AMD's own ASK, ASVK and ARK needn't be among them. Nitro needs none; certificates
            that the document brings may be given.
        tee: As for `read_signed`.

    Raises:
        EvidenceError: something doesn't parse, or is of another kind.
        UsageError: collateral is missing, or there is too much of it.
    """
    signed = read_signed(data, tee)
    files = [_given(f"file {number}", content) for number, content in enumerate(collateral, start=1)]
    return _put_together(signed, files, CollateralFolders.of((), signed.parsed, "FILE"))


def open_evidence(file: Path, collateral: Iterable[Path] = (), tee: str | None = None) -> Evidence:
    """Put evidence together from files and folders.

    Args:
        file: The quote, report or document.
        collateral: Files as for `read_evidence`. A folder, as ``cloister collateral fetch`` fills it, gives
            what the evidence needs and the files lack; that is nothing for Nitro, and includes the
            revocation list for SNP.
        tee: As for `read_signed`.

    Raises:
        EvidenceError: as `read_evidence`.
        UsageError: as `read_evidence`, or a file can't be read.
    """
    signed = read_signed(read_file(file, "evidence"), tee)
    paths = list(collateral)
    folders = CollateralFolders.of(filter(os.path.isdir, paths), signed.parsed, str(file))
    files = [
        _given(str(path), read_file(path, "collateral", folders.hint))
        for path in paths
        if path not in folders.paths
    ]
    return _put_together(signed, files, folders)


def _given(name: str, content: bytes) -> GivenFile:
    require_length(content, "collateral")
    return GivenFile(name=name, content=content, kind=_evidence_kind(content) or kind_of(content))


def _evidence_kind(data: bytes) -> str:
    """What kind of evidence this is; empty where it is none."""
    if len(data) > _MAX_QUOTED:
        return ""
    try:
        found = _recognised(*_tsm(_binary(data)))
    except FormatError:
        return ""
    return TEE_NAMES[found.tee] if found else ""


def _put_together(signed: Signed, files: Sequence[GivenFile], folders: CollateralFolders) -> Evidence:
    found: AnyCollateral
    match signed.parsed:
        case NitroDocument():
            _require_brought(signed.parsed, files)
            found = None
        case SnpReport():
            found = read_amd_collateral(signed.parsed, signed.table, files, folders)
        case _:
            found = _dcap_collateral(signed.raw, files, folders)
    return Evidence(tee=signed.tee, quote=signed.raw, collateral=found)


def _require_brought(document: NitroDocument, files: Sequence[GivenFile]) -> None:
    """A Nitro document brings its certificates; the same ones may be given beside it, and nothing else."""
    brought = {document.certificate, *document.cabundle}
    for file in files:
        is_pem = file.kind == file_kinds.PEM
        given = read_pem(file.content, most=MAX_CABUNDLE + 1) if is_pem else [file.content]
        if not brought.issuperset(given):
            expected = "none, or certificates that the document brings itself"
            raise file.not_as(expected, "Leave it out")


def _dcap_collateral(quote: bytes, files: Sequence[GivenFile], folders: CollateralFolders) -> Collateral:
    for file in files:
        if file.kind != DCAP_JSON:
            raise file.not_as(_DCAP, folders.hint)
    if len(files) > 1:
        raise UsageError(
            "there is too much collateral",
            code="usage.collateral",
            claim="--collateral",
            expected=_DCAP,
            actual=f"{len(files)} files",
        )
    if files:
        content = files[0].content
    elif folders.paths:
        key = DcapKey.from_quote(quote)
        what = f"DCAP collateral of platform family {key.fmspc.hex()}"
        content = folders.take(key.file, what, DCAP_JSON)
    else:
        raise folders.lacking("--collateral", _DCAP, "none")
    value = json_object(content)
    for name in DCAP_FIELDS:
        text_field(value, name, "text")
    return Collateral.from_json(content.decode())


def _recognised(raw: bytes, table: bytes) -> Signed | None:
    """Parse what looks like evidence; raises EvidenceError where it only looks like it."""
    if len(raw) >= REPORT_SIZE and raw[1:4] == bytes(3) and 2 <= raw[0] <= 5:
        report, rest = raw[:REPORT_SIZE], raw[REPORT_SIZE:]
        return Signed(tee="snp", raw=report, parsed=SnpReport.from_bytes(report), table=table or rest)
    if raw[:1] in (b"\x84", b"\xd2"):
        return Signed(tee="nitro", raw=raw, parsed=NitroDocument.from_bytes(raw))
    if len(raw) > 8 and raw[1] == 0 and 3 <= raw[0] <= 5:
        quote = Quote.from_bytes(raw)
        return Signed(tee="tdx" if quote.header.tee_type == TEE_TDX else "sgx", raw=raw, parsed=quote)
    return None


def _binary(data: bytes) -> bytes:
    """The bytes that hex or base64 stands for; binary data as it is."""
    words = data.split()
    text = b"".join(words)
    if not text.isascii() or not text or any(byte < 0x20 for byte in text):
        return data
    try:
        return bytes.fromhex(text.decode())
    except ValueError:
        pass
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return data


def _tsm(raw: bytes) -> tuple[bytes, bytes]:
    """Report and table out of a CBOR map of configfs-tsm's files; other data as it is."""
    if raw[:1] not in (b"\xa2", b"\xa3", b"\xa4"):
        return raw, b""
    try:
        value = encoding.decode(raw, what="tsm report", limit=_MAX_TSM, items=16, foreign=True)
    except FormatError:  # whatever it is then, it is recognised or refused as it stands
        return raw, b""
    report = value.get("outblob") if isinstance(value, dict) else None
    table = value.get("auxblob", b"") if isinstance(value, dict) else b""
    return (report, table) if type(report) is bytes and type(table) is bytes else (raw, b"")


_COLLATERAL_HINT: Final = "`cloister evidence verify` takes it with --collateral, beside the evidence"
_EVIDENCE_HINTS: Final = MappingProxyType(
    {
        **dict.fromkeys(file_kinds.COLLATERAL, _COLLATERAL_HINT),
        file_kinds.TOML: "`cloister evidence verify` takes it with --policy, beside the evidence",
    }
)
