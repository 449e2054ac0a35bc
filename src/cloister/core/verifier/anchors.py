"""Trust anchors: either the vendors' roots or one simulated root, never both, and never changed."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NoReturn

from cryptography.exceptions import InvalidSignature

from cloister.core import encoding
from cloister.core.verifier.chain import Certificate, load_certificate
from cloister.core.verifier.roots import intel
from cloister.errors import EvidenceError, UsageError

SIMULATED_MARK: Final = "Simulated"  # stands in the common name of every simulated root


class TrustAnchors:
    """What a verifier believes without proof: made by `vendor` or by `simulated`, compared by digest.

    Attributes:
        is_simulated: Whether the root belongs to a simulated platform, which protects nothing.
        digest: 32 B, SHA-256 of the deterministic CBOR of the kind and the roots' fingerprints.
        dcap_root: DER form of the root of SGX quotes.
    """

    __slots__ = ("dcap_root", "digest", "is_simulated")

    dcap_root: bytes
    digest: bytes
    is_simulated: bool

    def __init__(self) -> None:
        """Refused: use `vendor` or `simulated`."""
        raise TypeError("trust anchors are made by TrustAnchors.vendor() or TrustAnchors.simulated(root_der)")

    @classmethod
    def vendor(cls) -> TrustAnchors:
        """The roots of the TEE vendors, embedded in this package."""
        return _VENDOR

    @classmethod
    def simulated(cls, root_der: bytes) -> TrustAnchors:
        """The root of one simulated platform, and nothing else.

        Raises:
            UsageError: not a self-signed CA on P-256 whose name says that it is simulated.
        """
        return _simulated(bytes(root_der))

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


def _make(kind: str, root: Certificate) -> TrustAnchors:
    anchors = object.__new__(TrustAnchors)
    object.__setattr__(anchors, "is_simulated", kind == "simulated")
    object.__setattr__(anchors, "dcap_root", root.der)
    object.__setattr__(
        anchors, "digest", encoding.digest(["cloister/v1/trust-anchors", kind, [root.fingerprint]])
    )
    return anchors


@lru_cache(maxsize=16)
def _simulated(root_der: bytes) -> TrustAnchors:
    try:
        root = load_certificate(root_der)
        root.parsed.verify_directly_issued_by(root.parsed)
    except (EvidenceError, InvalidSignature, ValueError, TypeError) as error:
        raise _no_simulated_root("a self-signed certificate on P-256", "none") from error
    if root.path_length < 1:
        raise _no_simulated_root("a CA over two more certificates", f"path length {root.path_length}")
    if not announces_simulation(root):
        raise _no_simulated_root(f"a name with {SIMULATED_MARK!r}", root.common_name)
    return _make("simulated", root)


def _no_simulated_root(expected: str, actual: str) -> UsageError:
    return UsageError(
        "this is not the root of a simulated platform",
        code="anchors.simulated-root",
        claim="simulated root",
        expected=expected,
        actual=actual,
    )


_VENDOR: Final = _make("vendor", load_certificate(intel.INTEL_SGX_ROOT))
