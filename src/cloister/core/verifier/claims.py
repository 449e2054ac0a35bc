"""What a policy can say of evidence: the claims of each TEE, in the order in which they are looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from cloister.core.verifier.kinds import (
    Bound,
    Checks,
    Claim,
    Components,
    Exactly,
    Get,
    Listed,
    Masked,
    Members,
    Unless,
    not_subset,
    number,
)
from cloister.core.verifier.result import VerifiedEvidence
from cloister.core.verifier.tee_kinds import Denied, ServiceTd, SnpTcb, dcap_platform, snp_platform

__all__ = ["CLAIMS", "Checks", "not_subset"]

SGX_DEBUG: Final = 1 << 1  # Intel SDM, volume 3D: ATTRIBUTES
TD_DEBUG: Final = 1 << 0  # Intel TDX module ABI: TDATTRIBUTES
TD_MIGRATABLE: Final = 1 << 29
TD_SEPT_VE_DISABLE: Final = 1 << 28
SNP_MIGRATE_MA: Final = 1 << 18  # AMD 56860: POLICY
SNP_DEBUG: Final = 1 << 19


def _measured(name: str) -> Get:
    return lambda verified: verified.measurements.get(name)


def _member(name: str, *, required: bool = False) -> Members:
    return Members(name=name, field=name, get=_measured(name), required=required)


def _bit(name: str, bits: int) -> Callable[[VerifiedEvidence], bool]:
    return lambda verified: bool(number(verified.measurements.get(name)) & bits)


def _debug(name: str = "", bits: int = 0) -> Unless:
    """The verifier says that it isn't a debug enclave, and so do the bits that it goes by."""

    def off(verified: VerifiedEvidence) -> bool:
        return not verified.debug and not (bits and _bit(name, bits)(verified))

    return Unless(
        name="debug", holds=off, expected="no", found=lambda verified: "no" if off(verified) else "yes"
    )


_DCAP: Final[tuple[Claim, ...]] = (
    Members(name="tcb status", field="allowed_tcb", get=lambda found: found.tcb_status, required=True),
    Denied(),
    Bound(name="tcb evaluation", field="min_tcb_evaluation", get=lambda found: found.tcb_evaluation_number),
    Listed(
        name="platform", field="platforms", flag="any_platform", get=lambda found: dcap_platform(found).fmspc
    ),
)
CLAIMS: Final[Mapping[str, tuple[Claim, ...]]] = MappingProxyType(
    {
        "sgx": (
            _debug("attributes", SGX_DEBUG),
            _member("mr_enclave", required=True),
            Masked(name="attributes", get=_measured("attributes"), covers=SGX_DEBUG),
            _member("mr_signer"),
            Exactly(name="isv_prod_id", get=_measured("isv_prod_id")),
            Bound(name="isv_svn", field="min_isv_svn", get=_measured("isv_svn")),
            *_DCAP,
        ),
        "tdx": (
            _debug("td_attributes", TD_DEBUG),
            Unless(
                name="sept_ve_disable",
                holds=_bit("td_attributes", TD_SEPT_VE_DISABLE),
                expected="set",
                found=lambda verified: (
                    "set" if _bit("td_attributes", TD_SEPT_VE_DISABLE)(verified) else "not set"
                ),
            ),
            _member("mr_td", required=True),
            *(_member(f"rtmr{index}", required=True) for index in range(4)),
            _member("mr_config_id", required=True),
            _member("mr_owner"),
            _member("mr_owner_config"),
            _member("mr_seam"),
            ServiceTd(),
            Masked(
                name="td_attributes",
                get=_measured("td_attributes"),
                covers=TD_DEBUG | TD_MIGRATABLE,
            ),
            Masked(name="xfam", get=_measured("xfam")),
            Components(name="tee_tcb_svn", field="min_tee_tcb_svn", get=_measured("tee_tcb_svn")),
            *_DCAP,
        ),
        "snp": (
            _debug("guest_policy", SNP_DEBUG),
            _member("measurement", required=True),
            Masked(name="guest_policy", get=_measured("guest_policy"), covers=SNP_DEBUG | SNP_MIGRATE_MA),
            Bound(name="vmpl", field="max_vmpl", get=_measured("vmpl"), upper=True),
            _member("host_data"),
            Bound(name="guest_svn", field="min_guest_svn", get=_measured("guest_svn")),
            _member("family_id"),
            _member("image_id"),
            _member("id_key_digest"),
            _member("author_key_digest"),
            Masked(name="platform_info", get=_measured("platform_info")),
            SnpTcb(),
            Unless(
                name="signer",
                holds=lambda verified: snp_platform(verified).signer == "VCEK",
                expected="VCEK",
                found=lambda verified: snp_platform(verified).signer,
                flag="allow_vlek",
            ),
            Unless(
                name="revocation list",
                holds=lambda verified: verified.collateral_issued is not None,
                expected="one that is in force",
                found=lambda verified: "none" if verified.collateral_issued is None else "one",
                flag="allow_missing_crl",
            ),
            Listed(
                name="platform",
                field="products",
                flag="any_platform",
                get=lambda verified: snp_platform(verified).product,
            ),
            Members(name="chip_id", field="chip_ids", get=lambda verified: snp_platform(verified).chip_id),
        ),
        "nitro": (
            _debug(),
            *(_member(f"pcr{index}", required=True) for index in range(3)),
            *(_member(f"pcr{index}") for index in (3, 4, 8)),
        ),
    }
)
