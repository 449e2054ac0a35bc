"""The enclave configuration: everything that decides what an enclave trusts (DESIGN, section 3).

The host writes it, so it is worth nothing by itself: the enclave puts its digest into REPORTDATA, and a peer
refuses one that is absent, hashes differently or names a trust anchor that the peer's own policy doesn't.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from cloister.core.encoding import decode, encode, unpack
from cloister.core.protocol.limits import MAX_EPOCH, MAX_LEASE, MAX_LEASE_REQUESTS, MAX_POLICY_ITEMS
from cloister.core.protocol.pool import Pool
from cloister.core.verifier.anchors import TrustAnchors
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import AppraisalRefused, UsageError

Role = Literal["key-service", "worker"]
ROLES: Final[tuple[Role, ...]] = ("key-service", "worker")
MAX_CONFIGURATION: Final = 1 << 20  # bytes

# name: (default, smallest, largest). Seconds, counts, MiB.
SETTINGS: Final[dict[str, tuple[int, int, int]]] = {
    "document_seconds": (600, 5, 24 * 3600),
    "epoch_seconds": (3600, 10, MAX_EPOCH),
    "lease_requests": (1_000_000, 1, MAX_LEASE_REQUESTS),
    "lease_seconds": (30, 2, MAX_LEASE),
    "memory_mib": (2048, 16, 1 << 20),
    "queue": (1024, 1, 1 << 16),
    "threads": (2, 1, 256),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveConfiguration:
    """What an enclave was started with.

    Attributes:
        role: What the enclave is.
        anchor_roots: DER of the simulated root, or None for the vendors' roots.
        service: The service id a worker belongs to; None for a key service, which makes or restores its own.
        pool: The pool a worker joins; None for a key service.
        key_service: The policy under which a worker appraises its key service; None for a key service.
        settings: Numbers from `SETTINGS`; every one is present.
    """

    role: Role
    anchor_roots: bytes | None
    service: bytes | None = None
    pool: Pool | None = None
    key_service: AppraisalPolicy | None = None
    settings: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(claim="configuration role", expected=ROLES, actual=self.role)
        named = [part is not None for part in (self.service, self.pool, self.key_service)]
        if named != [self.role == "worker"] * 3:
            raise UsageError(
                "a worker, and only a worker, names its service, pool and key service", claim="configuration"
            )
        object.__setattr__(self, "settings", _complete(self.settings))

    @property
    def simulated(self) -> bool:
        """Whether it trusts a simulated root."""
        return self.anchor_roots is not None

    @property
    def anchors(self) -> TrustAnchors:
        """The trust anchors for the evidence of peers."""
        return (
            TrustAnchors.vendor() if self.anchor_roots is None else TrustAnchors.simulated(self.anchor_roots)
        )

    def to_bytes(self) -> bytes:
        """The text that travels with the evidence."""
        return encode(
            {
                "anchor_roots": self.anchor_roots,
                "key_service": self.key_service.to_data() if self.key_service else None,
                "pool": self.pool.to_data() if self.pool else None,
                "role": self.role,
                "service": self.service,
                "settings": self.settings,
            }
        )

    @property
    def digest(self) -> bytes:
        """SHA-256 of `to_bytes` (32 bytes)."""
        return hashlib.sha256(self.to_bytes()).digest()

    @classmethod
    def from_bytes(cls, raw: bytes) -> EnclaveConfiguration:
        """Read a configuration text.

        Raises:
            FormatError: the bytes are no configuration.
            UsageError: a field has a value it can't have.
        """
        data = unpack(
            decode(raw, what="enclave configuration", limit=MAX_CONFIGURATION, items=2 * MAX_POLICY_ITEMS),
            "configuration",
            anchor_roots=(bytes, type(None)),
            key_service=(dict, type(None)),
            pool=(dict, type(None)),
            role=str,
            service=(bytes, type(None)),
            settings=dict,
        )
        return cls(
            role=cast(Role, data["role"]),
            anchor_roots=data["anchor_roots"],
            service=data["service"],
            pool=None if data["pool"] is None else Pool.from_data(data["pool"]),
            key_service=None
            if data["key_service"] is None
            else AppraisalPolicy.from_data(data["key_service"]),
            settings=data["settings"],
        )


def require_anchor(configuration: EnclaveConfiguration, policy: AppraisalPolicy) -> None:
    """Refuse an enclave whose configuration names another trust anchor than the policy that appraises it.

    Raises:
        AppraisalRefused: the configuration is simulated and the policy isn't, or the anchors differ.
    """
    require_one_anchor(configuration)
    expected = policy.anchors
    if configuration.simulated != expected.is_simulated:
        raise AppraisalRefused(
            "the enclave was configured for another kind of trust anchor",
            code="appraisal.simulated",
            claim="simulated",
            expected=expected.is_simulated,
            actual=configuration.simulated,
            hint="Its host chose what it trusts; do not use this service under this policy",
        )
    if configuration.anchors.digest != expected.digest:
        raise AppraisalRefused(
            "the enclave was configured with a trust anchor that the policy doesn't name",
            code="appraisal.anchor",
            claim="trust anchor",
            expected=expected.digest.hex(),
            actual=configuration.anchors.digest.hex(),
        )


def require_one_anchor(configuration: EnclaveConfiguration) -> None:
    """Refuse a configuration whose policies trust another root than the one it declares.

    Raises:
        AppraisalRefused: its pool's or its key service's policy names another trust anchor.
    """
    pool, key_service = configuration.pool, configuration.key_service
    for policy in (pool.policy if pool else None, key_service):
        if policy is not None and policy.anchors.digest != configuration.anchors.digest:
            raise AppraisalRefused(
                "the enclave was configured with policies that trust another root than it declares",
                code="appraisal.anchor",
                claim="trust anchor",
                expected=configuration.anchors.digest.hex(),
                actual=policy.anchors.digest.hex(),
            )


def _complete(settings: dict[str, Any]) -> dict[str, int]:
    unknown = settings.keys() - SETTINGS.keys()
    if unknown:
        raise UsageError(
            "unknown setting",
            claim="settings",
            expected=sorted(SETTINGS),
            actual=sorted(map(str, unknown))[:8],
        )
    complete = {}
    for name, (default, smallest, largest) in SETTINGS.items():
        number = settings.get(name, default)
        if type(number) is not int or not smallest <= number <= largest:
            raise UsageError(
                claim=f"setting {name}", expected=f"a whole number, {smallest} to {largest}", actual=number
            )
        complete[name] = number
    return complete
