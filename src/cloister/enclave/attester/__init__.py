"""Collects evidence from the machine that an enclave runs on."""

from __future__ import annotations

__all__ = ["Attester", "open_attester"]

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

from cloister.core.evidence.bundle import Evidence
from cloister.core.secret import Secret
from cloister.enclave.attester import gramine, nsm, sev_guest, tsm
from cloister.enclave.attester.simulated import DEVICE_VARIABLE, SimulatedAttester
from cloister.enclave.attester.stapled import COLLATERAL_VARIABLE, StapledCollateral
from cloister.errors import UsageError

ATTESTER_VARIABLE: Final = "CLOISTER_ATTESTER"


class Attester(Protocol):
    """What an enclave asks of its TEE. The calls may take seconds; they may come from any thread."""

    @property
    def simulated(self) -> bool:
        """Whether this TEE protects nothing from the machine's administrator."""

    def evidence(self, report_data: bytes) -> Evidence:
        """Evidence of this enclave's measurement over ``report_data`` (64 bytes), with its collateral.

        Raises:
            UsageError: ``report_data`` has another length, or the TEE is not set up for evidence.
            FormatError: the TEE's answer, or the collateral, does not parse.
            Unavailable: the TEE doesn't answer, or the collateral isn't there.
        """

    def sealing_key(self) -> Secret:
        """The key (32 bytes) that this platform gives to enclaves of exactly this measurement.

        Raises:
            UsageError: this kind of TEE has no such key.
            FormatError: the TEE's answer does not parse.
            Unavailable: the TEE doesn't answer.
        """


_Make = Callable[[StapledCollateral, Path], Attester]

# Name, what a machine has where it can be used, and how to make it. SEV-SNP's own device comes before
# configfs-tsm, which has no keys; where a guest shows only the latter, that serves.
_KINDS: Final[tuple[tuple[str, Path, _Make], ...]] = (
    (
        "gramine",
        gramine.FOLDER / gramine.TYPE_FILE,
        lambda collateral, root: gramine.GramineAttester(collateral, root=root),
    ),
    ("nsm", nsm.DEVICE, lambda _, root: nsm.NsmAttester(root=root)),
    (
        "sev-guest",
        sev_guest.DEVICE,
        lambda collateral, root: sev_guest.SevGuestAttester(collateral, root=root),
    ),
    ("tsm", tsm.FOLDER, lambda collateral, root: tsm.TsmAttester(collateral, root=root)),
)


def open_attester(environ: Mapping[str, str], *, root: Path = Path("/")) -> Attester:
    """Open the attester of the TEE that this process runs in.

    ``CLOISTER_ATTESTER`` names it: simulated, gramine, nsm, sev-guest or tsm. Without it the first of these,
    in this order, whose device is there. ``CLOISTER_COLLATERAL`` names the folder with collateral.

    Args:
        environ: The process's environment.
        root: Where the machine's files are.

    Raises:
        UsageError: no TEE was found, the named one is unknown, or the simulated device is none.
    """
    wanted = environ.get(ATTESTER_VARIABLE)
    known = ("simulated", *(name for name, _, _ in _KINDS))
    if wanted is not None and wanted not in known:
        raise UsageError(
            "no such attester",
            code="attester.kind",
            claim=ATTESTER_VARIABLE,
            expected=", ".join(known),
            actual=wanted[:40],
        )
    if DEVICE_VARIABLE in environ and wanted in (None, "simulated"):
        return SimulatedAttester.open(environ[DEVICE_VARIABLE])
    folder = environ.get(COLLATERAL_VARIABLE)
    collateral = StapledCollateral(Path(folder) if folder else None)
    for name, device, make in _KINDS:
        if wanted == name or (wanted is None and (root / device).exists()):
            return make(collateral, root)
    looked = [f"the simulated device ({DEVICE_VARIABLE})"]
    looked += [f"{root / device} ({name})" for name, device, _ in _KINDS if wanted is None]
    raise UsageError(
        "this process runs in no TEE that Cloister knows",
        code="attester.none",
        claim="TEE device",
        expected=" or ".join(looked),
        actual="nothing",
        hint="enclaves are started by a launcher, not by hand",
    )
