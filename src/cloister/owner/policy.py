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
    batching = "none"       # or "same-user", "cross-user"
    isolation = "shared"    # or "strict"
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, get_args

from cloister.core.protocol.statement import Batching, Isolation, ServingOptions
from cloister.core.protocol.trust import load_table, subtable
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import UsageError

MAX_SLO_MS: Final = 3_600_000
OPTIONS: Final = ("slo_ms", "batching", "isolation")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPolicy:
    """Who may hold a model's key, and how it may be served."""

    release: AppraisalPolicy
    key_service: AppraisalPolicy
    options: ServingOptions = field(default_factory=ServingOptions)

    @classmethod
    def from_toml(cls, text: str) -> ModelPolicy:
        """Read a policy file; raises UsageError, whose claim says where: ``[release].max_age``."""
        table = load_table(text, required=("release", "key_service"), optional=("options",))
        serving = _options(subtable(table, "options") if "options" in table else {})
        return cls(
            release=AppraisalPolicy.from_table(subtable(table, "release"), "release"),
            key_service=AppraisalPolicy.from_table(subtable(table, "key_service"), "key_service"),
            options=serving,
        )

    def to_toml(self) -> str:
        """The form that `from_toml` reads."""
        options = self.options
        return (
            f"{self.release.to_toml('release')}\n{self.key_service.to_toml('key_service')}\n[options]\n"
            f'slo_ms = {options.slo_ms}\nbatching = "{options.batching}"\nisolation = "{options.isolation}"\n'
        )


def _options(table: dict[str, Any]) -> ServingOptions:
    """Options as the file states them; raises UsageError."""
    for name in table:
        if name not in OPTIONS:
            raise _invalid(name[:64], ", ".join(OPTIONS), name[:64])
    for name, served in (("batching", get_args(Batching)), ("isolation", get_args(Isolation))):
        if table.get(name, served[0]) not in served:
            raise _invalid(name, " or ".join(f'"{each}"' for each in served), table[name])
    if table.get("isolation") == "strict" and table.get("batching", "none") != "none":
        raise _invalid("batching", '"none" with isolation "strict"', table["batching"])
    slo = table.get("slo_ms", 0)
    if type(slo) is not int or not 0 <= slo <= MAX_SLO_MS:
        raise _invalid("slo_ms", f"a whole number of milliseconds, 0 to {MAX_SLO_MS}", slo)
    return ServingOptions(**table)


def _invalid(name: str, expected: str, actual: object) -> UsageError:
    return UsageError(
        "the options of the model policy are invalid",
        code="policy.options",
        claim=f"[options].{name}",
        expected=expected,
        actual=repr(actual)[:80],
    )
