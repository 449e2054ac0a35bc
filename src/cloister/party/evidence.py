"""Evidence and collateral in the forms in which people have them: binary, hex or base64; JSON, PEM or DER."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509

from cloister.core import encoding
from cloister.core.evidence.bundle import (
    AmdCollateral,
    AnyCollateral,
    Collateral,
    Evidence,
)
from cloister.core.evidence.dcap import TEE_TDX, Quote
from cloister.core.evidence.nitro import NitroDocument
from cloister.core.evidence.snp import REPORT_SIZE, SnpReport
from cloister.core.evidence.snp_table import CertificateTable, make_collateral
from cloister.core.verifier.chain import AMD, Certificate, load_certificate, load_crl, read_pem
from cloister.core.verifier.roots import amd
from cloister.core.verifier.roots.amd_intermediates import INTERMEDIATES
from cloister.errors import EvidenceError, FormatError, UsageError

MAX_FILE: Final = 4 << 20  # bytes
_TABLES: Final = 64 << 10  # bytes of a certificate table
_ARKS: Final = {"Milan": amd.MILAN_ARK, "Genoa": amd.GENOA_ARK, "Turin": amd.TURIN_ARK}

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
    if len(data) > MAX_FILE:
        raise UsageError("the file is too long", claim="evidence", expected=MAX_FILE, actual=len(data))
    raw, table = _tsm(_binary(data))
    found = _recognised(raw, table)
    if tee is not None and tee != found.tee:
        raise EvidenceError(
            "the evidence is another TEE's", code="evidence.tee", claim="tee", expected=tee, actual=found.tee
        )
    return found


def read_evidence(data: bytes, collateral: Iterable[bytes] = (), tee: str | None = None) -> Evidence:
    """Put evidence together from files.

    Args:
        data: As for `read_signed`.
        collateral: For SGX and TDX one JSON file (the form of ``dcap-qvl``); for SNP certificates in PEM or
            DER, a revocation list in DER, a certificate table, or JSON with ``certificates`` (PEM) and
            ``crl`` (hex). AMD's own ASK, ASVK and ARK needn't be among them.
        tee: As for `read_signed`.

    Raises:
        EvidenceError: something doesn't parse.
        UsageError: collateral is missing, or there is too much of it.
    """
    signed, files = read_signed(data, tee), list(collateral)
    for each in files:
        if len(each) > MAX_FILE:
            raise UsageError("the file is too long", claim="collateral", expected=MAX_FILE, actual=len(each))
    found: AnyCollateral
    match signed.parsed:
        case NitroDocument():  # brings its certificates
            found = None
        case SnpReport():
            found = _amd_collateral(signed, files)
        case _:
            if len(files) != 1:
                raise _missing("one JSON file of DCAP collateral", len(files))
            found = Collateral.from_json(_text(files[0]))
    return Evidence(tee=signed.tee, quote=signed.raw, collateral=found)


def _recognised(raw: bytes, table: bytes) -> Signed:
    if len(raw) >= REPORT_SIZE and raw[1:4] == bytes(3) and 2 <= raw[0] <= 5:
        report, rest = raw[:REPORT_SIZE], raw[REPORT_SIZE:]
        return Signed(tee="snp", raw=report, parsed=SnpReport.from_bytes(report), table=table or rest)
    if raw[:1] in (b"\x84", b"\xd2"):
        return Signed(tee="nitro", raw=raw, parsed=NitroDocument.from_bytes(raw))
    if len(raw) > 8 and raw[1] == 0 and 3 <= raw[0] <= 5:
        quote = Quote.from_bytes(raw)
        return Signed(tee="tdx" if quote.header.tee_type == TEE_TDX else "sgx", raw=raw, parsed=quote)
    raise EvidenceError(
        "this is no evidence that Cloister knows",
        code="evidence.format",
        claim="evidence",
        expected="a DCAP quote (SGX, TDX), an SEV-SNP report or a Nitro document",
        actual=f"{len(raw)} B that begin with {raw[:8].hex()}",
    )


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
        value = encoding.decode(raw, what="tsm report", limit=_TABLES, items=16, foreign=True)
    except FormatError:  # whatever it is then, it is recognised or refused as it stands
        return raw, b""
    report = value.get("outblob") if isinstance(value, dict) else None
    table = value.get("auxblob", b"") if isinstance(value, dict) else b""
    return (report, table) if type(report) is bytes and type(table) is bytes else (raw, b"")


def _amd_collateral(signed: Signed, files: list[bytes]) -> AmdCollateral:
    certificates: list[bytes] = []
    crl = b""
    tables = [signed.table] if signed.table else []
    for data in files:
        if data.lstrip()[:1] == b"{":
            fields = _json(data)
            certificates += read_pem(fields["certificates"].encode("ascii", "replace"), most=3)
            crl = crl or bytes.fromhex(fields["crl"])
        elif b"-----BEGIN CERTIFICATE-----" in data[:256]:
            certificates += read_pem(data, most=8)
        elif data[:1] == b"\x30" and _is_crl(data):
            crl = data
        elif data[:1] == b"\x30":
            certificates.append(data)
        else:
            tables.append(data)
    for table in tables:
        if len(table) > _TABLES:
            raise UsageError(
                "the file is too long", claim="certificate table", expected=_TABLES, actual=len(table)
            )
        parsed = CertificateTable.from_bytes(table)
        names = ("VCEK", "VLEK", "ASK", "ARK")
        certificates += [
            entry if entry[:1] == b"\x30" else read_pem(entry, most=1)[0]
            for entry in map(parsed.find, names)
            if entry
        ]
        crl = crl or parsed.find("CRL")
    return _sorted(signed, [load_certificate(each, AMD) for each in certificates], crl)


def _sorted(signed: Signed, certificates: list[Certificate], crl: bytes) -> AmdCollateral:
    """Leaf, intermediate, root; AMD's own intermediates and roots where they are missing."""
    leaves = [each for each in certificates if each.path_length < 0]
    if not leaves:
        raise _missing("the VCEK or VLEK certificate of the report's signer", 0)
    leaf, others = leaves[0], [each for each in certificates if each.path_length >= 0]
    asks = [each for each in others if each.parsed.subject == leaf.parsed.issuer]
    ask = asks[0] if asks else _known(leaf, INTERMEDIATES.values())
    arks = [each for each in others if each.parsed.subject == ask.parsed.issuer]
    ark = arks[0] if arks else _known(ask, _ARKS.values())
    return make_collateral(vek=leaf.der, ask=ask.der, ark=ark.der, crl=crl)


def _known(subject: Certificate, candidates: Iterable[bytes]) -> Certificate:
    for der in candidates:
        candidate = load_certificate(der, AMD)
        if candidate.parsed.subject == subject.parsed.issuer:
            return candidate
    raise EvidenceError(
        "no issuer of a certificate is at hand",
        code="evidence.certificate",
        claim=f"issuer of {subject.common_name}",
        expected="among the given certificates, or one of AMD's",
        actual=subject.parsed.issuer.rfc4514_string(),
    )


def _is_crl(data: bytes) -> bool:
    try:
        x509.load_der_x509_crl(data)
    except Exception:  # the parser has many kinds of failure; whatever it is, it is no list
        return False
    load_crl(data, AMD)
    return True


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EvidenceError("the collateral is not JSON", code="evidence.collateral") from error
    if not isinstance(value, dict) or not all(
        type(value.get(name)) is str for name in ("certificates", "crl")
    ):
        raise EvidenceError(
            "the collateral has other fields",
            code="evidence.collateral",
            claim="collateral",
            expected="certificates (PEM) and crl (hex)",
        )
    try:
        bytes.fromhex(value["crl"])
    except ValueError as error:
        raise EvidenceError(
            "the revocation list is not hex", code="evidence.collateral", claim="crl"
        ) from error
    return value


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise EvidenceError("the collateral is not text", code="evidence.collateral") from error


def _missing(expected: str, found: int) -> UsageError:
    return UsageError(
        "the evidence can't be verified without its collateral",
        code="usage.collateral",
        claim="--collateral",
        expected=expected,
        actual=f"{found} given" if found else "none",
        hint="Fetch it with: cloister collateral fetch",
    )
