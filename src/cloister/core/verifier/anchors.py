"""Trust anchors: either the vendors' roots or one simulated platform's, never both, and never changed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Final, NoReturn

from cryptography.exceptions import InvalidSignature

from cloister.core import encoding
from cloister.core.verifier.certificates import AMD, DCAP, NITRO, Certificate, Profile, load_certificate
from cloister.core.verifier.roots import amd, aws, intel
from cloister.errors import EvidenceError, EvidenceRefused, UsageError

SIMULATED_MARK: Final = "Simulated"  # stands in the common name of every simulated root
MAX_ROOTS: Final = 8 << 10  # bytes
MAX_SIMULATED_ROOTS: Final = 3  # one of each kind
_PROFILES: Final[Mapping[str, Profile]] = MappingProxyType({"dcap": DCAP, "snp": AMD, "nitro": NITRO})


class TrustAnchors:
    """What a verifier believes without proof: made by `vendor` or by `simulated`, compared by digest.

    Attributes:
        is_simulated: Whether the roots belong to a simulated platform, which protects nothing.
        digest: 32 B, SHA-256 of the deterministic CBOR of the kind and the roots' fingerprints.
        roots: Root certificates by what they vouch for: ``"dcap"`` (SGX, TDX), ``"snp"``, ``"nitro"``.
    """

    __slots__ = ("digest", "is_simulated", "roots")

    roots: Mapping[str, tuple[Certificate, ...]]
    digest: bytes
    is_simulated: bool

    def __init__(self) -> None:
        """Refused: use `vendor` or `simulated`."""
        raise TypeError("trust anchors are made by TrustAnchors.vendor() or TrustAnchors.simulated(root_der)")

    @classmethod
    def vendor(cls) -> TrustAnchors:
        """The roots of the TEE vendors, embedded in this package."""
        return _vendor()

    @classmethod
    def simulated(cls, roots_der: bytes) -> TrustAnchors:
        """The roots of one simulated platform, and nothing else.

        Args:
            roots_der: One to three certificates in DER, one after the other, in the order of `roots`: each a
                self-signed CA that announces simulation, on P-256, with RSA, or on P-384.

        Raises:
            UsageError: anything else.
        """
        return _simulated(bytes(roots_der))

    def require_root(self, kind: str, root: Certificate) -> None:
        """Refuse a root that is not byte-equal to a pinned one of its kind; a simulated one is named as such.

        Raises:
            EvidenceRefused: code ``evidence.simulated`` or ``evidence.root``.
        """
        pinned = self.roots.get(kind, ())
        if any(root.der == known.der for known in pinned):
            return
        if announces_simulation(root) and not self.is_simulated:
            raise EvidenceRefused(
                "the evidence comes from a simulated platform",
                code="evidence.simulated",
                claim="simulated",
                expected=False,
                actual=True,
            )
        raise EvidenceRefused(
            code="evidence.root",
            claim="root certificate",
            expected="; ".join(map(described, pinned)) or f"none: no root vouches for {kind} here",
            actual=described(root),
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("trust anchors don't change")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("trust anchors don't change")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrustAnchors) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> NoReturn:
        raise TypeError("trust anchors are not pickled")

    def __repr__(self) -> str:
        return f"<TrustAnchors {'simulated' if self.is_simulated else 'vendor'} {self.digest.hex()[:16]}>"


def announces_simulation(root: Certificate) -> bool:
    """Whether a root's name says that it belongs to a simulated platform."""
    return SIMULATED_MARK.lower() in root.common_name.lower()


def described(certificate: Certificate) -> str:
    """Name and fingerprint."""
    return f"{certificate.common_name} sha256:{certificate.fingerprint.hex()}"


def split_certificates(der: bytes) -> list[bytes]:
    """Cut DER certificates that lie one after the other apart; raises EvidenceError."""
    found = []
    while der:
        size = 4 + int.from_bytes(der[2:4], "big")
        if der[:2] != b"\x30\x82" or size > len(der):
            raise EvidenceError("not certificates in DER, one after the other", claim="certificates")
        found.append(der[:size])
        der = der[size:]
    return found


def _make(simulated: bool, roots: Mapping[str, tuple[Certificate, ...]]) -> TrustAnchors:
    anchors = object.__new__(TrustAnchors)
    fingerprints = [root.fingerprint for kind in _PROFILES for root in roots.get(kind, ())]
    kind = "simulated" if simulated else "vendor"
    object.__setattr__(anchors, "is_simulated", simulated)
    object.__setattr__(anchors, "roots", MappingProxyType(dict(roots)))
    object.__setattr__(anchors, "digest", encoding.digest(["cloister/v1/trust-anchors", kind, fingerprints]))
    return anchors


@cache
def _vendor() -> TrustAnchors:
    return _make(
        False,
        {
            "dcap": (load_certificate(intel.INTEL_SGX_ROOT),),
            "snp": tuple(load_certificate(ark, AMD) for ark in (amd.MILAN_ARK, amd.GENOA_ARK, amd.TURIN_ARK)),
            "nitro": (load_certificate(aws.AWS_NITRO_ROOT, NITRO),),
        },
    )


@lru_cache(maxsize=16)
def _simulated(roots_der: bytes) -> TrustAnchors:
    if len(roots_der) > MAX_ROOTS:
        raise _no_simulated_root(f"at most {MAX_ROOTS} B", f"{len(roots_der)} B")
    roots: dict[str, tuple[Certificate, ...]] = {}
    try:
        for der in split_certificates(roots_der):
            kind, root = _self_signed(der)
            if any(known in roots for known in list(_PROFILES)[list(_PROFILES).index(kind) :]):
                raise _no_simulated_root(f"one root of each kind, in the order {', '.join(_PROFILES)}", kind)
            roots[kind] = (root,)
    except EvidenceError as error:
        raise _no_simulated_root("self-signed certificates in DER", "none") from error
    if not roots:
        raise _no_simulated_root("at least one root", "none")
    return _make(True, roots)


def _self_signed(der: bytes) -> tuple[str, Certificate]:
    """What a simulated root vouches for, by the kind of its key."""
    for kind, profile in _PROFILES.items():
        try:
            root = load_certificate(der, profile)
            root.parsed.verify_directly_issued_by(root.parsed)
        except (EvidenceError, InvalidSignature, ValueError, TypeError):
            continue
        if root.path_length < 1:
            raise _no_simulated_root("a CA over two more certificates", f"path length {root.path_length}")
        if not announces_simulation(root):
            raise _no_simulated_root(f"a name with {SIMULATED_MARK!r}", root.common_name)
        return kind, root
    raise _no_simulated_root("a self-signed certificate on P-256, with RSA, or on P-384", "none")


def _no_simulated_root(expected: str, actual: str) -> UsageError:
    return UsageError(
        "this is not the root of a simulated platform",
        code="anchors.simulated-root",
        claim="simulated roots",
        expected=expected,
        actual=actual,
    )
