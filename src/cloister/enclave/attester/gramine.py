"""Evidence and sealing keys from Gramine on SGX, through its pseudo-files below ``/dev/attestation``.

``user_report_data`` takes 64 bytes, ``quote`` then gives a DCAP quote over them, ``attestation_type`` is
what the manifest asked for, and ``keys/_sgx_mrenclave`` is the processor's sealing key for this MRENCLAVE,
16 bytes (Gramine documentation, "Attestation and Secret Provisioning" and "Manifest syntax"). The processor
derives that key from its CPUSVN too, so it changes with the microcode's security version (gramine issue 855).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from cloister.core.evidence.bundle import MAX_EVIDENCE, Evidence
from cloister.core.evidence.dcap import Quote
from cloister.core.evidence.sgx import SgxReportBody
from cloister.core.secret import Secret
from cloister.enclave.attester.device import (
    LINUX,
    Kernel,
    derive_sealing_key,
    read_file,
    require_own,
    require_report_data,
    silent,
    write_file,
)
from cloister.enclave.attester.stapled import StapledCollateral
from cloister.errors import FormatError, UsageError

FOLDER: Final = Path("dev/attestation")
TYPE_FILE: Final = "attestation_type"
SGX_KEY_SIZE: Final = 16  # bytes
TARGET_INFO_SIZE: Final = 512  # bytes; MRENCLAVE at 0, ATTRIBUTES at 32 (Intel SDM, TARGETINFO)
_MAX_TYPE: Final = 64  # bytes


class GramineAttester:
    """This enclave, as Gramine shows it."""

    simulated: bool = False

    def __init__(
        self, collateral: StapledCollateral, *, root: Path = Path("/"), kernel: Kernel = LINUX
    ) -> None:
        """Make an attester; nothing is opened before it is asked."""
        self._collateral = collateral
        self._folder = root / FOLDER
        self._kernel = kernel
        self._lock = threading.Lock()  # Gramine keeps one report data for the whole process

    def evidence(self, report_data: bytes) -> Evidence:
        """An SGX quote over ``report_data`` (64 bytes), with stapled collateral.

        Raises:
            UsageError: another length, or the manifest asks for no DCAP attestation.
            FormatError: the quote does not parse, or is over other report data.
            Unavailable: Gramine gives no quote, or the collateral isn't there.
        """
        require_report_data(report_data)
        try:
            self._require_dcap()
            with self._lock:
                write_file(self._kernel, self._folder / "user_report_data", report_data)
                quote = read_file(self._kernel, self._folder / "quote", MAX_EVIDENCE, "quote")
        except OSError as error:
            raise silent(
                "Gramine's quote", error, "Is the quoting service (AESM) running on the host?"
            ) from error
        parsed = Quote.from_bytes(quote)
        require_own(parsed.body.report_data, report_data)
        self._require_this_enclave(parsed)
        return self._collateral.staple_quote(quote)

    def sealing_key(self) -> Secret:
        """The key of exactly this MRENCLAVE on this processor at its present CPUSVN (32 bytes).

        Raises:
            FormatError: what Gramine gives is no such key.
            Unavailable: it gives none.
        """
        try:
            key = read_file(
                self._kernel, self._folder / "keys" / "_sgx_mrenclave", SGX_KEY_SIZE, "sealing key"
            )
        except OSError as error:
            raise silent("Gramine's sealing key", error) from error
        if len(key) != SGX_KEY_SIZE or not any(key):
            raise FormatError(
                "Gramine gave no sealing key",
                code="attester.answer",
                claim="sealing key",
                expected=f"{SGX_KEY_SIZE} B that are not zero",
            )
        return derive_sealing_key(key, "sgx")

    def _require_this_enclave(self, quote: Quote) -> None:
        """Compare with what the processor says: another enclave may have asked with our report data."""
        try:
            target = read_file(self._kernel, self._folder / "my_target_info", TARGET_INFO_SIZE, "target info")
        except OSError as error:
            raise silent("Gramine's target info", error) from error
        body = quote.body
        own = (target[:32], target[32:48])
        if not isinstance(body, SgxReportBody) or (body.mr_enclave, body.attributes) != own:
            raise FormatError(
                "the quote is another enclave's",
                code="attester.answer",
                claim="measurement in the quote",
                expected=target[:32].hex(),
                actual=body.mr_enclave.hex() if isinstance(body, SgxReportBody) else "no enclave",
            )

    def _require_dcap(self) -> None:
        kind = read_file(self._kernel, self._folder / TYPE_FILE, _MAX_TYPE, "attestation type")
        if kind.strip() != b"dcap":
            raise UsageError(
                "Gramine makes no DCAP quotes here",
                code="attester.gramine",
                claim=TYPE_FILE,
                expected="dcap",
                actual=repr(kind)[:40],
                hint='Set sgx.remote_attestation = "dcap" in the manifest',
            )
