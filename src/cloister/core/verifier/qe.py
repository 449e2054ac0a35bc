"""QE and TD_QE identity (Intel PCS v4, format 2): which quoting enclaves may sign, and at which versions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cloister.core.evidence.sgx import SgxReportBody
from cloister.core.verifier.documents import LEVEL_STATUSES, MAX_LEVELS, Document
from cloister.core.verifier.tcb import IsvLevel
from cloister.errors import EvidenceRefused

_U16: Final = 0xFFFF
_U32: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class QeIdentity:
    """Reference values of the quoting enclave; times are unix seconds, masks select the bits that count."""

    id: str
    version: int
    issued: int
    next_update: int
    evaluation_number: int
    misc_select: bytes
    misc_select_mask: bytes
    attributes: bytes
    attributes_mask: bytes
    mr_signer: bytes
    isv_prod_id: int
    levels: tuple[IsvLevel, ...]

    @classmethod
    def from_bytes(cls, text: bytes) -> QeIdentity:
        """Parse the exact JSON text that was signed.

        Raises:
            EvidenceError: any other text.
        """
        return _parse(text)

    def appraise(self, report: SgxReportBody) -> IsvLevel:
        """Compare a quoting enclave's report with these values and select its level.

        Raises:
            EvidenceRefused: code ``evidence.qe``, naming the field.
        """
        misc_select = report.misc_select.to_bytes(4, "little")
        _require("MISCSELECT", self.misc_select.hex(), _masked(misc_select, self.misc_select_mask))
        _require("ATTRIBUTES", self.attributes.hex(), _masked(report.attributes, self.attributes_mask))
        _require("MRSIGNER", self.mr_signer.hex(), report.mr_signer.hex())
        _require("ISVPRODID", self.isv_prod_id, report.isv_prod_id)
        for level in self.levels:
            if report.isv_svn >= level.isv_svn:
                return level
        raise _refused("ISVSVN", f"at least {min(level.isv_svn for level in self.levels)}", report.isv_svn)


@lru_cache(maxsize=16)
def _parse(text: bytes) -> QeIdentity:
    document = Document.parse(text, "QE identity")
    return QeIdentity(
        id=document.text("id"),
        version=document.integer("version", _U16),
        issued=document.time("issueDate"),
        next_update=document.time("nextUpdate"),
        evaluation_number=document.integer("tcbEvaluationDataNumber", _U32),
        misc_select=document.octets("miscselect", 4),
        misc_select_mask=document.octets("miscselectMask", 4),
        attributes=document.octets("attributes", 16),
        attributes_mask=document.octets("attributesMask", 16),
        mr_signer=document.octets("mrsigner", 32),
        isv_prod_id=document.integer("isvprodid", _U16),
        levels=tuple(
            IsvLevel.from_document(entry, most=_U16, statuses=LEVEL_STATUSES)
            for entry in document.objects("tcbLevels", least=1, most=MAX_LEVELS)
        ),
    )


def _masked(value: bytes, mask: bytes) -> str:
    return bytes(left & right for left, right in zip(value, mask, strict=True)).hex()


def _require(field: str, expected: object, actual: object) -> None:
    if expected != actual:
        raise _refused(field, expected, actual)


def _refused(field: str, expected: object, actual: object) -> EvidenceRefused:
    return EvidenceRefused(
        code="evidence.qe", claim=f"{field} of the quoting enclave", expected=expected, actual=actual
    )
