"""Reading policy files for commands: an error names the file and the place in it, and what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

from cloister.cli.output import read_text
from cloister.core.protocol.trust import UserPolicy
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.core.verifier.policy import load_toml
from cloister.errors import UsageError
from cloister.owner.policy import ModelPolicy

Policy = TypeVar("Policy")
_TOP: Final = ("service", "key_service", "worker", "release", "consent", "options")
_NAMES: Final = ("policy.unknown-key", "policy.consent", "policy.options")  # whose claim may be no key


def read_user_policy(path: Path, what: str = "user policy") -> UserPolicy:
    """A user policy from a file; raises UsageError, which names file and section."""
    return _read(path, what, UserPolicy.from_toml)


def read_model_policy(path: Path) -> ModelPolicy:
    """A model policy from a file; raises UsageError, which names file and section."""
    return _read(path, "model policy", ModelPolicy.from_toml)


def read_appraisal_policy(path: Path, what: str = "policy") -> AppraisalPolicy:
    """One appraisal policy, which is the whole file; raises UsageError, which names the file."""
    return _read(path, what, AppraisalPolicy.from_toml)


def read_policy(path: Path) -> UserPolicy | ModelPolicy:
    """A user policy or a model policy, whichever the file is; raises UsageError."""
    return _read(path, "policy", _either)


def _either(text: str) -> UserPolicy | ModelPolicy:
    is_user = "worker" in load_toml(text, "policy")
    return UserPolicy.from_toml(text) if is_user else ModelPolicy.from_toml(text)


def _read(path: Path, what: str, parse: Callable[[str], Policy]) -> Policy:
    text = read_text(path, what)
    try:
        return parse(text)
    except UsageError as error:
        if error.code != "policy.format":
            _explain(error, load_toml(text, what))
        place = error.claim if "[" in error.claim else ""
        error.message = ": ".join(part for part in (str(path), place, error.message) if part)
        raise


def _explain(error: UsageError, table: dict[str, Any]) -> None:
    """Add to an error of a policy file which name may be meant, and how long a value is in the file."""
    if error.code == "policy.keys":
        _suggest(error, table, _TOP)
    elif error.code in _NAMES:
        _suggest(error, [error.claim.rpartition(".")[2]], error.expected.split(", "))


def _suggest(error: UsageError, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        close = difflib.get_close_matches(name, known, n=1) if name not in known else []
        if close and not error.hint:
            error.hint = f"Did you mean {close[0]} instead of {name[:64]}?"
