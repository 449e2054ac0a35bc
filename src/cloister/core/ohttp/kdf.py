"""The key derivation functions of HPKE (RFC 9180, sections 4 and 7.2): HKDF, plain and labelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

HKDF_SHA256: Final = 0x0001
HKDF_SHA384: Final = 0x0002
HKDF_SHA512: Final = 0x0003

_VERSION_LABEL: Final = b"HPKE-v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kdf:
    """HKDF over one hash function."""

    algorithm: hashes.HashAlgorithm
    n_h: int  # bytes; the length of what `extract` returns

    def extract(self, salt: bytes, ikm: bytes) -> bytes:
        """A pseudorandom key (``n_h`` bytes) from input keying material."""
        return HKDF.extract(self.algorithm, salt, ikm)

    def expand(self, prk: bytes, info: bytes, length: int) -> bytes:
        """``length`` bytes, at most ``255 * n_h``, of key stream for ``info``."""
        return HKDFExpand(self.algorithm, length, info).derive(prk)

    def labeled_extract(self, suite_id: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
        """``LabeledExtract`` of RFC 9180, section 4."""
        return self.extract(salt, _VERSION_LABEL + suite_id + label + ikm)

    def labeled_expand(self, suite_id: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
        """``LabeledExpand`` of RFC 9180, section 4."""
        labeled_info = length.to_bytes(2, "big") + _VERSION_LABEL + suite_id + label + info
        return self.expand(prk, labeled_info, length)


KDFS: Final[Mapping[int, Kdf]] = MappingProxyType(
    {
        HKDF_SHA256: Kdf(algorithm=hashes.SHA256(), n_h=32),
        HKDF_SHA384: Kdf(algorithm=hashes.SHA384(), n_h=48),
        HKDF_SHA512: Kdf(algorithm=hashes.SHA512(), n_h=64),
    }
)
