"""Steps 11 to 13 of DCAP verification for trust domains: the TDX module, the TCB level, relaunch.

The steps are numbered in `cloister.core.verifier.dcap`. Source: Intel QVL of 2026 (commit d12717e3):
``QuoteVerifier.cpp`` and, in ``Checks``, ``EvaluateTcb.cpp``, ``TcbLevelCheck.cpp``, ``TDRelaunchCheck.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cloister.core.evidence.pck import PckExtension
from cloister.core.evidence.tdx import TdReport, TdReport15
from cloister.core.verifier.collateral import passed, require_equal
from cloister.core.verifier.result import Step
from cloister.core.verifier.tcb import IsvLevel, TcbInfo, TcbLevel, merge_status, require_good
from cloister.errors import EvidenceRefused

_CODE: Final = "evidence.tdx-module"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tcb:
    """What platform, quoting enclave and one TDX module amount to.

    Attributes:
        status: Of all together.
        parts: Of each, by name.
        levels: The levels that they have reached.
    """

    status: str
    parts: Mapping[str, str]
    levels: tuple[TcbLevel | IsvLevel, ...]


def appraise_td(
    report: TdReport, platform: PckExtension, info: TcbInfo, qe: IsvLevel, steps: list[Step]
) -> tuple[str, tuple[TcbLevel | IsvLevel, ...]]:
    """Steps 11 to 13: the status of a TD and its platform, and the levels that count.

    Raises:
        EvidenceRefused: another module, no level, or something is revoked.
    """
    _verify_module(report, info, steps)
    launch = _evaluate(report.tee_tcb_svn, platform, info, qe, module="TDX module")
    found = ", ".join(f"{name} {status}" for name, status in launch.parts.items())
    steps.append(passed("12 TCB level", f"{found}: {launch.status}"))
    if not isinstance(report, TdReport15):
        return launch.status, launch.levels
    now = _evaluate(report.tee_tcb_svn2, platform, info, qe, module="TDX module that runs now")
    status = _relaunch(launch.status, now.status)
    detail = f"launched at {launch.status}, runs at {now.status} (TEE_TCB_SVN2 {report.tee_tcb_svn2.hex()})"
    steps.append(passed("13 relaunch", f"{detail}: {status}"))
    return status, (*launch.levels, *now.levels)


def _verify_module(report: TdReport, info: TcbInfo, steps: list[Step]) -> None:
    """Step 11."""
    module = info.module(report.tee_tcb_svn[1])
    require_equal(_CODE, "MRSIGNERSEAM", module.mr_signer.hex(), report.mr_signer_seam.hex())
    require_equal(_CODE, "SEAMATTRIBUTES", bytes(8).hex(), report.seam_attributes.hex())
    require_equal(_CODE, "attributes of the TDX module", bytes(8).hex(), module.attributes.hex())
    detail = f"{module.id}, ISVSVN {report.tee_tcb_svn[0]}, MRSEAM {report.mr_seam.hex()}"
    steps.append(passed("11 TDX module", detail))


def _evaluate(svn: bytes, platform: PckExtension, info: TcbInfo, qe: IsvLevel, *, module: str) -> _Tcb:
    """Step 12 for the TDX module with the versions ``svn``, which errors call ``module``."""
    sgx, tdx = info.select(platform), info.select_td(platform, svn)
    parts = {"platform": sgx.status, "TD": tdx.status, "quoting enclave": qe.status}
    status = merge_status(tdx.status, qe.status)
    levels: list[TcbLevel | IsvLevel] = [tdx, qe]
    if svn[1]:  # the module of TDX 1.0 has no level of its own
        level = _module_level(info, svn, module)
        parts[module] = level.status
        status = merge_status(status, level.status)
        levels.append(level)
    # Intel's QVL would let a TD pass below a platform's level that is revoked.
    for name, part in parts.items():
        require_good(name, part)
    return _Tcb(status=status, parts=parts, levels=tuple(levels))


def _module_level(info: TcbInfo, svn: bytes, name: str) -> IsvLevel:
    levels = info.module(svn[1]).levels
    for level in levels:
        if svn[0] >= level.isv_svn:
            return level
    raise EvidenceRefused(
        code="evidence.tcb-level",
        claim=f"ISVSVN of the {name}",
        expected=f"at least {min(level.isv_svn for level in levels)}",
        actual=svn[0],
    )


def _relaunch(launch: str, now: str) -> str:
    """Step 13: the status of a TD, from that at its launch and that of what runs it now."""
    if not launch.startswith("OutOfDate") or now.startswith("OutOfDate"):
        return launch
    if "Configuration" in launch or "Configuration" in now:
        return "TDRelaunchAdvisedConfigurationNeeded"
    return "TDRelaunchAdvised"
