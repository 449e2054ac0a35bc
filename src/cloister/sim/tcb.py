"""TCB info (format 3) and QE identity (format 2) of the simulated platform, as the JSON texts to sign."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from cloister.core.evidence.pck import PckExtension

QE_MR_SIGNER: Final = b"Cloister Simulated SGX QE signer"  # 32 B, readable in a dump
QE_ATTRIBUTES: Final = bytes.fromhex("1500000000000000e700000000000000")
QE_ATTRIBUTES_MASK: Final = bytes.fromhex("fbffffffffffffff0000000000000000")
QE_PROD_ID: Final = 1
QE_SVN: Final = 8

_TCB_DATE: Final = "2026-01-01T00:00:00Z"


def tcb_info(
    platform: PckExtension,
    *,
    issued: int,
    next_update: int,
    evaluation_number: int,
    status: str,
    advisories: Sequence[str],
) -> bytes:
    """TCB info with two levels: the platform's own, with ``status``, and everything below it, out of date."""
    own = {
        "sgxtcbcomponents": [{"svn": svn} for svn in platform.tcb_components],
        "pcesvn": platform.pce_svn,
    }
    below = {"sgxtcbcomponents": [{"svn": 0}] * 16, "pcesvn": 0}
    return _text(
        {
            "id": "SGX",
            "version": 3,
            "issueDate": _time(issued),
            "nextUpdate": _time(next_update),
            "fmspc": platform.fmspc.hex().upper(),
            "pceId": platform.pce_id.hex().upper(),
            "tcbType": 0,
            "tcbEvaluationDataNumber": evaluation_number,
            "tcbLevels": [
                _level(own, status, advisories),
                _level(below, "OutOfDate", advisories),
            ],
        }
    )


def qe_identity(*, issued: int, next_update: int, evaluation_number: int, status: str) -> bytes:
    """The identity of the simulated quoting enclave, whose current version has ``status``."""
    return _text(
        {
            "id": "QE",
            "version": 2,
            "issueDate": _time(issued),
            "nextUpdate": _time(next_update),
            "tcbEvaluationDataNumber": evaluation_number,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": _masked(QE_ATTRIBUTES, QE_ATTRIBUTES_MASK).hex().upper(),
            "attributesMask": QE_ATTRIBUTES_MASK.hex().upper(),
            "mrsigner": QE_MR_SIGNER.hex().upper(),
            "isvprodid": QE_PROD_ID,
            "tcbLevels": [
                _level({"isvsvn": QE_SVN}, status, ()),
                _level({"isvsvn": 1}, "OutOfDate", ()),
            ],
        }
    )


def _level(tcb: dict[str, Any], status: str, advisories: Sequence[str]) -> dict[str, Any]:
    level = {"tcb": tcb, "tcbDate": _TCB_DATE, "tcbStatus": status}
    return {**level, "advisoryIDs": list(advisories)} if advisories else level


def _masked(value: bytes, mask: bytes) -> bytes:
    return bytes(left & right for left, right in zip(value, mask, strict=True))


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _text(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
