"""Collects evidence from the machine that an enclave runs on."""

from __future__ import annotations

__all__ = ["Attester", "open_attester"]

from collections.abc import Mapping
from typing import Protocol

from cloister.core.evidence.bundle import Evidence
from cloister.core.secret import Secret
from cloister.enclave.attester.simulated import DEVICE_VARIABLE, SimulatedAttester
from cloister.errors import UsageError


class Attester(Protocol):
    """What an enclave asks of its TEE. The calls take about a millisecond; they may come from any thread."""

    @property
    def simulated(self) -> bool:
        """Whether this TEE protects nothing from the machine's administrator."""

    def evidence(self, report_data: bytes) -> Evidence:
        """Evidence of this enclave's measurement over ``report_data`` (64 bytes), with its collateral.

        Raises:
            UsageError: ``report_data`` has another length.
            FormatError: the TEE's answer does not parse.
            Unavailable: the TEE doesn't answer.
        """

    def sealing_key(self) -> Secret:
        """The key (32 bytes) that this platform gives to enclaves of exactly this measurement.

        Raises:
            FormatError: the TEE's answer does not parse.
            Unavailable: the TEE doesn't answer.
        """


def open_attester(environ: Mapping[str, str]) -> Attester:
    """Open the attester of the TEE that this process runs in.

    Args:
        environ: The process's environment.

    Raises:
        UsageError: no TEE was found, or the simulated device named in the environment is not one.
    """
    if DEVICE_VARIABLE in environ:
        return SimulatedAttester.open(environ[DEVICE_VARIABLE])
    raise UsageError(
        "this process runs in no TEE that Cloister knows",
        code="attester.none",
        claim="TEE device",
        expected=f"the simulated device ({DEVICE_VARIABLE})",
        actual="nothing",
        hint="enclaves are started by a launcher, not by hand",
    )
