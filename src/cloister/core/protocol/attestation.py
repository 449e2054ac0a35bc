"""Attestation: evidence together with what its REPORTDATA binds (DESIGN, section 3).

Verification, numbered as the body cites it:

1. the purpose, role, service, pool and kind of freshness are the ones the verifier demands;
2. the configuration text hashes to the attested digest, and names the anchor that the policy names;
3. the evidence verifies under the policy's trust anchors;
4. the policy admits what the evidence says;
5. REPORTDATA is the digest of all of the above and of the keys;
6. the collateral is not older than any that the verifier has seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, cast

from cloister.core.encoding import digest, encode, unpack
from cloister.core.evidence.bundle import Evidence
from cloister.core.identity import CONTEXT
from cloister.core.protocol.configuration import EnclaveConfiguration, Role, require_anchor
from cloister.core.verifier import verify
from cloister.core.verifier.appraisal import AppraisalPolicy, appraise
from cloister.core.verifier.result import CollateralMemory, Step, VerifiedEvidence
from cloister.errors import BindingRefused, FormatError

Purpose = Literal["service-document", "release"]
FreshnessKind = Literal["challenge", "epoch"]
MAX_KEYS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What REPORTDATA commits to.

    Attributes:
        purpose: The one message the evidence serves.
        role: What the enclave says it is.
        service: Service id (32 bytes).
        pool: Pool id (32 bytes) or None.
        keys: (algorithm, public key) pairs, in the order in which the message lists them.
        freshness: The kind, and the challenge or epoch itself.
        configuration: Digest of the configuration text (32 bytes).
    """

    purpose: Purpose
    role: Role
    service: bytes
    pool: bytes | None
    keys: tuple[tuple[str, bytes], ...]
    freshness: tuple[FreshnessKind, bytes]
    configuration: bytes

    @property
    def report_data(self) -> bytes:
        """The 64 bytes that go into the evidence."""
        value = [
            CONTEXT,
            self.purpose,
            self.role,
            self.service,
            self.pool,
            [list(key) for key in self.keys],
            list(self.freshness),
            self.configuration,
        ]
        return hashlib.sha512(encode(value)).digest()

    def key(self, algorithm: str) -> bytes:
        """The bound public key of one algorithm; raises FormatError where there isn't exactly one."""
        found = [public for name, public in self.keys if name == algorithm]
        if len(found) != 1:
            raise FormatError(claim=f"attested {algorithm} keys", expected=1, actual=len(found))
        return found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attestation:
    """Evidence, its configuration text and its binding, as one message."""

    evidence: Evidence
    configuration: bytes
    binding: Binding

    @property
    def digest(self) -> bytes:
        """Digest of the whole message (32 bytes)."""
        return digest(self.to_data())

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`. The binding's digest is recomputed by the reader."""
        return {
            "configuration": self.configuration,
            "evidence": self.evidence.to_data(),
            "freshness": list(self.binding.freshness),
            "keys": [list(key) for key in self.binding.keys],
            "pool": self.binding.pool,
            "purpose": self.binding.purpose,
            "role": self.binding.role,
            "service": self.binding.service,
        }

    @classmethod
    def from_data(cls, data: Any) -> Attestation:
        """Read what `to_data` gave; raises FormatError."""
        fields = unpack(
            data,
            "attestation",
            configuration=bytes,
            evidence=dict,
            freshness=list,
            keys=list,
            pool=(bytes, type(None)),
            purpose=str,
            role=str,
            service=32,
        )
        pairs = [fields["freshness"], *fields["keys"]]
        if len(pairs) > MAX_KEYS + 1 or not all(_is_pair(pair) for pair in pairs):
            raise FormatError(
                "the attestation's keys or freshness are not pairs of a name and bytes", claim="keys"
            )
        return cls(
            evidence=Evidence.from_data(fields["evidence"]),
            configuration=fields["configuration"],
            binding=Binding(
                purpose=cast(Purpose, fields["purpose"]),
                role=cast(Role, fields["role"]),
                service=fields["service"],
                pool=fields["pool"],
                keys=tuple((pair[0], pair[1]) for pair in fields["keys"]),
                freshness=cast(tuple[FreshnessKind, bytes], tuple(fields["freshness"])),
                configuration=hashlib.sha256(fields["configuration"]).digest(),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attested:
    """An attestation that verified: what the evidence says, the configuration, and every step taken.

    ``not_after`` (Unix seconds) is when it has to be verified anew: something expires, or gets too old for
    the policy.
    """

    evidence: VerifiedEvidence
    configuration: EnclaveConfiguration
    binding: Binding
    steps: tuple[Step, ...]
    not_after: int


def verify_attestation(
    attestation: Attestation,
    *,
    policy: AppraisalPolicy,
    now: int,
    purpose: Purpose,
    role: Role,
    service: bytes,
    pool: bytes | None,
    freshness: tuple[FreshnessKind, bytes],
    seen: CollateralMemory | None = None,
) -> Attested:
    """Verify an attestation for one purpose.

    Args:
        attestation: The message.
        policy: The relying party's own appraisal policy; its trust anchors are the only ones used.
        now: Unix time, seconds.
        purpose: The purpose demanded.
        role: The role demanded.
        service: The service id demanded.
        pool: The pool id demanded, or None.
        freshness: The kind and the value demanded.
        seen: Collateral that the relying party remembers; updated once all else holds.

    Raises:
        BindingRefused: step 1 or 5.
        AppraisalRefused: step 2 or 4.
        EvidenceRefused: step 3 or 6.
    """
    binding = attestation.binding
    _require("purpose", purpose, binding.purpose)  # step 1
    _require("role", role, binding.role)
    _require("service", service, binding.service)
    _require("pool", pool, binding.pool)
    _require(f"freshness ({freshness[0]})", freshness, binding.freshness)
    configuration = EnclaveConfiguration.from_bytes(attestation.configuration)  # step 2
    _require("configuration role", role, configuration.role)
    require_anchor(configuration, policy)
    verified = verify(attestation.evidence, anchors=policy.anchors, now=now)  # step 3
    appraised = appraise(verified, policy, now=now)  # step 4
    verified.require_report_data(binding.report_data)  # step 5
    if seen is not None:  # step 6
        seen.admit(verified.collateral)
    return Attested(
        evidence=verified,
        configuration=configuration,
        binding=binding,
        not_after=appraised.not_after,
        steps=(
            *verified.steps,
            *appraised.steps,
            Step(
                name="configuration",
                outcome="ok",
                detail=_described(configuration),
            ),
            Step(
                name="binding",
                outcome="ok",
                detail=f"REPORTDATA binds {purpose}, {role}, {len(binding.keys)} keys",
            ),
        ),
    )


def _described(configuration: EnclaveConfiguration) -> str:
    """What a person wants to know of an attested configuration."""
    anchor = "simulated" if configuration.simulated else "vendors'"
    settings = configuration.settings
    lease, epoch = settings["lease_seconds"], settings["epoch_seconds"]
    return f"attested; {anchor} anchor, as in the policy; leases of {lease} s, epochs of {epoch} s"


def _require(claim: str, expected: object, actual: object) -> None:
    if expected != actual:
        code = "binding." + claim.split(" ", maxsplit=1)[0]
        raise BindingRefused(code=code, claim=claim, expected=_text(expected), actual=_text(actual))


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return " ".join(_text(item) for item in value)
    return "none" if value is None else str(value)


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is str and type(pair[1]) is bytes
