"""AWS Nitro attestation documents: bytes to frozen values and back.

A document is a COSE_Sign1 (RFC 9052, section 4.2; tag 18 optional) whose payload is a map (AWS,
aws-nitro-enclaves-nsm-api, ``docs/attestation_process.md``, sections 2.2 and 3)::

    [{1: -35}, {}, payload, signature 96 B]

AWS doesn't sort the keys of the map, and writes null for an optional field that is absent, though its own
text forbids null; both are kept. Every length and number is in its shortest form, nothing has an indefinite
length, and no key occurs twice: `cloister.core.encoding` sees to that. No trust decision is taken here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from cloister.core import encoding
from cloister.errors import EvidenceError, FormatError

MAX_DOCUMENT: Final = 16 << 10  # bytes; the device answers with at most 12 KiB
MAX_CERTIFICATE: Final = 1024  # bytes, DER
MAX_CABUNDLE: Final = 7  # certificates; AWS sends 4
MAX_MODULE_ID: Final = 255  # characters; AWS's have 39
MAX_PUBLIC_KEY: Final = 1024  # bytes
MAX_USER_DATA: Final = 512  # bytes
MAX_NONCE: Final = 512  # bytes
PCR_COUNT: Final = 32
PCR_SIZES: Final = (32, 48, 64)  # bytes
SIGNATURE_SIZE: Final = 96  # bytes; raw r || s on P-384
DIGEST: Final = "SHA384"

REQUIRED: Final = ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle")
OPTIONAL: Final = ("public_key", "user_data", "nonce")
FIELDS: Final = REQUIRED + OPTIONAL  # in the order in which AWS writes them

_TAG: Final = b"\xd2"  # 18, COSE_Sign1
_PROTECTED: Final = b"\xa1\x01\x38\x22"  # {1: -35}: ECDSA with SHA-384
_MAX_ITEMS: Final = 128  # a document with 32 PCRs and 7 certificates has 91
_MAX_TIMESTAMP: Final = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class NitroDocument:
    """One attestation document.

    Attributes:
        module_id: Of the enclave, 1 to 255 characters: its instance and a number.
        timestamp: When the document was made, milliseconds since 1970.
        pcrs: Platform configuration registers by index, 1 to 32 of 32, 48 or 64 B, in the document's order.
        certificate: DER, at most 1 KiB; its key signed the document.
        cabundle: The certificates above it, root first; 1 to 7 of at most 1 KiB.
        public_key: None, or 1 to 1024 B that the enclave chose.
        user_data: None, or at most 512 B that the enclave chose.
        nonce: None, or at most 512 B that the enclave chose.
        signature: 96 B over `signed_bytes`.
        fields: Names of the payload's fields, in its order; a field that is None may be left out.
        tagged: Whether CBOR tag 18 precedes the document.
    """

    module_id: str
    timestamp: int
    pcrs: Mapping[int, bytes]
    certificate: bytes
    cabundle: tuple[bytes, ...]
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None
    signature: bytes
    fields: tuple[str, ...] = FIELDS
    tagged: bool = False

    def __post_init__(self) -> None:
        _require_fields(self.fields)
        named = type(self.module_id) is str and self.module_id.isascii() and self.module_id.isprintable()
        if not named or not 1 <= len(self.module_id) <= MAX_MODULE_ID:
            raise _wrong("module_id", f"1 to {MAX_MODULE_ID} printable characters", self.module_id)
        if type(self.timestamp) is not int or not 0 < self.timestamp < _MAX_TIMESTAMP:
            raise _wrong("timestamp", "milliseconds, 1 to 2^64 - 1", self.timestamp)
        _require_pcrs(self.pcrs)
        _require_bytes("certificate", self.certificate, 1, MAX_CERTIFICATE)
        if type(self.cabundle) is not tuple or not 1 <= len(self.cabundle) <= MAX_CABUNDLE:
            raise _wrong("cabundle", f"1 to {MAX_CABUNDLE} certificates", self.cabundle)
        for der in self.cabundle:
            _require_bytes("cabundle", der, 1, MAX_CERTIFICATE)
        for name, least, most in _OPTIONAL_SIZES:
            value = getattr(self, name)
            if value is None:
                continue
            _require_bytes(name, value, least, most)
            if name not in self.fields:
                raise _wrong(name, "None, as it is left out", value)
        _require_bytes("signature", self.signature, SIGNATURE_SIZE, SIGNATURE_SIZE)

    @property
    def payload(self) -> bytes:
        """The map, encoded."""
        values = {
            "module_id": self.module_id,
            "digest": DIGEST,
            "timestamp": self.timestamp,
            "pcrs": dict(self.pcrs),
            "certificate": self.certificate,
            "cabundle": self.cabundle,
            "public_key": self.public_key,
            "user_data": self.user_data,
            "nonce": self.nonce,
        }
        return encoding.encode({name: values[name] for name in self.fields}, foreign=True)

    @property
    def signed_bytes(self) -> bytes:
        """What the certificate's key signed: COSE's Sig_structure."""
        return encoding.encode(["Signature1", _PROTECTED, b"", self.payload])

    @property
    def debug(self) -> bool:
        """Whether the enclave's console is open: PCR0 to PCR2 are zero, or missing."""
        return not any(any(self.pcrs.get(index, b"")) for index in range(3))

    @classmethod
    def from_bytes(cls, data: bytes) -> NitroDocument:
        """Parse a document that fills ``data``; ``to_bytes`` gives ``data`` back.

        Raises:
            EvidenceError: any other bytes.
        """
        raw = bytes(data)
        tagged = raw.startswith(_TAG)
        outer = _decode(raw[len(_TAG) :] if tagged else raw, "the Nitro document")
        if type(outer) is not list or len(outer) != 4:
            raise _wrong("COSE_Sign1", "an array of 4", outer)
        protected, unprotected, payload, signature = outer
        _require("protected header", protected, _PROTECTED)
        _require("unprotected header", unprotected, {})
        _require_bytes("payload", payload, 1, MAX_DOCUMENT)
        content = _decode(payload, "the payload of the Nitro document")
        if type(content) is not dict:
            raise _wrong("payload", "a map", content)
        fields = tuple(content)
        _require_fields(fields)
        _require("digest", content["digest"], DIGEST)
        pcrs, cabundle = content["pcrs"], content["cabundle"]
        return cls(
            module_id=content["module_id"],
            timestamp=content["timestamp"],
            pcrs=MappingProxyType(pcrs) if type(pcrs) is dict else pcrs,
            certificate=content["certificate"],
            cabundle=tuple(cabundle) if type(cabundle) is list else cabundle,
            public_key=content.get("public_key"),
            user_data=content.get("user_data"),
            nonce=content.get("nonce"),
            signature=signature,
            fields=fields,
            tagged=tagged,
        )

    def to_bytes(self) -> bytes:
        """The bytes that `from_bytes` reads."""
        document = encoding.encode([_PROTECTED, {}, self.payload, self.signature])
        return _TAG + document if self.tagged else document


_OPTIONAL_SIZES: Final = (
    ("public_key", 1, MAX_PUBLIC_KEY),
    ("user_data", 0, MAX_USER_DATA),
    ("nonce", 0, MAX_NONCE),
)


def _decode(data: bytes, what: str) -> Any:
    try:
        return encoding.decode(data, what=what, limit=MAX_DOCUMENT, items=_MAX_ITEMS, foreign=True)
    except FormatError as error:
        raise EvidenceError(
            error.message, claim=error.claim, expected=error.expected, actual=error.actual
        ) from error


def _require_fields(fields: tuple[Any, ...]) -> None:
    names = set(fields)
    if not names.issuperset(REQUIRED) or not names.issubset(FIELDS) or len(names) != len(fields):
        differing = sorted(map(repr, names.symmetric_difference(FIELDS)))[:20]
        raise EvidenceError(
            "the Nitro document has other fields",
            claim="fields",
            expected=f"{', '.join(REQUIRED)} and at most {', '.join(OPTIONAL)}",
            actual=f"differs in {', '.join(differing)[:200]}",
        )


def _require_pcrs(pcrs: Any) -> None:
    if not isinstance(pcrs, Mapping) or not 1 <= len(pcrs) <= PCR_COUNT:
        raise _wrong("pcrs", f"1 to {PCR_COUNT} registers", pcrs)
    for index, value in pcrs.items():
        if type(index) is not int or not 0 <= index < PCR_COUNT:
            raise _wrong("pcrs", f"indices 0 to {PCR_COUNT - 1}", index)
        if type(value) is not bytes or len(value) not in PCR_SIZES:
            raise _wrong(f"pcr{index}", f"one of {PCR_SIZES} B", value)


def _require(claim: str, actual: object, expected: object) -> None:
    if type(actual) is not type(expected) or actual != expected:
        raise EvidenceError(f"unsupported {claim}", claim=claim, expected=expected, actual=repr(actual)[:80])


def _require_bytes(claim: str, value: Any, least: int, most: int) -> None:
    if type(value) is not bytes or not least <= len(value) <= most:
        raise _wrong(claim, f"{least} to {most} B", value)


def _wrong(claim: str, expected: str, value: Any) -> EvidenceError:
    size = f" of {len(value)}" if isinstance(value, bytes | str | list | tuple | dict) else ""
    actual = repr(value) if type(value) is int else type(value).__name__ + size
    return EvidenceError(
        f"{claim} of the Nitro document is not what it must be", claim=claim, expected=expected, actual=actual
    )
