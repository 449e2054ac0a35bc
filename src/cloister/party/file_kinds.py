"""What a file looks like that was given as evidence or collateral, so that an error can say so.

Nothing is believed for its looks, and no content is quoted: a key or a token may have been given by mistake.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from cloister.core.evidence.bundle import Collateral
from cloister.core.evidence.snp_table import GUIDS, MAX_ENTRIES
from cloister.core.verifier.certificates import parse_certificate
from cloister.errors import EvidenceError, UsageError

MAX_FILE: Final = 4 << 20  # bytes
DCAP_JSON: Final = "DCAP collateral (JSON)"
AMD_JSON: Final = "AMD certificates and revocation list (JSON)"
PEM: Final = "certificates (PEM)"
CERTIFICATE: Final = "a certificate (DER)"
CRL: Final = "a revocation list (DER)"
TABLE: Final = "an SNP certificate table"
TOML: Final = "a TOML file, as policies are"
COLLATERAL: Final = frozenset({DCAP_JSON, AMD_JSON, PEM, CERTIFICATE, CRL, TABLE})
DCAP_FIELDS: Final = tuple(field.name for field in fields(Collateral))
AMD_FIELDS: Final = ("certificates", "crl")

_PCS_FIELDS: Final = ("tcbInfo", "enclaveIdentity")
_TABLE_HEAD: Final = 24 * (MAX_ENTRIES + 1)  # bytes
_LABEL: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----")
_TOML_LINE: Final = re.compile(rb'\[{1,2}[A-Za-z_][\w."-]{0,80}\]{1,2}$|[\w."-]{1,80}[ \t]*=[ \t]*[^=\s]')


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenFile:
    """A file that was given as collateral: its name for errors, its content, and what that looks like."""

    name: str
    content: bytes
    kind: str

    def not_as(self, expected: str, hint: str) -> EvidenceError:
        """The error where another kind was expected."""
        return EvidenceError(
            "this is no collateral for this evidence",
            code="collateral.kind",
            claim="collateral",
            expected=expected,
            actual=f"{self.name}: {self.kind}",
            hint="A policy is given with --policy" if self.kind == TOML else hint,
        )


def kind_of(data: bytes) -> str:
    """What bytes look like that are no evidence: one of `COLLATERAL`, `TOML`, or words for an error."""
    start = data[:1024].lstrip()
    if not data:
        return "an empty file"
    if start[:1] == b"{" or (start[:1] == b"[" and not _is_toml(data)):
        return _json_kind(data)
    if start[:1] == b"<":
        return "HTML or XML, as a web server's error page is"
    if data[:2] == b"\x30\x82":
        return _der_kind(data)
    if any(guid.bytes in data[:_TABLE_HEAD] for guid in GUIDS.values()):
        return TABLE  # which may have PEM inside
    label = _LABEL.search(data[:256])
    if label is not None:
        return _pem_kind(label[1])
    if not _is_text(data[:1024]):
        return f"{len(data)} B of binary data" if any(data) else f"{len(data)} B of zeros"
    return TOML if _is_toml(data) else f"{len(data)} B of text"


def read_file(path: Path, what: str, absent: str = "") -> bytes:
    """Read a file that the user named.

    Args:
        path: Of the file.
        what: It is, for errors.
        absent: What to do where there is no such file, for errors.

    Raises:
        UsageError: it can't be read, or has more than `MAX_FILE` bytes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UsageError(
            f"the {what} can't be read",
            code="file.read",
            claim=what,
            expected="a readable file",
            actual=f"{path}: {error.strerror}",
            hint=absent if isinstance(error, FileNotFoundError) else "",
        ) from error
    require_length(content, what)
    return content


def require_length(content: bytes, what: str) -> None:
    """Refuse more than `MAX_FILE` bytes; raises UsageError."""
    if len(content) > MAX_FILE:
        raise UsageError("the file is too long", claim=what, expected=f"at most {MAX_FILE} B", actual="more")


def json_object(data: bytes) -> dict[str, Any]:
    """A file that looked like one object of JSON; raises EvidenceError."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise EvidenceError(
            "the collateral is not JSON", code="evidence.collateral", claim="collateral"
        ) from error
    if not isinstance(value, dict):
        raise EvidenceError("the collateral is no object", code="evidence.collateral", claim="collateral")
    return value


def text_field(value: dict[str, Any], name: str, form: str) -> str:
    """One field of `json_object`; raises EvidenceError."""
    text = value.get(name)
    if type(text) is not str:
        raise EvidenceError(
            "the collateral lacks a field" if name not in value else "a field of the collateral is not text",
            code="evidence.collateral",
            claim=name,
            expected=form,
            actual=type(text).__name__ if name in value else "no such field",
        )
    return text


def _pem_kind(label: bytes) -> str:
    if label == b"CERTIFICATE":
        return PEM
    return "a revocation list (PEM)" if label == b"X509 CRL" else f"PEM of another kind ({label.decode()})"


def _json_kind(data: bytes) -> str:
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError):
        return "JSON that is cut off or broken"
    names = value.keys() if isinstance(value, dict) else ()
    if any(name in names for name in DCAP_FIELDS):
        return DCAP_JSON
    if any(name in names for name in AMD_FIELDS):
        return AMD_JSON
    if any(name in names for name in _PCS_FIELDS):
        return "a single answer of Intel's PCS (JSON)"
    return "JSON with other fields"


def _der_kind(data: bytes) -> str:
    for kind, load in ((CERTIFICATE, parse_certificate), (CRL, x509.load_der_x509_crl)):
        try:
            load(data)
        except Exception:  # noqa: S112  # the parser has many kinds of failure; each means: not this
            continue
        return kind
    return "DER that is neither a certificate nor a revocation list"


def _is_toml(data: bytes) -> bool:
    """Whether the first line that says something is one of TOML's; parsing it all may take very long."""
    lines = (line.strip() for line in data[:4096].splitlines())
    return bool(_TOML_LINE.match(next((line for line in lines if line and not line.startswith(b"#")), b"")))


def _is_text(data: bytes) -> bool:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if error.start < len(data) - 3:  # or else a character was cut
            return False
        text = data[: error.start].decode()
    return all(char.isprintable() or char.isspace() for char in text)
