"""Key configurations (RFC 9458, section 3): which public key a service has, and which suites it speaks.

`WIRE_SUITES` decides what may travel. It is no setting: a configuration without one of them is refused,
whoever sent it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cloister.core.ohttp.hpke import WIRE_SUITES, PrivateKey, Suite
from cloister.core.ohttp.kem import KEMS
from cloister.core.ohttp.reader import Bytes, Reader, octets
from cloister.errors import FormatError, Refused

MEDIA_TYPE_KEYS: Final = "application/ohttp-keys"

MAX_LIST: Final = 1 << 16  # bytes; the longest list of configurations
MAX_SYMMETRIC: Final = 64  # pairs of KDF and AEAD in one configuration

_CODE: Final = "ohttp.keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyConfiguration:
    """One public key and the symmetric algorithms that go with it.

    Attributes:
        key_id: Names the key within its service, 0..255.
        kem_id: The key's KEM.
        public_key: The serialised public key, of the KEM's length.
        symmetric: Pairs ``(kdf_id, aead_id)``, at least one; some may be none that Cloister speaks.

    Raises:
        FormatError: a value out of its range, or an unknown KEM (code ``ohttp.keys``).
    """

    key_id: int
    kem_id: int
    public_key: bytes
    symmetric: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        _require_range(self.key_id, 0xFF, claim="key id")
        kem = KEMS.get(self.kem_id)
        if kem is None:
            raise _refusal("KEM", expected="a KEM that Cloister speaks", actual=self.kem_id)
        if len(self.public_key) != kem.n_pk:
            raise _refusal("public key", expected=f"{kem.n_pk} B", actual=f"{len(self.public_key)} B")
        if not 1 <= len(self.symmetric) <= MAX_SYMMETRIC:
            raise _refusal("symmetric algorithms", expected=f"1..{MAX_SYMMETRIC}", actual=len(self.symmetric))
        for kdf_id, aead_id in self.symmetric:
            _require_range(kdf_id, 0xFFFF, claim="KDF")
            _require_range(aead_id, 0xFFFF, claim="AEAD")

    @classmethod
    def for_key(cls, key_id: int, key: PrivateKey) -> KeyConfiguration:
        """The configuration to publish for ``key``: every wire suite of its KEM."""
        symmetric = tuple((s.kdf_id, s.aead_id) for s in WIRE_SUITES if s.kem_id == key.kem_id)
        return cls(key_id=key_id, kem_id=key.kem_id, public_key=key.public_bytes, symmetric=symmetric)

    @classmethod
    def from_bytes(cls, data: Bytes) -> KeyConfiguration:
        """Read one configuration that fills ``data``.

        Raises:
            FormatError: truncated, too long, an unknown KEM, or no symmetric algorithm (code ``ohttp.keys``).
        """
        reader = Reader(data, code=_CODE)
        key_id = reader.integer(1, "key id")
        kem_id = reader.integer(2, "KEM")
        kem = KEMS.get(kem_id)
        if kem is None:
            raise _refusal("KEM", expected="a KEM that Cloister speaks", actual=kem_id)
        public_key = bytes(reader.take(kem.n_pk, "public key"))
        length = reader.integer(2, "symmetric algorithms")
        if length % 4 or not 4 <= length <= 4 * MAX_SYMMETRIC:
            expected = f"a multiple of 4 in 4..{4 * MAX_SYMMETRIC} B"
            raise _refusal("symmetric algorithms", expected=expected, actual=f"{length} B")
        pairs = Reader(reader.take(length, "symmetric algorithms"), code=_CODE)
        reader.require_end("key configuration")
        symmetric = tuple((pairs.integer(2, "KDF"), pairs.integer(2, "AEAD")) for _ in range(length // 4))
        return cls(key_id=key_id, kem_id=kem_id, public_key=public_key, symmetric=symmetric)

    def to_bytes(self) -> bytes:
        """The configuration as it stands in a list, without the length before it."""
        pairs = b"".join(kdf.to_bytes(2, "big") + aead.to_bytes(2, "big") for kdf, aead in self.symmetric)
        head = self.key_id.to_bytes(1, "big") + self.kem_id.to_bytes(2, "big")
        return head + self.public_key + len(pairs).to_bytes(2, "big") + pairs

    def offers(self, suite: Suite) -> bool:
        """Whether the holder of the key speaks ``suite``."""
        return suite.kem_id == self.kem_id and (suite.kdf_id, suite.aead_id) in self.symmetric

    def preferred_suite(self) -> Suite:
        """The best wire suite that this configuration offers.

        Raises:
            Refused: it offers none (code ``ohttp.suite``).
        """
        return select([self])[1]


def select(configurations: Iterable[KeyConfiguration]) -> tuple[KeyConfiguration, Suite]:
    """The configuration and suite that stand first on the wire list.

    Among configurations for the same suite the first one wins.

    Raises:
        Refused: none of them offers a wire suite (code ``ohttp.suite``).
    """
    candidates = tuple(configurations)
    for suite in WIRE_SUITES:
        for configuration in candidates:
            if configuration.offers(suite):
                return configuration, suite
    raise Refused(
        "no key configuration offers a suite that may travel",
        code="ohttp.suite",
        claim="suites",
        expected=" or ".join(map(str, WIRE_SUITES)),
        actual=", ".join(f"{c.kem_id:#06x}/{k:#06x}/{a:#06x}" for c in candidates for k, a in c.symmetric),
    )


def encode_list(configurations: Sequence[KeyConfiguration]) -> bytes:
    """The list as ``application/ohttp-keys``; servers put the one they prefer first.

    Raises:
        FormatError: longer than `MAX_LIST` (code ``ohttp.keys``).
    """
    items = [configuration.to_bytes() for configuration in configurations]
    data = b"".join(len(item).to_bytes(2, "big") + item for item in items)
    if len(data) > MAX_LIST:
        raise _refusal("key configurations", expected=f"at most {MAX_LIST} B", actual=f"{len(data)} B")
    return data


def decode_list(data: Bytes) -> tuple[KeyConfiguration, ...]:
    """Read ``application/ohttp-keys``, in its order.

    Configurations of KEMs that Cloister doesn't speak are left out (RFC 9458, section 3.2, expects that);
    everything else must be well-formed. The result may be empty.

    Raises:
        FormatError: too long, truncated, or a malformed configuration (code ``ohttp.keys``).
    """
    if octets(data).nbytes > MAX_LIST:
        raise _refusal(
            "key configurations", expected=f"at most {MAX_LIST} B", actual=f"{octets(data).nbytes} B"
        )
    reader = Reader(data, code=_CODE)
    configurations = []
    while reader.remaining:
        item = reader.take(reader.integer(2, "length"), "key configuration")
        if len(item) >= 3 and int.from_bytes(item[1:3], "big") not in KEMS:
            continue
        configurations.append(KeyConfiguration.from_bytes(item))
    return tuple(configurations)


def _require_range(value: int, maximum: int, *, claim: str) -> None:
    if not 0 <= value <= maximum:
        raise _refusal(claim, expected=f"0..{maximum}", actual=value)


def _refusal(claim: str, *, expected: object, actual: object) -> FormatError:
    return FormatError("not a key configuration", code=_CODE, claim=claim, expected=expected, actual=actual)
