"""A pool: a set of interchangeable workers, named by the digest of what they must be.

The operator creates it; nobody can change it, since a change would be another pool (DESIGN, section 4).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from cloister.core.encoding import digest, unpack
from cloister.core.identity import CONTEXT
from cloister.core.protocol.limits import MAX_NAME
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import UsageError

NAME: Final = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{MAX_NAME - 1}}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What a pool's workers must be.

    Attributes:
        name: The operator's label; it tells two pools of the same policy apart.
        policy: The release policy: reference values of the workers that may hold the pool's keys.
        shared: Whether it may serve several owners, each in a child process of its own.
        key_scope: Whose the OHTTP keys are: ``pool``. (``worker`` is reserved for keys certified per worker.)
    """

    name: str
    policy: AppraisalPolicy
    shared: bool = False
    key_scope: str = "pool"

    def __post_init__(self) -> None:
        require_name(self.name, "pool name")
        if self.key_scope != "pool":
            raise UsageError(
                code="pool.key-scope", claim="key_scope", expected="pool", actual=self.key_scope[:32]
            )

    @property
    def id(self) -> bytes:
        """The pool id (32 bytes)."""
        return digest([CONTEXT, "pool", self.to_data()])

    def to_data(self) -> dict[str, Any]:
        """Plain data for `cloister.core.encoding`."""
        return {
            "key_scope": self.key_scope,
            "name": self.name,
            "policy": self.policy.to_data(),
            "shared": self.shared,
        }

    @classmethod
    def from_data(cls, data: Any) -> Pool:
        """Read what `to_data` gave; raises FormatError or UsageError."""
        fields = unpack(data, "pool", key_scope=str, name=str, policy=dict, shared=bool)
        return cls(
            key_scope=fields["key_scope"],
            name=fields["name"],
            policy=AppraisalPolicy.from_data(fields["policy"]),
            shared=fields["shared"],
        )


def require_name(name: str, what: str) -> None:
    """Refuse a name that is not lower-case letters, digits, dots, underscores and hyphens.

    Raises:
        UsageError: the name is empty, too long or has another character.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            claim=what,
            expected=f"1 to {MAX_NAME} of a-z 0-9 . _ -, starting with a letter or digit",
            actual=name[:160],
        )
