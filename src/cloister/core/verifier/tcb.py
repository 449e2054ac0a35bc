"""TCB info (Intel PCS v4, format 3): parsing, the platform's level, merging it with the QE's status."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cloister.core.evidence.pck import COMPONENTS, PckExtension
from cloister.core.verifier.documents import MAX_LEVELS, Document
from cloister.errors import EvidenceRefused

_U16: Final = 0xFFFF
_U32: Final = 0xFFFFFFFF

# Intel QVL, status of a platform whose quoting enclave is out of date.
_WITH_OLD_QE: Final = {
    "UpToDate": "OutOfDate",
    "SWHardeningNeeded": "OutOfDate",
    "ConfigurationNeeded": "OutOfDateConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded": "OutOfDateConfigurationNeeded",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbLevel:
    """A platform's patch level: least security version numbers, and what holds from them on.

    Attributes:
        components: 16 numbers, each 0 to 255.
        pce_svn: Least version of the PCE.
        status: One of Intel's TCB statuses.
        date: Unix seconds; issues published before it are fixed.
        advisories: Names of the advisories that still apply.
    """

    components: tuple[int, ...]
    pce_svn: int
    status: str
    date: int
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbInfo:
    """What Intel says about one platform family; times are unix seconds."""

    id: str
    version: int
    issued: int
    next_update: int
    fmspc: bytes
    pce_id: bytes
    evaluation_number: int
    levels: tuple[TcbLevel, ...]

    @classmethod
    def from_bytes(cls, text: bytes) -> TcbInfo:
        """Parse the exact JSON text that was signed.

        Raises:
            EvidenceError: any other text.
        """
        return _parse(text)

    def select(self, platform: PckExtension) -> TcbLevel:
        """The first level that the platform reaches in all 16 components and the PCE's version.

        Raises:
            EvidenceRefused: it reaches none (``evidence.tcb-level``), or one that is revoked.
        """
        for level in self.levels:
            reached = platform.pce_svn >= level.pce_svn and all(
                have >= need for have, need in zip(platform.tcb_components, level.components, strict=True)
            )
            if reached:
                return level
        raise EvidenceRefused(
            code="evidence.tcb-level",
            claim="TCB level",
            expected="at least the lowest that Intel lists",
            actual=f"{list(platform.tcb_components)}, PCE {platform.pce_svn}",
        )


def merge_status(platform: str, qe: str) -> str:
    """The status of platform and quoting enclave together, by the rules of Intel's QVL.

    Raises:
        EvidenceRefused: either is revoked (``evidence.tcb-revoked``).
    """
    for what, status in (("platform", platform), ("quoting enclave", qe)):
        if status == "Revoked":
            raise EvidenceRefused(
                code="evidence.tcb-revoked",
                claim=f"TCB status of the {what}",
                expected="not revoked",
                actual=status,
            )
    return _WITH_OLD_QE.get(platform, platform) if qe.startswith("OutOfDate") else platform


@lru_cache(maxsize=16)
def _parse(text: bytes) -> TcbInfo:
    document = Document.parse(text, "TCB info")
    document.integer("tcbType", 0)  # how to compare versions; 0 is the only way there is
    return TcbInfo(
        id=document.text("id"),
        version=document.integer("version", _U16),
        issued=document.time("issueDate"),
        next_update=document.time("nextUpdate"),
        fmspc=document.octets("fmspc", 6),
        pce_id=document.octets("pceId", 2),
        evaluation_number=document.integer("tcbEvaluationDataNumber", _U32),
        levels=tuple(_level(entry) for entry in document.objects("tcbLevels", least=1, most=MAX_LEVELS)),
    )


def _level(entry: Document) -> TcbLevel:
    tcb = entry.object("tcb")
    components = tcb.objects("sgxtcbcomponents", least=COMPONENTS, most=COMPONENTS)
    return TcbLevel(
        components=tuple(component.integer("svn", 0xFF) for component in components),
        pce_svn=tcb.integer("pcesvn", _U16),
        status=entry.status("tcbStatus"),
        date=entry.time("tcbDate"),
        advisories=entry.advisories("advisoryIDs"),
    )
