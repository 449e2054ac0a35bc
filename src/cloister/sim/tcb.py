"""TCB info (format 3) and QE identity (format 2) of the simulated platform, as the JSON texts to sign."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from cloister.core.evidence.pck import PckExtension

QE_MR_SIGNER: Final = b"Cloister Simulated SGX QE signer"  # 32 B, readable in a dump
QE_ATTRIBUTES: Final = bytes.fromhex("1500000000000000e700000000000000")
QE_ATTRIBUTES_MASK: Final = bytes.fromhex("fbffffffffffffff0000000000000000")
QE_PROD_ID: Final = 1
TD_QE_PROD_ID: Final = 2
QE_SVN: Final = 8
TDX_MODULE: Final = 1  # major version
TDX_MODULE_SVN: Final = 5
SEAM_LOADER_SVN: Final = 3
TEE_TCB_SVN: Final = bytes((TDX_MODULE_SVN, TDX_MODULE, SEAM_LOADER_SVN)) + bytes(13)
MR_SIGNER_SEAM: Final = b"Cloister Simulated TDX module signer".ljust(48)

_TCB_DATE: Final = "2026-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxReference:
    """What TCB info says of TDX modules.

    Attributes:
        version: Major version of the one module that is listed.
        mr_signer: 48 B.
        attributes: 8 B.
        status: Status of the module's current version.
        advisories: Advisories of that version.
        least_svn: Lowest version of the module that is listed, out of date.
        least_loader: Lowest version of the SEAM loader that any level admits.
    """

    version: int = TDX_MODULE
    mr_signer: bytes = MR_SIGNER_SEAM
    attributes: bytes = bytes(8)
    status: str = "UpToDate"
    advisories: tuple[str, ...] = ()
    least_svn: int = 2
    least_loader: int = 0


def tcb_info(
    platform: PckExtension,
    *,
    issued: int,
    next_update: int,
    evaluation_number: int,
    status: str,
    advisories: Sequence[str],
    tdx: TdxReference | None = None,
) -> bytes:
    """TCB info with two levels: the platform's own, with ``status``, and everything below it, out of date.

    With ``tdx`` it is TCB info of TDX, else of SGX.
    """
    own: dict[str, Any] = {
        "sgxtcbcomponents": _components(platform.tcb_components),
        "pcesvn": platform.pce_svn,
    }
    below: dict[str, Any] = {"sgxtcbcomponents": _components(bytes(16)), "pcesvn": 0}
    modules = {}
    if tdx is not None:
        loader = max(SEAM_LOADER_SVN, tdx.least_loader)
        own["tdxtcbcomponents"] = _components(bytes((TDX_MODULE_SVN, 0, loader)) + bytes(13))
        below["tdxtcbcomponents"] = _components(bytes((0, 0, tdx.least_loader)) + bytes(13))
        modules = _modules(tdx)
    return _text(
        {
            "id": "SGX" if tdx is None else "TDX",
            "version": 3,
            "issueDate": _time(issued),
            "nextUpdate": _time(next_update),
            "fmspc": platform.fmspc.hex().upper(),
            "pceId": platform.pce_id.hex().upper(),
            "tcbType": 0,
            "tcbEvaluationDataNumber": evaluation_number,
            **modules,
            "tcbLevels": [
                _level(own, status, advisories),
                _level(below, "OutOfDate", advisories),
            ],
        }
    )


def qe_identity(
    *, issued: int, next_update: int, evaluation_number: int, status: str, tdx: bool = False
) -> bytes:
    """The identity of the simulated quoting enclave of SGX or TDX, whose current version has ``status``."""
    return _text(
        {
            "id": "TD_QE" if tdx else "QE",
            "version": 2,
            "issueDate": _time(issued),
            "nextUpdate": _time(next_update),
            "tcbEvaluationDataNumber": evaluation_number,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": _masked(QE_ATTRIBUTES, QE_ATTRIBUTES_MASK).hex().upper(),
            "attributesMask": QE_ATTRIBUTES_MASK.hex().upper(),
            "mrsigner": QE_MR_SIGNER.hex().upper(),
            "isvprodid": TD_QE_PROD_ID if tdx else QE_PROD_ID,
            "tcbLevels": [
                _level({"isvsvn": QE_SVN}, status, ()),
                _level({"isvsvn": 1}, "OutOfDate", ()),
            ],
        }
    )


def _modules(tdx: TdxReference) -> dict[str, Any]:
    module = {
        "mrsigner": tdx.mr_signer.hex().upper(),
        "attributes": tdx.attributes.hex().upper(),
        "attributesMask": "FF" * 8,
    }
    levels = [_level({"isvsvn": tdx.least_svn}, "OutOfDate", tdx.advisories)]
    if tdx.least_svn < TDX_MODULE_SVN:
        levels.insert(0, _level({"isvsvn": TDX_MODULE_SVN}, tdx.status, tdx.advisories))
    identity = {"id": f"TDX_{tdx.version:02X}", **module, "tcbLevels": levels}
    return {"tdxModule": module, "tdxModuleIdentities": [identity]}


def _components(svns: Iterable[int]) -> list[dict[str, int]]:
    return [{"svn": svn} for svn in svns]


def _level(tcb: dict[str, Any], status: str, advisories: Sequence[str]) -> dict[str, Any]:
    level = {"tcb": tcb, "tcbDate": _TCB_DATE, "tcbStatus": status}
    return {**level, "advisoryIDs": list(advisories)} if advisories else level


def _masked(value: bytes, mask: bytes) -> bytes:
    return bytes(left & right for left, right in zip(value, mask, strict=True))


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _text(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
