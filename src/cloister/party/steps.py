"""The steps of a verification, as people read them: for the command line, the proxy's page and `Record`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from cloister.core.times import time_text
from cloister.core.verifier.result import Step, VerifiedEvidence

_NUMBERED: Final = re.compile(r"(\d{1,2}) ")
_SECONDS: Final = re.compile(r"\b\d{10}\b")
_BITS: Final = re.compile(r"0x[0-9a-f]+")
_ANSWERS: Final = {"True": "yes", "False": "no"}


def told(steps: Iterable[Step], evidence: VerifiedEvidence | None) -> list[Step]:
    """The steps with dates for times, yes and no, and bits as the report's fields have them.

    ``expired`` becomes ``valid until``. A number without a step, such as that of another TEE, gets a line.

    Args:
        steps: As they were taken.
        evidence: What they are about; None where it isn't at hand: what only it tells stays as it was.
    """
    found: list[Step] = []
    last = 0
    for step in steps:
        number = int(match[1]) if (match := _NUMBERED.match(step.name)) else 0
        found += [_absent(missing, evidence) for missing in range(last + 1, number) if last]
        last = number
        found.append(_told(step, evidence))
    return found


def _told(step: Step, evidence: VerifiedEvidence | None) -> Step:
    if step.name == "validity":
        return replace(step, detail=_SECONDS.sub(lambda digits: time_text(int(digits[0])), step.detail))
    if evidence is not None and step.name == "expired":  # its detail is the time of the check
        return replace(step, name="valid until", detail=time_text(evidence.not_after))
    if evidence is not None and _BITS.fullmatch(step.detail):
        value = evidence.measurements.get(step.name)
        if isinstance(value, bytes) and int.from_bytes(value, "little") == int(step.detail, 16):
            return replace(step, detail=value.hex())
    return replace(step, detail=_ANSWERS.get(step.detail, step.detail))


def _absent(number: int, evidence: VerifiedEvidence | None) -> Step:
    tee = evidence.tee.upper() if evidence is not None else "this TEE"
    return Step(name=str(number), outcome="note", detail=f"nothing to show for {tee}")
