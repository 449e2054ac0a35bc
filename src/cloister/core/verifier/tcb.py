"""TCB info (Intel PCS v4, format 3): parsing, the platform's level, merging it with its parts' statuses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cloister.core.evidence.pck import COMPONENTS, PckExtension
from cloister.core.verifier.documents import LEVEL_STATUSES, MAX_LEVELS, MODULE_STATUSES, Document
from cloister.errors import EvidenceRefused

MAX_MODULES: Final = 64  # TDX modules that one TCB info describes

_U16: Final = 0xFFFF
_U32: Final = 0xFFFFFFFF

# Intel QVL, status of a platform whose quoting enclave or TDX module is out of date.
_WITH_OLD_PART: Final = {
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
        tdx_components: 16 numbers likewise, to compare with TEE_TCB_SVN; empty in TCB info of SGX.
        pce_svn: Least version of the PCE.
        status: One of Intel's TCB statuses.
        date: Unix seconds; issues published before it are fixed.
        advisories: Names of the advisories that still apply.
    """

    components: tuple[int, ...]
    tdx_components: tuple[int, ...]
    pce_svn: int
    status: str
    date: int
    advisories: tuple[str, ...]

    def admits(self, platform: PckExtension) -> bool:
        """Whether the platform reaches all 16 components and the PCE's version."""
        return platform.pce_svn >= self.pce_svn and _reaches(platform.tcb_components, self.components)

    def admits_td(self, tee_tcb_svn: bytes) -> bool:
        """Whether a TD's 16 TDX components do; the first two of TDX 1.5 and later are the module's own."""
        start = 2 if tee_tcb_svn[1] else 0
        return _reaches(tee_tcb_svn[start:], self.tdx_components[start:])


@dataclass(frozen=True, slots=True, kw_only=True)
class IsvLevel:
    """From ISVSVN ``isv_svn`` on, a quoting enclave or a TDX module has this status; the date as above."""

    isv_svn: int
    status: str
    date: int
    advisories: tuple[str, ...]

    @classmethod
    def from_document(cls, entry: Document, *, most: int, statuses: frozenset[str]) -> IsvLevel:
        """Read one entry of ``tcbLevels``, with versions up to ``most``; raises EvidenceError."""
        return cls(
            isv_svn=entry.object("tcb").integer("isvsvn", most),
            status=entry.status("tcbStatus", statuses),
            date=entry.time("tcbDate"),
            advisories=entry.advisories("advisoryIDs"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxModule:
    """A TDX module of one major version.

    Attributes:
        id: ``"TDX_01"`` and so on; ``"TDX_00"`` is the module of TDX 1.0.
        mr_signer: 48 B.
        attributes: 8 B.
        levels: Newest first; empty for TDX 1.0, whose version is part of the platform's level.
    """

    id: str
    mr_signer: bytes
    attributes: bytes
    levels: tuple[IsvLevel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbInfo:
    """What Intel says about one platform family; times are unix seconds. Only TCB info of TDX has modules."""

    id: str
    version: int
    issued: int
    next_update: int
    fmspc: bytes
    pce_id: bytes
    evaluation_number: int
    levels: tuple[TcbLevel, ...]
    modules: tuple[TdxModule, ...]

    @classmethod
    def from_bytes(cls, text: bytes) -> TcbInfo:
        """Parse the exact JSON text that was signed.

        Raises:
            EvidenceError: any other text.
        """
        return _parse(text)

    def select(self, platform: PckExtension) -> TcbLevel:
        """The first level that the platform reaches.

        Raises:
            EvidenceRefused: it reaches none (``evidence.tcb-level``).
        """
        for level in self.levels:
            if level.admits(platform):
                return level
        raise _no_level("TCB level", f"{list(platform.tcb_components)}, PCE {platform.pce_svn}")

    def select_td(self, platform: PckExtension, tee_tcb_svn: bytes) -> TcbLevel:
        """The first level that the platform and its TD's 16 TDX components reach.

        Raises:
            EvidenceRefused: they reach none (``evidence.tcb-level``).
        """
        for level in self.levels:
            if level.admits(platform) and level.admits_td(tee_tcb_svn):
                return level
        raise _no_level("TDX TCB level", str(list(tee_tcb_svn)))

    def module(self, version: int) -> TdxModule:
        """The TDX module of a major version (TEE_TCB_SVN byte 1).

        Raises:
            EvidenceRefused: there is none (``evidence.tdx-module``).
        """
        name = f"TDX_{version:02X}"
        for module in self.modules:
            if module.id.upper() == name:
                return module
        raise EvidenceRefused(
            code="evidence.tdx-module",
            claim="TDX module",
            expected=" or ".join(module.id for module in self.modules),
            actual=name,
        )


def merge_status(platform: str, part: str) -> str:
    """The status of a platform together with a part of it, by the rules of Intel's QVL.

    Args:
        platform: Status of the platform's TCB level, or of that and another part.
        part: Status of its quoting enclave or of its TDX module; all but up to date counts as out of date.
    """
    return platform if part == "UpToDate" else _WITH_OLD_PART.get(platform, platform)


def require_good(what: str, status: str) -> None:
    """Refuse what is revoked.

    Raises:
        EvidenceRefused: code ``evidence.tcb-revoked``.
    """
    if status == "Revoked":
        raise EvidenceRefused(
            code="evidence.tcb-revoked",
            claim=f"TCB status of the {what}",
            expected="not revoked",
            actual=status,
        )


@lru_cache(maxsize=16)
def _parse(text: bytes) -> TcbInfo:
    document = Document.parse(text, "TCB info")
    document.integer("tcbType", 0)  # how to compare versions; 0 is the only way there is
    name = document.text("id")
    tdx = name == "TDX"
    return TcbInfo(
        id=name,
        version=document.integer("version", _U16),
        issued=document.time("issueDate"),
        next_update=document.time("nextUpdate"),
        fmspc=document.octets("fmspc", 6),
        pce_id=document.octets("pceId", 2),
        evaluation_number=document.integer("tcbEvaluationDataNumber", _U32),
        levels=tuple(_level(entry, tdx) for entry in document.objects("tcbLevels", least=1, most=MAX_LEVELS)),
        modules=tuple(_modules(document)) if tdx else (),
    )


def _level(entry: Document, tdx: bool) -> TcbLevel:
    tcb = entry.object("tcb")
    return TcbLevel(
        components=_components(tcb, "sgxtcbcomponents"),
        tdx_components=_components(tcb, "tdxtcbcomponents") if tdx else (),
        pce_svn=tcb.integer("pcesvn", _U16),
        status=entry.status("tcbStatus", LEVEL_STATUSES),
        date=entry.time("tcbDate"),
        advisories=entry.advisories("advisoryIDs"),
    )


def _components(tcb: Document, field: str) -> tuple[int, ...]:
    components = tcb.objects(field, least=COMPONENTS, most=COMPONENTS)
    return tuple(component.integer("svn", 0xFF) for component in components)


def _modules(document: Document) -> list[TdxModule]:
    found = [_module("TDX_00", document.object("tdxModule"), ())]
    if document.has("tdxModuleIdentities"):  # documents from before TDX 1.5 have none
        for entry in document.objects("tdxModuleIdentities", least=1, most=MAX_MODULES):
            levels = entry.objects("tcbLevels", least=1, most=MAX_LEVELS)
            found.append(_module(entry.text("id"), entry, levels))
    return found


def _module(name: str, entry: Document, levels: tuple[Document, ...]) -> TdxModule:
    return TdxModule(
        id=name,
        mr_signer=entry.octets("mrsigner", 48),
        attributes=entry.octets("attributes", 8),
        levels=tuple(IsvLevel.from_document(level, most=0xFF, statuses=MODULE_STATUSES) for level in levels),
    )


def _reaches(have: tuple[int, ...] | bytes, need: tuple[int, ...]) -> bool:
    return all(mine >= least for mine, least in zip(have, need, strict=True))


def _no_level(claim: str, actual: str) -> EvidenceRefused:
    return EvidenceRefused(
        code="evidence.tcb-level",
        claim=claim,
        expected="at least the lowest that Intel lists",
        actual=actual,
    )
