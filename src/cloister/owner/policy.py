"""An owner's model policy: one TOML file that becomes part of a signed statement.

::

    [release]              # appraisal policy: the workers that may hold the model's key
    tee = "sgx"
    mr_enclave = ["..."]

    [key_service]          # appraisal policy: the key services that may hold it
    tee = "sgx"
    mr_enclave = ["..."]

    [options]              # optional
    slo_ms = 0
    batching = "none"
    isolation = "shared"
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cloister.core.protocol.statement import ServingOptions
from cloister.core.protocol.trust import load_table, subtable
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import UsageError

_OPTIONS: Final = frozenset({"slo_ms", "batching", "isolation"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPolicy:
    """Who may hold a model's key, and how it may be served."""

    release: AppraisalPolicy
    key_service: AppraisalPolicy
    options: ServingOptions = field(default_factory=ServingOptions)

    @classmethod
    def from_toml(cls, text: str) -> ModelPolicy:
        """Read a policy file; raises UsageError."""
        table = load_table(text, required=("release", "key_service"), optional=("options",))
        options = subtable(table, "options") if "options" in table else {}
        if options.keys() - _OPTIONS:
            raise UsageError(
                code="policy.options", claim="options", expected=sorted(_OPTIONS), actual=sorted(options)[:8]
            )
        serving = ServingOptions(**options)
        if serving.isolation != "shared" or serving.batching != "none":
            raise UsageError(
                'this version serves models with isolation = "shared" and batching = "none" only',
                code="policy.options",
                claim="options",
                expected="shared, none",
                actual=f"{serving.isolation}, {serving.batching}",
            )
        return cls(
            release=AppraisalPolicy.from_table(subtable(table, "release")),
            key_service=AppraisalPolicy.from_table(subtable(table, "key_service")),
            options=serving,
        )

    def to_toml(self) -> str:
        """The form that `from_toml` reads."""
        options = self.options
        return (
            f"{self.release.to_toml('release')}\n{self.key_service.to_toml('key_service')}\n[options]\n"
            f'slo_ms = {options.slo_ms}\nbatching = "{options.batching}"\nisolation = "{options.isolation}"\n'
        )
