"""A user's trust policy: a TOML file that says which service, which enclaves, and what is allowed.

::

    service = "<service id, 64 hex digits>"

    [key_service]          # appraisal policy for key services
    tee = "sgx"
    mr_enclave = ["..."]

    [worker]               # appraisal policy for the workers that may read requests
    tee = "sgx"
    mr_enclave = ["..."]

    [consent]              # all optional, all false by default
    allow_cross_user_batching = false
    allow_outside_stages = false
    allow_shared_pools = false
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from cloister.core.protocol.conversation import Trust
from cloister.core.protocol.document import PoolEntry
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.core.verifier.policy import load_toml
from cloister.errors import AccessRefused, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """What a user allows beyond the default, which is nothing."""

    allow_cross_user_batching: bool = False
    allow_outside_stages: bool = False
    allow_shared_pools: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UserPolicy:
    """What a user demands before a request leaves the machine.

    Attributes:
        service: The pinned service id (32 bytes).
        key_service: Reference values for key services.
        worker: Reference values for the workers that may ever read a request.
        consent: What is allowed beyond the default.
    """

    service: bytes
    key_service: AppraisalPolicy
    worker: AppraisalPolicy
    consent: Consent = field(default_factory=Consent)

    @property
    def trust(self) -> Trust:
        """The part that decides which service document is accepted."""
        return Trust(service=self.service, key_service=self.key_service)

    def require_pool(self, entry: PoolEntry) -> None:
        """Refuse a pool some of whose workers this policy would not accept.

        Raises:
            AppraisalRefused: the pool's release policy is not a subset, claim by claim, of ``worker``.
            AccessRefused: the pool is shared and the user doesn't consent.
        """
        self.worker.admits(entry.pool.policy)
        if entry.pool.shared and not self.consent.allow_shared_pools:
            raise AccessRefused(
                "the pool is shared by several owners, and the user's policy doesn't allow that",
                code="access.shared-pool",
                claim="shared pool",
                expected=False,
                actual=True,
            )

    @classmethod
    def from_toml(cls, text: str) -> UserPolicy:
        """Read a policy file; raises UsageError, whose claim says where: ``[worker].max_age``."""
        table = load_table(text, required=("service", "key_service", "worker"), optional=("consent",))
        return cls(
            service=hex_digest(table["service"], "service"),
            key_service=AppraisalPolicy.from_table(subtable(table, "key_service"), "key_service"),
            worker=AppraisalPolicy.from_table(subtable(table, "worker"), "worker"),
            consent=_consent(subtable(table, "consent") if "consent" in table else {}),
        )

    def to_toml(self) -> str:
        """The form that `from_toml` reads."""
        consent = "".join(
            f"{field.name} = {str(getattr(self.consent, field.name)).lower()}\n" for field in fields(Consent)
        )
        return (
            f'service = "{self.service.hex()}"\n\n{self.key_service.to_toml("key_service")}'
            f"\n{self.worker.to_toml('worker')}\n[consent]\n{consent}"
        )


def load_table(text: str, *, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Parse TOML with exactly these top-level keys; raises UsageError."""
    table = load_toml(text, "file")
    missing, unknown = set(required) - table.keys(), table.keys() - {*required, *optional}
    if missing or unknown:
        raise UsageError(
            "the file lacks a key, or has one that isn't known",
            code="policy.keys",
            claim="keys",
            expected=", ".join((*required, *optional)),
            actual=f"missing {sorted(missing)}, unknown {sorted(unknown)}"[:300],
        )
    return table


def subtable(table: dict[str, Any], name: str) -> dict[str, Any]:
    """A table inside a table; raises UsageError."""
    value = table[name]
    if not isinstance(value, dict):
        raise UsageError(
            code="policy.format", claim=f"[{name}]", expected="a table", actual=type(value).__name__
        )
    return value


def hex_digest(value: Any, name: str) -> bytes:
    """32 bytes from 64 hex digits; raises UsageError."""
    try:
        raw = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise UsageError(code=f"policy.{name}", claim=name, expected="64 hex digits", actual=str(value)[:80])
    return raw


def _consent(table: dict[str, Any]) -> Consent:
    known = {field.name for field in fields(Consent)}
    for name, value in table.items():
        if name not in known or type(value) is not bool:
            raise UsageError(
                "the consent of the user policy is invalid",
                code="policy.consent",
                claim=f"[consent].{name[:64]}",
                expected="true or false" if name in known else ", ".join(sorted(known)),
                actual=repr(value if name in known else name)[:80],
            )
    return Consent(**table)
