"""Evidence of each TEE as frozen types: bytes to values and back; no trust decision is taken here."""

from __future__ import annotations

from cloister.core.evidence.bundle import Collateral, Evidence

__all__ = ["Collateral", "Evidence"]
