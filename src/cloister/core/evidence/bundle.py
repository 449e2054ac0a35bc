"""Evidence as it travels: what a TEE signed, and the collateral to verify it with, stapled by the sender."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, Final, TypeAlias

from cloister.errors import EvidenceError

TEES: Final = frozenset({"sgx", "tdx", "snp", "nitro"})
MAX_EVIDENCE: Final = 16 << 10  # bytes; a Nitro document has at most 16 KiB, a quote about 5
MAX_COLLATERAL_PART: Final = 512 << 10  # bytes; Intel's largest CRLs stay below 400 KiB
MAX_COLLATERAL_JSON: Final = 4 << 20  # characters

_HEX_PARTS: Final = frozenset({"root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Collateral:
    """What Intel's provisioning service says about one platform family, each part as its issuer signed it.

    Attributes:
        pck_crl_issuer_chain: PEM: PCK CA, root.
        root_ca_crl: DER, covers the CAs.
        pck_crl: DER, covers PCK certificates.
        tcb_info_issuer_chain: PEM: TCB signing certificate, root.
        tcb_info: The exact JSON text that was signed, UTF-8.
        tcb_info_signature: 64 B raw r || s.
        qe_identity_issuer_chain: PEM: TCB signing certificate, root.
        qe_identity: The exact JSON text that was signed, UTF-8.
        qe_identity_signature: 64 B raw r || s.
    """

    pck_crl_issuer_chain: bytes
    root_ca_crl: bytes
    pck_crl: bytes
    tcb_info_issuer_chain: bytes
    tcb_info: bytes
    tcb_info_signature: bytes
    qe_identity_issuer_chain: bytes
    qe_identity: bytes
    qe_identity_signature: bytes

    def __post_init__(self) -> None:
        for name in _PARTS:
            part = getattr(self, name)
            if type(part) is not bytes or not 0 < len(part) <= MAX_COLLATERAL_PART:
                raise EvidenceError(
                    "collateral part is missing, empty or too long",
                    claim=name,
                    expected=f"1 to {MAX_COLLATERAL_PART} B",
                    actual=f"{len(part)} B" if type(part) is bytes else type(part).__name__,
                )
        for name in ("tcb_info_signature", "qe_identity_signature"):
            if len(getattr(self, name)) != 64:
                raise EvidenceError(
                    "a signature has a wrong length",
                    claim=name,
                    expected="64 B",
                    actual=len(getattr(self, name)),
                )

    def to_data(self) -> dict[str, bytes]:
        """Plain data for `cloister.core.encoding`."""
        return {name: getattr(self, name) for name in _PARTS}

    @classmethod
    def from_data(cls, data: Any) -> Collateral:
        """Read what `to_data` gave.

        Raises:
            EvidenceError: a part is missing, unknown, of another type or too long.
        """
        return cls(**_exact_keys(data, _PARTS, "collateral"))

    @classmethod
    def from_json(cls, text: str) -> Collateral:
        """Read the JSON form that ``dcap-qvl`` and its caching services use (CRLs and signatures in hex).

        Raises:
            EvidenceError: not that form, or above the limits.
        """
        if len(text) > MAX_COLLATERAL_JSON:
            raise EvidenceError(
                "collateral is too long", expected=f"at most {MAX_COLLATERAL_JSON}", actual=len(text)
            )
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EvidenceError("collateral is not JSON") from error
        if isinstance(data, dict):
            # The caching services add the PCK chain there; ours is taken from the quote, which binds it.
            data = {name: value for name, value in data.items() if name != "pck_certificate_chain"}
        parts: dict[str, bytes] = {}
        for name, value in _exact_keys(data, _PARTS, "collateral").items():
            if type(value) is not str:
                raise EvidenceError("collateral part is not text", claim=name, actual=type(value).__name__)
            try:
                parts[name] = bytes.fromhex(value) if name in _HEX_PARTS else value.encode()
            except ValueError as error:
                raise EvidenceError("collateral part is not in its encoding", claim=name) from error
        return cls(**parts)

    def to_json(self) -> str:
        """The form that `from_json` reads.

        Raises:
            EvidenceError: a text part is not UTF-8.
        """
        try:
            return json.dumps(
                {
                    name: value.hex() if name in _HEX_PARTS else value.decode()
                    for name, value in self.to_data().items()
                }
            )
        except UnicodeDecodeError as error:
            raise EvidenceError("a text part of the collateral is not UTF-8") from error


_PARTS: Final = tuple(field.name for field in fields(Collateral))


@dataclass(frozen=True, slots=True, kw_only=True)
class AmdCollateral:
    """What AMD's key distribution service says about one processor.

    Attributes:
        certificates: PEM: VCEK or VLEK, ASK or ASVK, ARK.
        crl: DER revocation list of the ARK; empty where the sender has none.
    """

    certificates: bytes
    crl: bytes = b""

    def __post_init__(self) -> None:
        for name, least in (("certificates", 1), ("crl", 0)):
            part = getattr(self, name)
            if type(part) is not bytes or not least <= len(part) <= MAX_COLLATERAL_PART:
                raise EvidenceError(
                    "collateral part is missing, empty or too long",
                    claim=name,
                    expected=f"{least} to {MAX_COLLATERAL_PART} B",
                    actual=f"{len(part)} B" if type(part) is bytes else type(part).__name__,
                )

    def to_data(self) -> dict[str, bytes]:
        """Plain data for `cloister.core.encoding`."""
        return {"certificates": self.certificates, "crl": self.crl}

    @classmethod
    def from_data(cls, data: Any) -> AmdCollateral:
        """Read what `to_data` gave.

        Raises:
            EvidenceError: a part is missing, unknown, of another type or too long.
        """
        return cls(**_exact_keys(data, ("certificates", "crl"), "collateral"))


AnyCollateral: TypeAlias = Collateral | AmdCollateral | None
_COLLATERAL: Final[dict[str, type[Collateral] | type[AmdCollateral] | None]] = {
    "sgx": Collateral,
    "tdx": Collateral,
    "snp": AmdCollateral,
    "nitro": None,  # the document brings its certificates
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one kind of TEE signed, and the collateral to verify it with.

    Attributes:
        tee: ``"sgx"``, ``"tdx"``, ``"snp"`` or ``"nitro"``.
        quote: The quote, report or document as the TEE gave it, at most 16 KiB.
        collateral: Stapled by the sender; the verifier trusts none of it before it checked it. `Collateral`
            for SGX and TDX, `AmdCollateral` for SNP, None for Nitro.
    """

    tee: str
    quote: bytes
    collateral: AnyCollateral

    def __post_init__(self) -> None:
        if type(self.tee) is not str or self.tee not in TEES:
            raise EvidenceError(
                "evidence of an unknown kind of TEE",
                claim="tee",
                expected=sorted(TEES),
                actual=repr(self.tee)[:40],
            )
        if type(self.quote) is not bytes or not 0 < len(self.quote) <= MAX_EVIDENCE:
            raise EvidenceError(
                "quote is missing, empty or too long", claim="quote", expected=f"1 to {MAX_EVIDENCE} B"
            )
        kind = _COLLATERAL[self.tee] or type(None)
        if type(self.collateral) is not kind:
            raise EvidenceError(
                "evidence with another kind of collateral, or with none",
                claim="collateral",
                expected=kind.__name__,
                actual=type(self.collateral).__name__,
            )

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`."""
        collateral = None if self.collateral is None else self.collateral.to_data()
        return {"tee": self.tee, "quote": self.quote, "collateral": collateral}

    @classmethod
    def from_data(cls, data: Any) -> Evidence:
        """Read what `to_data` gave.

        Raises:
            EvidenceError: any other data.
        """
        values = _exact_keys(data, ("tee", "quote", "collateral"), "evidence")
        tee, collateral = values["tee"], values["collateral"]
        kind = _COLLATERAL.get(tee) if type(tee) is str else None
        if kind is not None:
            collateral = kind.from_data(collateral)
        return cls(tee=tee, quote=values["quote"], collateral=collateral)


def _exact_keys(data: Any, names: tuple[str, ...], what: str) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != set(names):
        found = sorted(map(repr, data))[:20] if isinstance(data, dict) else type(data).__name__
        raise EvidenceError(f"{what} has other fields", claim=what, expected=sorted(names), actual=found)
    return data
