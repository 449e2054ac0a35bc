"""Collateral from folders that ``cloister collateral fetch`` fills; `collateral_key` names their files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloister.core.evidence.dcap import Quote
from cloister.core.evidence.snp import PRODUCTS, VLEK, SnpReport
from cloister.errors import UsageError
from cloister.party.file_kinds import GivenFile, kind_of, read_file


@dataclass(frozen=True, slots=True, kw_only=True)
class CollateralFolders:
    """Where collateral is looked for that wasn't given as files.

    Attributes:
        paths: The folders; the first that has a file gives it.
        hint: How to come by what this evidence needs; empty where it needs nothing.
    """

    paths: tuple[Path, ...]
    hint: str

    @classmethod
    def of(cls, paths: Iterable[Path], parsed: object, name: str) -> CollateralFolders:
        """The folders for a quote, report or document that was read from the file ``name``."""
        paths = tuple(paths)
        hint = ""
        if isinstance(parsed, SnpReport):
            hint = _report_hint(paths, parsed, name)
        elif isinstance(parsed, Quote):
            hint = fetch_hint(paths, "--quote", name)
        return cls(paths=paths, hint=hint)

    def take(self, name: str, what: str, kind: str, hint: str = "") -> bytes:
        """Read a file.

        Args:
            name: Relative to the folder.
            what: What it holds, for errors.
            kind: As `kind_of` calls it.
            hint: Instead of the one for all that the evidence needs.

        Raises:
            UsageError: no folder has it, or it can't be read.
            EvidenceError: it is of another kind.
        """
        for folder in self.paths:
            path = folder / name
            if not os.path.lexists(path):
                continue
            content = read_file(path, "collateral")
            found = GivenFile(name=str(path), content=content, kind=kind_of(content))
            if found.kind != kind:
                raise found.not_as(f"{what}, as {kind}", hint or self.hint)
            return content
        places = ", ".join(map(str, self.paths))
        raise self.lacking(name, what, f"no such file in {places}" if places else "none", hint)

    def lacking(self, name: str, what: str, actual: str, hint: str = "") -> UsageError:
        """The error where something is nowhere; where there are folders, with the name of the file."""
        return UsageError(
            "the evidence can't be verified without its collateral",
            code="usage.collateral",
            claim=name if self.paths else "--collateral",
            expected=what,
            actual=actual,
            hint=hint or self.hint,
        )


def fetch_hint(paths: Sequence[Path], *options: str) -> str:
    """The whole command that fetches something."""
    target = str(paths[0]) if paths else "collateral"
    command = shlex.join(["cloister", "collateral", "fetch", "--into", target, *options])
    return f"Fetch it with `{command}`" + ("" if paths else f", then give `--collateral {target}`")


def _report_hint(paths: Sequence[Path], report: SnpReport, name: str) -> str:
    if report.signer == VLEK:
        return "AMD gives VLEKs to cloud providers only; take it from the table that the host gives"
    if not any(report.chip_id):
        return "The host masks its chip; take the certificate from the table that it gives"
    if report.product:
        return fetch_hint(paths, "--report", name)
    named = fetch_hint(paths, "--report", name, "--product", "PRODUCT")
    return f"{named}; PRODUCT is {', '.join(PRODUCTS[:-1])} or {PRODUCTS[-1]}: this report doesn't say which"
