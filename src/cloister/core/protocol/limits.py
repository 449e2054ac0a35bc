"""Bounds that no operator's configuration can lift. Seconds, bytes, counts."""

from __future__ import annotations

from typing import Final

MAX_DOCUMENT_LIFETIME: Final = 24 * 3600  # seconds a service document may be valid
MAX_EPOCH: Final = 24 * 3600  # seconds pool keys may live
MAX_LEASE: Final = 3600  # seconds a worker may serve without the key service
MAX_LEASE_REQUESTS: Final = 10_000_000
MAX_REQUEST_LIFETIME: Final = 600  # seconds between signing a request and its expiry
CLOCK_SKEW: Final = 120  # seconds a signer's clock may be ahead of the verifier's

MAX_POOLS: Final = 256  # in one key service
MAX_MODELS: Final = 4096  # in one pool
MAX_GRANTS: Final = 10_000  # in one statement
MAX_NAME: Final = 128  # characters of a model's or a pool's name
MAX_POLICY_ITEMS: Final = 4096  # CBOR items of an appraisal policy and what stands beside it
MAX_REQUEST_ITEMS: Final = 256  # CBOR items of a release request
MAX_INNER_REQUEST: Final = 64 << 20  # bytes of an encapsulated request
MAX_SEALED_MODEL: Final = 64 << 30  # bytes
