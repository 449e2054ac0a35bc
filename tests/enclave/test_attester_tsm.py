"""configfs-tsm: TDX quotes and SEV-SNP reports, races, and what is retried how often."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from cloister.core.evidence.bundle import AmdCollateral
from cloister.enclave.attester.stapled import StapledCollateral
from cloister.enclave.attester.tsm import PAUSES, TsmAttester
from cloister.errors import CloisterError, EvidenceError, FormatError, Unavailable, UsageError
from support.devices import ROOT, SevGuestKernel, TsmKernel, cut
from support.tees import (
    MEASUREMENT,
    MR_TD,
    REPORT_DATA,
    amd,
    amd_collateral,
    shelve,
    snp_report,
    td_quote,
    told,
    verified,
)


def snp_blobs(report_data: bytes, level: int) -> tuple[bytes, bytes]:
    return snp_report(report_data, level), amd().certificate_table()


@pytest.fixture
def tdx() -> TsmKernel:
    return TsmKernel("tdx_guest", td_quote)


@pytest.fixture
def snp() -> TsmKernel:
    return TsmKernel("sev_guest", snp_blobs, floor=0)


class Pauses(list[float]):
    """Stands for `time.sleep`."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shelve(tmp_path)


def attester(kernel: TsmKernel | SevGuestKernel, folder: Path, pauses: Pauses | None = None) -> TsmAttester:
    return TsmAttester(
        StapledCollateral(folder), root=ROOT, kernel=kernel, pause=Pauses() if pauses is None else pauses
    )


def refusal(
    kernel: TsmKernel, folder: Path, kind: type[CloisterError], pauses: Pauses | None = None
) -> CloisterError:
    with pytest.raises(kind) as caught:
        attester(kernel, folder, pauses).evidence(REPORT_DATA)
    assert not kernel.handles
    assert not kernel.reports
    return caught.value


def test_a_tdx_quote_verifies(tdx: TsmKernel, folder: Path) -> None:
    evidence = attester(tdx, folder).evidence(REPORT_DATA)
    result = verified(evidence)
    assert (evidence.tee, result.report_data, result.measurements["mr_td"]) == ("tdx", REPORT_DATA, MR_TD)


def test_an_snp_report_verifies_with_the_hosts_certificates(snp: TsmKernel, folder: Path) -> None:
    evidence = attester(snp, folder).evidence(REPORT_DATA)
    result = verified(evidence)
    assert (evidence.tee, result.report_data) == ("snp", REPORT_DATA)
    assert result.measurements["measurement"] == MEASUREMENT
    assert type(evidence.collateral) is AmdCollateral
    assert evidence.collateral.crl == amd_collateral().crl


def test_every_report_has_a_folder_of_its_own_which_goes(tdx: TsmKernel, folder: Path) -> None:
    tee = attester(tdx, folder)
    for _ in range(3):
        tee.evidence(REPORT_DATA)
    assert len(set(tdx.made)) == 3
    assert not tdx.reports
    assert not tdx.handles


@pytest.mark.parametrize("short", [1, 1000])
def test_short_reads_are_put_together(snp: TsmKernel, folder: Path, short: int) -> None:
    snp.short = short
    assert verified(attester(snp, folder).evidence(REPORT_DATA)).report_data == REPORT_DATA


@pytest.mark.parametrize("floor", [None, 0, 2])
def test_the_lowest_privilege_level_that_is_ours_is_asked_for(folder: Path, floor: int | None) -> None:
    kernel = TsmKernel("sev_guest", snp_blobs, floor=floor)
    result = verified(attester(kernel, folder).evidence(REPORT_DATA))
    assert result.measurements["vmpl"] == (floor or 0)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL, errno.EINTR, errno.EAGAIN])
def test_a_report_that_is_refused_once_is_asked_for_again(
    tdx: TsmKernel, folder: Path, pauses: Pauses, number: int
) -> None:
    tdx.answers = [number]
    assert attester(tdx, folder, pauses).evidence(REPORT_DATA).tee == "tdx"
    assert pauses == [PAUSES[0]]
    assert len(tdx.made) == 2
    assert not tdx.reports


def test_a_busy_device_is_given_up_in_bounds(tdx: TsmKernel, folder: Path, pauses: Pauses) -> None:
    tdx.answers = [errno.EBUSY] * 100
    error = refusal(tdx, folder, Unavailable, pauses)
    assert (error.code, error.actual) == ("attester.refused", "EBUSY")
    assert pauses == list(PAUSES)
    assert len(tdx.made) == len(PAUSES) + 1


def test_a_write_that_the_kernel_dropped_at_close_is_made_again(tdx: TsmKernel, folder: Path) -> None:
    tdx.dropped = 1
    assert attester(tdx, folder).evidence(REPORT_DATA).tee == "tdx"
    tdx.dropped = 100
    assert refusal(tdx, folder, Unavailable).actual == "EINVAL"


def test_a_generation_that_moved_is_made_again(tdx: TsmKernel, folder: Path, pauses: Pauses) -> None:
    tdx.meddled = 2
    assert attester(tdx, folder, pauses).evidence(REPORT_DATA).tee == "tdx"
    assert len(pauses) == 2
    tdx.meddled = 100
    assert refusal(tdx, folder, Unavailable).actual == "EBUSY"


def test_a_name_that_is_taken_is_no_obstacle(tdx: TsmKernel, folder: Path) -> None:
    tdx.failures["mkdir"] = [errno.EEXIST]
    assert attester(tdx, folder).evidence(REPORT_DATA).tee == "tdx"


def test_without_a_driver_that_is_said_at_once(folder: Path, pauses: Pauses) -> None:
    error = refusal(TsmKernel(None, td_quote), folder, Unavailable, pauses)
    assert error.actual == "ENXIO"
    assert "tdx_guest" in error.hint
    assert not pauses


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.ENOMEM])
def test_other_failures_are_not_retried(tdx: TsmKernel, folder: Path, pauses: Pauses, number: int) -> None:
    tdx.answers = [number]
    assert refusal(tdx, folder, Unavailable, pauses).actual == errno.errorcode[number]
    assert not pauses


@pytest.mark.parametrize(
    "call", ["open inblob", "write inblob", "read generation", "read provider", "open auxblob"]
)
def test_the_folder_goes_whatever_fails(snp: TsmKernel, folder: Path, call: str) -> None:
    snp.failures[call] = [errno.EPERM]
    assert refusal(snp, folder, Unavailable).actual == "EPERM"


def test_a_folder_that_does_not_go_hides_nothing(tdx: TsmKernel, folder: Path) -> None:
    tdx.failures["rmdir"] = [errno.EBUSY]
    assert attester(tdx, folder).evidence(REPORT_DATA).tee == "tdx"


def test_an_unknown_provider_is_named(folder: Path) -> None:
    error = refusal(TsmKernel("arm_cca_guest", td_quote), folder, UsageError)
    assert (*told(error), error.actual) == ("attester.provider", "provider", "arm_cca_guest")


def test_a_report_that_is_larger_than_the_kernel_takes(folder: Path) -> None:
    kernel = TsmKernel("tdx_guest", lambda *_: (bytes((32 << 10) + 1), b""))
    error = refusal(kernel, folder, Unavailable)
    assert error.actual == "EFBIG"
    assert "larger" in error.hint


def test_an_oversized_report_is_cut_off(folder: Path) -> None:
    kernel = TsmKernel("tdx_guest", lambda *_: (bytes((16 << 10) + 1), b""))
    assert told(refusal(kernel, folder, FormatError)) == ("attester.answer", "report")


def test_an_oversized_certificate_table_is_cut_off(folder: Path) -> None:
    kernel = TsmKernel("sev_guest", lambda data, level: (snp_report(data, level), bytes(0x4001)), floor=0)
    assert told(refusal(kernel, folder, FormatError)) == ("attester.answer", "certificate table")


@pytest.mark.parametrize("text", [b"", b"-1\n", b"one\n", b"\xb2\n"])
def test_a_generation_that_is_no_number_is_refused(tdx: TsmKernel, folder: Path, text: bytes) -> None:
    load = tdx.load
    tdx.load = lambda path: text if path.endswith("generation") else load(path)  # type: ignore[method-assign]
    assert told(refusal(tdx, folder, FormatError)) == ("attester.answer", "generation")


def test_evidence_over_other_report_data_is_refused(folder: Path) -> None:
    for kernel in (
        TsmKernel("tdx_guest", lambda *_: td_quote(bytes(64))),
        TsmKernel("sev_guest", lambda *_: (snp_report(bytes(64)), b""), floor=0),
    ):
        assert told(refusal(kernel, folder, FormatError)) == ("attester.answer", "report data")


def test_a_truncated_report_is_refused(folder: Path) -> None:
    kernel = TsmKernel("sev_guest", lambda data, level: (cut(snp_report(data, level)), b""), floor=0)
    refusal(kernel, folder, EvidenceError)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_of_another_length_is_refused(tdx: TsmKernel, folder: Path, size: int) -> None:
    with pytest.raises(UsageError) as caught:
        attester(tdx, folder).evidence(bytes(size))
    assert caught.value.code == "attester.report-data"
    assert not tdx.made


def test_tdx_has_no_sealing_key_and_says_what_to_do(tdx: TsmKernel, folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        attester(tdx, folder).sealing_key()
    assert told(caught.value) == ("attester.sealing-key", "sealing key")
    assert "custodians" in caught.value.hint
    assert not tdx.reports


class SnpGuest(TsmKernel):
    """A guest with both devices."""

    def __init__(self) -> None:
        super().__init__("sev_guest", snp_blobs, floor=0)
        self.device = SevGuestKernel(snp_report)
        self.device.handles = self.handles

    def exists(self, path: str) -> bool:
        return super().exists(path) or self.device.exists(path)

    def load(self, path: str) -> bytes:
        return self.device.load(path) if path.endswith("/vmpl") else super().load(path)

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> None:
        self.device.ioctl(descriptor, request, argument)


def test_an_snp_guests_sealing_key_comes_from_its_device(folder: Path) -> None:
    kernel = SnpGuest()
    assert len(attester(kernel, folder).sealing_key()) == 32
    assert kernel.device.codes == [0xC0205301]
    assert not kernel.reports
