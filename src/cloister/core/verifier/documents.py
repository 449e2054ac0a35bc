"""Strict reading of the JSON documents that Intel signs: fields by type, no duplicates, no floats."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from cloister.errors import EvidenceError

# What Intel's documents say of a platform's level, and of an enclave or a TDX module.
LEVEL_STATUSES: Final = frozenset(
    {
        "UpToDate",
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "OutOfDateConfigurationNeeded",
        "Revoked",
    }
)
MODULE_STATUSES: Final = frozenset({"UpToDate", "OutOfDate", "Revoked"})
# What verification can find: the last two say that an updated platform runs a TD that an older one launched.
STATUSES: Final = LEVEL_STATUSES | {"TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded"}
MAX_LEVELS: Final = 256
MAX_ADVISORIES: Final = 512

_TIME: Final = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", re.ASCII)
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})*", re.ASCII)
_ADVISORY: Final = re.compile(r"[A-Za-z0-9-]{1,64}", re.ASCII)
_KINDS: Final[dict[type, str]] = {str: "text", int: "an integer", list: "a list", dict: "an object"}


class Document:
    """One JSON object and the name it goes by in errors; every reader raises `EvidenceError`."""

    __slots__ = ("_fields", "_name")

    def __init__(self, fields: Any, name: str) -> None:
        if not isinstance(fields, Mapping):
            raise _wrong(name, "an object", fields)
        self._fields = fields
        self._name = name

    @classmethod
    def parse(cls, text: bytes, name: str) -> Document:
        """Parse UTF-8 JSON whose top level is an object."""
        try:
            value = json.loads(
                text.decode(), object_pairs_hook=_unique, parse_float=_refuse, parse_constant=_refuse
            )
        except (ValueError, RecursionError) as error:
            raise EvidenceError(
                f"{name} is not strict JSON", code="evidence.collateral", claim=name
            ) from error
        return cls(value, name)

    def has(self, field: str) -> bool:
        """Whether there is such a field."""
        return field in self._fields

    def text(self, field: str) -> str:
        """A string."""
        return str(self._typed(field, str))

    def integer(self, field: str, most: int) -> int:
        """An integer from 0 to ``most``."""
        value = self._typed(field, int)
        if not 0 <= value <= most:
            raise _wrong(f"{self._name}: {field}", f"0 to {most}", value)
        return int(value)

    def octets(self, field: str, size: int) -> bytes:
        """``size`` bytes in hex."""
        value = self.text(field)
        if len(value) != 2 * size or not _HEX.fullmatch(value):
            raise _wrong(f"{self._name}: {field}", f"{size} B in hex", value)
        return bytes.fromhex(value)

    def time(self, field: str) -> int:
        """A UTC time, as unix seconds."""
        value = self.text(field)
        try:
            if _TIME.fullmatch(value):
                return int(datetime.fromisoformat(value).timestamp())
        except ValueError:
            pass
        raise _wrong(f"{self._name}: {field}", "YYYY-MM-DDThh:mm:ssZ", value)

    def status(self, field: str, allowed: frozenset[str] = LEVEL_STATUSES) -> str:
        """A TCB status that Intel defines."""
        value = self.text(field)
        if value not in allowed:
            raise _wrong(f"{self._name}: {field}", "a TCB status", value)
        return value

    def advisories(self, field: str) -> tuple[str, ...]:
        """Advisory names; an absent field means none, as Intel's documents leave it out then."""
        if not self.has(field):
            return ()
        values = self._typed(field, list)
        if len(values) > MAX_ADVISORIES:
            raise _wrong(f"{self._name}: {field}", f"at most {MAX_ADVISORIES}", len(values))
        for value in values:
            if type(value) is not str or not _ADVISORY.fullmatch(value):
                raise _wrong(f"{self._name}: {field}", "advisory names", value)
        return tuple(values)

    def object(self, field: str) -> Document:
        """A nested object."""
        return Document(self._typed(field, dict), f"{self._name}: {field}")

    def objects(self, field: str, *, least: int, most: int) -> tuple[Document, ...]:
        """A list of ``least`` to ``most`` objects."""
        values = self._typed(field, list)
        if not least <= len(values) <= most:
            raise _wrong(f"{self._name}: {field}", f"{least} to {most} entries", len(values))
        name = f"{self._name}: {field}"
        return tuple(Document(value, name) for value in values)

    def _typed(self, field: str, kind: type) -> Any:
        value = self._fields.get(field)
        if type(value) is not kind:  # exact: a bool is no integer here
            raise _wrong(f"{self._name}: {field}", _KINDS[kind], value)
        return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _refuse(text: str) -> float:
    raise ValueError(f"{text[:40]} is no integer")


def _wrong(claim: str, expected: str, actual: Any) -> EvidenceError:
    return EvidenceError(
        f"{claim} is missing or malformed",
        code="evidence.collateral",
        claim=claim,
        expected=expected,
        actual=repr(actual)[:80],
    )
