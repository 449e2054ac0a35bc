"""Reading policy files for commands: an error names the file and the section, and what was meant."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, TypeVar

from cloister.cli.output import read_text
from cloister.core.protocol.trust import Consent, UserPolicy
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import CloisterError, UsageError
from cloister.owner.policy import OPTIONS, ModelPolicy

Policy = TypeVar("Policy", UserPolicy, ModelPolicy)
_APPRAISALS: Final = ("key_service", "worker", "release")
_TOP: Final = ("service", *_APPRAISALS, "consent", "options")
_HEX_DIGITS: Final = re.compile(r"(\d+) hex digits")
_OTHERS: Final = {"consent": tuple(field.name for field in fields(Consent)), "options": tuple(OPTIONS)}


def read_user_policy(path: Path, what: str = "user policy") -> UserPolicy:
    """A user policy from a file; raises UsageError, which names file and section."""
    return _read(path, what, UserPolicy.from_toml)


def read_model_policy(path: Path) -> ModelPolicy:
    """A model policy from a file; raises UsageError, which names file and section."""
    return _read(path, "model policy", ModelPolicy.from_toml)


def _read(path: Path, what: str, parse: Callable[[str], Policy]) -> Policy:
    text = read_text(path, what)
    try:
        return parse(text)
    except UsageError as error:
        _explain(error, text)
        named = error.claim if error.claim.startswith("[") else ""
        error.message = ": ".join(part for part in (str(path), named, error.message) if part)
        raise


def _explain(error: UsageError, text: str) -> None:
    """Add to an error of a policy file in which section it is, and which name may be meant."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError):
        return
    if error.code == "policy.keys":
        _suggest(error, table, _TOP)
        return
    for name in _APPRAISALS:
        if isinstance(table.get(name), dict) and _same(error, name, table[name]):
            if error.code == "policy.unknown-key":
                known = _known(table[name])
                error.expected = ", ".join(known)
                _suggest(error, {error.claim: None}, known)
            _speak_hex(error, table[name])
            error.claim = f"[{name}].{error.claim}" if error.claim else f"[{name}]"
            return
    for name, known in _OTHERS.items():
        if error.code == f"policy.{name}" and isinstance(table.get(name), dict):
            _suggest(error, table[name], known)


def _speak_hex(error: UsageError, table: dict[str, Any]) -> None:
    """A value of another length: show the digits of the file, where the error has the bytes."""
    digits = _HEX_DIGITS.search(error.expected)
    values = table.get(error.claim)
    for value in values if isinstance(values, list) else [values]:
        if digits and isinstance(value, str) and len(value) != int(digits[1]):
            error.expected = f"{digits[1]} hex digits"
            error.actual = f"{len(value)} characters: {value[:80]}"
            return


def _same(error: CloisterError, section: str, table: dict[str, Any]) -> bool:
    """Whether this section is the one that the error is about: it alone gives the same error."""
    try:
        AppraisalPolicy.from_table(table)
    except CloisterError as found:
        return (found.code, found.claim, found.actual) == (error.code, error.claim, error.actual)
    return False


def _known(table: dict[str, Any]) -> tuple[str, ...]:
    """Keys that an appraisal policy for this TEE may have."""
    from cloister.core.verifier.claims import CLAIMS

    of = CLAIMS.get(tee, ()) if type(tee := table.get("tee")) is str else ()
    claimed = {name for claim in of or CLAIMS["sgx"] for name in claim.fields}
    return (*sorted(claimed), "max_age", "dangerous_simulated_roots", "tee", "any_of", "all_of")


def _suggest(error: CloisterError, given: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in given:
        close = difflib.get_close_matches(name, known, n=1) if name not in known else []
        if close and not error.hint:
            error.hint = f"Did you mean {close[0]} instead of {name[:64]}?"
