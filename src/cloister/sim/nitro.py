"""The simulated platform's own Nitro hypervisor: attestation documents in the genuine format, worth nothing.

The chain has the shape of AWS's: root, regional, zonal, instance, and for each document a leaf of 3 hours.
Every subject says "Cloister Simulated". AWS renews the intermediates within days; these last.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloister.core.evidence.nitro import SIGNATURE_SIZE, NitroDocument
from cloister.errors import UsageError
from cloister.sim.pki import Identity, key_usage, raw_sign, require_valid, restore

ROLES: Final = ("nitro-root", "nitro-regional", "nitro-zonal", "nitro-instance")  # each signs the next
LEAF_LIFETIME: Final = 3 * 3600 + 3  # seconds, as AWS's
PCR_SIZE: Final = 48  # bytes, SHA-384
PCR_COUNT: Final = 16  # registers in AWS's documents

_LIFETIME: Final = 10 * 366 * 86400  # seconds
_SLACK: Final = 3  # seconds that a leaf is older than its document, as AWS's
_MODULE: Final = "i-simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class NitroFlaws:
    """What to get wrong, so that each refusal can be shown end to end. The default is flawless.

    Attributes:
        age: Seconds to date document and leaf back.
        leaf_age: Seconds that the leaf is older than the document; the leaf is the younger one if negative.
        leaf_lifetime: Seconds that the leaf lives.
        leaf_signs: Whether the leaf's key is for signatures.
        leaf_is_ca: Whether the leaf is a CA.
        other_signer: Sign the document with another key than the leaf's.
        left_out: Roles whose certificates the chain lacks.
    """

    age: int = 0
    leaf_age: int = _SLACK
    leaf_lifetime: int = LEAF_LIFETIME
    leaf_signs: bool = True
    leaf_is_ca: bool = False
    other_signer: bool = False
    left_out: frozenset[str] = frozenset()


FLAWLESS: Final = NitroFlaws()

_Hypervisor: TypeAlias = Identity[ec.EllipticCurvePrivateKey]


class SimulatedNitro:
    """Root and intermediates of one simulated hypervisor: `create` them, or restore them `from_pem`."""

    def __init__(self, identities: dict[str, _Hypervisor]) -> None:
        self._identities = identities

    @classmethod
    def create(cls, *, now: int) -> SimulatedNitro:
        """Make a new one; its certificates are valid from the day before ``now`` (unix seconds)."""
        identities: dict[str, _Hypervisor] = {}
        issuer = None
        for below, role in zip(reversed(range(len(ROLES))), ROLES, strict=True):
            issuer = _issue(
                f"Cloister Simulated Nitro {role.removeprefix('nitro-')}",
                issuer=issuer,
                not_before=now - 86400,
                not_after=now - 86400 + _LIFETIME,
                path_length=below,
            )
            identities[role] = issuer
        return cls(identities)

    @classmethod
    def from_pem(cls, parts: Mapping[str, tuple[bytes, bytes]]) -> SimulatedNitro:
        """What `to_pem` was called on.

        Raises:
            UsageError: a part is missing or damaged, or a key isn't its certificate's.
        """
        try:
            return cls({role: restore(*parts[role]) for role in ROLES})
        except (KeyError, TypeError, ValueError):
            # No cause: a parser's message could quote a key.
            raise UsageError("the simulated Nitro hypervisor is damaged", code="sim.authority") from None

    def to_pem(self) -> dict[str, tuple[bytes, bytes]]:
        """Private key (PKCS 8) and certificate in PEM, for each of `ROLES`; `from_pem` restores from it."""
        return {role: identity.to_pem() for role, identity in self._identities.items()}

    @property
    def root_der(self) -> bytes:
        """The root in DER, an anchor of kind ``"nitro"``."""
        return self._identities["nitro-root"].der

    def document(
        self,
        *,
        report_data: bytes | None,
        pcrs: Mapping[int, bytes],
        now: int,
        nonce: bytes | None = None,
        public_key: bytes | None = None,
        debug: bool = False,
        flaws: NitroFlaws = FLAWLESS,
    ) -> bytes:
        """Make an attestation document with a fresh leaf.

        Args:
            report_data: At most 512 B, the document's user_data.
            pcrs: 48 B registers by index; those of the first 16 that are missing are zero.
            now: Unix seconds.
            nonce: At most 512 B.
            public_key: 1 to 1024 B.
            debug: Zero PCR0 to PCR2, as AWS does for an enclave with an open console.
            flaws: What to get wrong.

        Raises:
            UsageError: the platform's certificates have expired.
            EvidenceError: a value has another length.
        """
        issuer = self._identities["nitro-instance"]
        require_valid(issuer.certificate, now)
        made = now - flaws.age
        module_id = f"{_MODULE}-enc{secrets.token_hex(8)}"
        leaf = _issue(
            f"{module_id}.Cloister Simulated",
            issuer=issuer,
            not_before=made - flaws.leaf_age,
            not_after=made - flaws.leaf_age + flaws.leaf_lifetime,
            path_length=0 if flaws.leaf_is_ca else None,
            signs=flaws.leaf_signs,
        )
        registers = dict.fromkeys(range(PCR_COUNT), bytes(PCR_SIZE)) | dict(pcrs)
        if debug:
            registers |= dict.fromkeys(range(3), bytes(PCR_SIZE))
        document = NitroDocument(
            module_id=module_id,
            timestamp=made * 1000,
            pcrs=MappingProxyType(registers),
            certificate=leaf.der,
            cabundle=tuple(self._identities[role].der for role in ROLES if role not in flaws.left_out),
            public_key=public_key,
            user_data=report_data,
            nonce=nonce,
            signature=bytes(SIGNATURE_SIZE),
        )
        key = ec.generate_private_key(ec.SECP384R1()) if flaws.other_signer else leaf.key
        return replace(document, signature=raw_sign(key, document.signed_bytes)).to_bytes()


def _issue(
    common_name: str,
    *,
    issuer: _Hypervisor | None,
    not_before: int,
    not_after: int,
    path_length: int | None,
    signs: bool = True,
) -> _Hypervisor:
    """A new key with its certificate; ``path_length`` is None for an end entity, ``issuer`` for a root."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Cloister Simulated Platform"),
        ]
    )
    is_ca = path_length is not None
    uses = ("key_cert_sign",) if is_ca else ("content_commitment", *(("digital_signature",) if signs else ()))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(not_before, UTC))
        .not_valid_after(datetime.fromtimestamp(not_after, UTC))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=path_length), critical=True)
        .add_extension(key_usage(*uses), critical=True)
        .sign(issuer.key if issuer else key, hashes.SHA384())
    )
    return Identity(key=key, certificate=certificate)
