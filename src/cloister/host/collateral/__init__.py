"""Fetches the vendors' collateral for a host's enclaves, which have no way to the vendors themselves."""

from __future__ import annotations

__all__ = [
    "AMD_KDS",
    "INTEL_PCS",
    "CollateralFolder",
    "Entry",
    "Service",
    "fetch_dcap",
    "fetch_snp",
    "fetch_snp_crl",
]

from cloister.host.collateral.folder import CollateralFolder, Entry
from cloister.host.collateral.kds import AMD_KDS, fetch_snp, fetch_snp_crl
from cloister.host.collateral.pcs import INTEL_PCS, fetch_dcap
from cloister.host.collateral.service import Service
