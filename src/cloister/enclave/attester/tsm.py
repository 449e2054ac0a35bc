"""Evidence from a TDX or SEV-SNP guest, through configfs-tsm (Linux 6.7 and later).

One report is one folder below ``/sys/kernel/config/tsm/report`` (Linux, ``Documentation/ABI/testing/
configfs-tsm-report``): write ``inblob``, read ``outblob`` and, for SEV-SNP, the host's certificate table from
``auxblob``. ``generation`` counts the writes; where it isn't what was written here, somebody else wrote too,
or the kernel dropped a write when the file was closed, and then it starts again with a new folder.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from cloister.core.evidence.bundle import MAX_EVIDENCE, Evidence
from cloister.core.evidence.dcap import Quote
from cloister.core.evidence.snp import SnpReport
from cloister.core.secret import Secret
from cloister.enclave.attester.device import (
    LINUX,
    Kernel,
    no_sealing_key,
    read_file,
    require_own,
    require_report_data,
    silent,
    write_file,
)
from cloister.enclave.attester.sev_guest import MAX_CERTIFICATES, derived_key
from cloister.enclave.attester.stapled import StapledCollateral
from cloister.errors import FormatError, UsageError

FOLDER: Final = Path("sys/kernel/config/tsm/report")
PAUSES: Final = (0.05, 0.1, 0.2, 0.5, 1.0)  # seconds between attempts
TDX: Final = "tdx_guest"
SNP: Final = "sev_guest"

_MAX_ATTRIBUTE: Final = 4096  # bytes; a page, as for every text attribute
# EINVAL: a write of ``inblob`` that the kernel dropped leaves none, and the read then says so.
_PASSING: Final = frozenset({errno.EBUSY, errno.EINVAL, errno.EINTR, errno.EAGAIN, errno.EEXIST})
_HINTS: Final = {
    errno.ENXIO: "No driver serves it: load tdx_guest or sev-guest",
    errno.EFBIG: "The platform's report is larger than this kernel takes",
}
_T = TypeVar("_T")


class TsmAttester:
    """This confidential virtual machine."""

    simulated: bool = False

    def __init__(
        self,
        collateral: StapledCollateral,
        *,
        root: Path = Path("/"),
        kernel: Kernel = LINUX,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Make an attester; nothing is opened before it is asked."""
        self._collateral = collateral
        self._root = root
        self._kernel = kernel
        self._pause = pause

    def evidence(self, report_data: bytes) -> Evidence:
        """A TDX quote or SEV-SNP report over ``report_data`` (64 bytes), with collateral.

        Raises:
            UsageError: another length, or a provider of reports that Cloister doesn't know.
            FormatError: the report does not parse, or is over other report data.
            Unavailable: the kernel gives none after several attempts, or the collateral isn't there.
        """
        require_report_data(report_data)
        provider, report, table = self._persist(lambda folder: self._report(folder, report_data))
        if provider == TDX:
            require_own(Quote.from_bytes(report).body.report_data, report_data)
            return self._collateral.staple_quote(report)
        require_own(SnpReport.from_bytes(report).report_data, report_data)
        return self._collateral.staple_report(report, table)

    def sealing_key(self) -> Secret:
        """The key of exactly this measurement: SEV-SNP's, through ``/dev/sev-guest``; TDX has none.

        Raises:
            UsageError: this is TDX.
            FormatError: the firmware's answer is no key.
            Unavailable: the kernel gives none.
        """
        if self._persist(self._provider) == SNP:
            return derived_key(self._kernel, self._root)
        raise no_sealing_key("TDX")

    def _persist(self, ask: Callable[[Path], _T]) -> _T:
        """Ask with a folder of its own, several times where the failure may pass."""
        pauses = iter(PAUSES)
        while True:
            try:
                return self._ask(ask)
            except OSError as error:
                pause = next(pauses, None)
                if error.errno not in _PASSING or pause is None:
                    raise silent("configfs-tsm", error, _HINTS.get(error.errno or 0, "")) from error
            self._pause(pause)

    def _ask(self, ask: Callable[[Path], _T]) -> _T:
        folder = self._root / FOLDER / f"cloister-{secrets.token_hex(8)}"
        self._kernel.mkdir(folder)
        try:
            return ask(folder)
        finally:
            with contextlib.suppress(OSError):  # nothing else can be done, and it says nothing of the report
                self._kernel.rmdir(folder)

    def _report(self, folder: Path, report_data: bytes) -> tuple[str, bytes, bytes]:
        """Provider, report and certificate table; raises OSError."""
        provider = self._provider(folder)
        generation = self._number(folder, "generation")
        floor = self._floor(folder)
        if floor:  # a lower level belongs to somebody else, for example a paravisor
            write_file(self._kernel, folder / "privlevel", str(floor).encode())
        write_file(self._kernel, folder / "inblob", report_data)
        report = read_file(self._kernel, folder / "outblob", MAX_EVIDENCE, "report")
        table = b""
        if provider == SNP:
            table = read_file(self._kernel, folder / "auxblob", MAX_CERTIFICATES, "certificate table")
        if self._number(folder, "generation") != generation + (2 if floor else 1):
            raise OSError(errno.EBUSY, "the report's generation moved")
        return provider, report, table

    def _provider(self, folder: Path) -> str:
        name = self._text(folder, "provider")
        if name not in (TDX, SNP):
            raise UsageError(
                "configfs-tsm is served by something that Cloister doesn't know",
                code="attester.provider",
                claim="provider",
                expected=f"{TDX} or {SNP}",
                actual=name[:40],
            )
        return name

    def _floor(self, folder: Path) -> int:
        """The least privilege level that may be asked for; 0 where the provider has no such levels."""
        try:
            return self._number(folder, "privlevel_floor")
        except FileNotFoundError:
            return 0

    def _number(self, folder: Path, name: str) -> int:
        text = self._text(folder, name)
        if not (text.isascii() and text.isdigit()):
            raise FormatError(
                "configfs-tsm gave no number", code="attester.answer", claim=name, actual=repr(text)[:40]
            )
        return int(text)

    def _text(self, folder: Path, name: str) -> str:
        return read_file(self._kernel, folder / name, _MAX_ATTRIBUTE, name).decode("latin-1").strip()
