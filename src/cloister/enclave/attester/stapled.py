"""Collateral from a folder that the host fills: an enclave has no way to the vendors' services.

`cloister.core.verifier.collateral_key` names the files and ``cloister collateral fetch`` writes them. Nothing
in them is trusted: they are bounded, parsed and stapled to the evidence, and whoever verifies it checks them.
Every call reads them anew, so a changed file counts from the next evidence on.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Final

from cloister.core.evidence.bundle import (
    MAX_COLLATERAL_JSON,
    MAX_COLLATERAL_PART,
    AmdCollateral,
    Collateral,
    Evidence,
)
from cloister.core.evidence.snp import VCEK, VLEK, SnpReport
from cloister.core.evidence.snp_table import CertificateTable
from cloister.core.verifier.certificates import AMD, MAX_PEM, load_chain, load_crl
from cloister.core.verifier.collateral_key import DcapKey, SnpKey, crl_file
from cloister.errors import FormatError, Unavailable, UsageError

COLLATERAL_VARIABLE: Final = "CLOISTER_COLLATERAL"


class StapledCollateral:
    """The folder that `COLLATERAL_VARIABLE` names, or none."""

    def __init__(self, folder: Path | None) -> None:
        """Name the folder; nothing is read before evidence needs it."""
        self._folder = folder

    def staple_quote(self, quote: bytes) -> Evidence:
        """An SGX or TDX quote with its collateral.

        Raises:
            UsageError: there is no folder.
            FormatError: the quote or the collateral does not parse.
            Unavailable: the folder has none for this platform.
        """
        key = DcapKey.from_quote(quote)
        need = f"--tee {key.tee} --fmspc {key.fmspc.hex()} --ca {key.ca}"
        text = self._read(key.file, MAX_COLLATERAL_JSON, f"DCAP collateral of {key.fmspc.hex()}", need)
        try:
            collateral = Collateral.from_json(text.decode())
        except UnicodeDecodeError as error:
            raise FormatError(
                "the collateral is not UTF-8", code="attester.collateral", claim=key.file
            ) from error
        return Evidence(tee=key.tee, quote=quote, collateral=collateral)

    def staple_report(self, raw: bytes, table: bytes) -> Evidence:
        """An SEV-SNP report with certificates and CRL, each from the table or else from the folder.

        Args:
            raw: The report.
            table: What the host handed over with it; empty or zeros for nothing.

        Raises:
            UsageError: there is no folder.
            FormatError: the report, the table or the collateral does not parse.
            Unavailable: neither has what this processor needs; or a VLEK signed, and the table lacks it.
        """
        report = SnpReport.from_bytes(raw)
        key = SnpKey(chip_id=report.chip_id, tcb=report.reported_tcb)
        need = f"--product {report.product or 'PRODUCT'} --chip-id {key.chip_id.hex()} --tcb {key.tcb.hex()}"
        offered = CertificateTable.from_bytes(table) if any(table) else None
        if offered and all(offered.find(name) for name in (report.signer or VCEK, "ASK", "ARK")):
            collateral = offered.to_collateral(report.signer or VCEK)
        elif report.signer == VLEK:
            raise _no_vlek()
        else:
            pem = self._read(key.file, MAX_PEM, "certificates of this processor", need)
            collateral = AmdCollateral(certificates=pem)
        if not collateral.crl:
            ark = load_chain(collateral.certificates, AMD)[-1]
            what = f"revocation list of {ark.common_name}"
            crl = self._read(crl_file(ark.der), MAX_COLLATERAL_PART, what, need)
            load_crl(crl, AMD)  # what isn't one isn't published
            collateral = replace(collateral, crl=crl)
        return Evidence(tee="snp", quote=raw, collateral=collateral)

    def _read(self, name: str, limit: int, what: str, need: str) -> bytes:
        """A file of the host's, of 1 to ``limit`` bytes: never a device, a pipe or a link."""
        if self._folder is None:
            raise UsageError(
                "this TEE's evidence needs collateral, and no folder holds any",
                code="attester.collateral",
                claim=COLLATERAL_VARIABLE,
                expected="a folder",
                actual="nothing",
                hint=f"Name one that `cloister collateral fetch {need} --into FOLDER` fills",
            )
        try:
            descriptor = os.open(
                self._folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            )
            with os.fdopen(descriptor, "rb") as file:
                regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
                data = file.read(limit + 1) if regular else b""
        except OSError as error:
            raise Unavailable(
                f"the {what} can't be read",
                code="attester.collateral",
                claim=name,
                expected="a file in the collateral folder",
                actual=errno.errorcode.get(error.errno or 0, "an error"),
                hint=f"Run `cloister collateral fetch {need} --into {self._folder}` on the host",
            ) from error
        if not 0 < len(data) <= limit:
            raise FormatError(
                f"the file of the {what} has an impossible length",
                code="attester.collateral",
                claim=name,
                expected=f"1 to {limit} B in a regular file",
                actual=f"{len(data)} B" if data else "nothing",
            )
        return data


def _no_vlek() -> Unavailable:
    """AMD gives VLEKs to cloud providers alone: no folder can be filled with them."""
    return Unavailable(
        "the certificate of the key that signed this report is nowhere",
        code="attester.collateral",
        claim=VLEK,
        expected="VLEK, ASK and ARK in the certificate table beside the report",
        actual="another table, or none",
        hint="The host must put the VLEK into the certificate table; it can't be fetched",
    )
