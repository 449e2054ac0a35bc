"""/dev/sev-guest: plain and extended reports, derived keys, and the errors of firmware and hypervisor."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path

import pytest

from cloister.core.evidence.bundle import AmdCollateral
from cloister.enclave.attester.sev_guest import (
    KEY_FIELDS,
    SNP_GET_DERIVED_KEY,
    SNP_GET_EXT_REPORT,
    SNP_GET_REPORT,
    SevGuestAttester,
)
from cloister.enclave.attester.stapled import StapledCollateral
from cloister.errors import CloisterError, EvidenceError, FormatError, Unavailable, UsageError
from support.devices import ROOT, SevGuestKernel
from support.tees import (
    MEASUREMENT,
    REPORT_DATA,
    amd,
    amd_collateral,
    shelve,
    snp_report,
    told,
    verified,
)


@pytest.fixture
def kernel() -> SevGuestKernel:
    return SevGuestKernel(snp_report, table=amd().certificate_table())


@pytest.fixture
def attester(kernel: SevGuestKernel, tmp_path: Path) -> SevGuestAttester:
    return SevGuestAttester(StapledCollateral(shelve(tmp_path)), root=ROOT, kernel=kernel)


def refusal(attester: SevGuestAttester, kind: type[CloisterError]) -> CloisterError:
    with pytest.raises(kind) as caught:
        attester.evidence(REPORT_DATA)
    return caught.value


def test_an_extended_report_verifies(attester: SevGuestAttester, kernel: SevGuestKernel) -> None:
    evidence = attester.evidence(REPORT_DATA)
    result = verified(evidence)
    assert (evidence.tee, result.report_data) == ("snp", REPORT_DATA)
    assert result.measurements["measurement"] == MEASUREMENT
    assert kernel.codes == [SNP_GET_EXT_REPORT]
    assert not kernel.handles
    assert not attester.simulated


def test_without_certificates_of_the_host_the_folder_has_them(
    attester: SevGuestAttester, kernel: SevGuestKernel
) -> None:
    kernel.table = b""
    evidence = attester.evidence(REPORT_DATA)
    assert type(evidence.collateral) is AmdCollateral
    assert evidence.collateral == amd_collateral()


def test_more_certificates_than_the_driver_takes_lead_to_a_plain_report(
    attester: SevGuestAttester, kernel: SevGuestKernel
) -> None:
    kernel.table = bytes(0x4001)
    assert verified(attester.evidence(REPORT_DATA)).report_data == REPORT_DATA
    assert kernel.codes == [SNP_GET_EXT_REPORT, SNP_GET_REPORT]
    assert not kernel.handles


@pytest.mark.parametrize(("text", "level"), [(None, 0), (b"0\n", 0), (b"2\n", 2), (b"3", 3)])
def test_the_guests_own_privilege_level_is_asked_for(
    attester: SevGuestAttester, kernel: SevGuestKernel, text: bytes | None, level: int
) -> None:
    kernel.level = text
    assert verified(attester.evidence(REPORT_DATA)).measurements["vmpl"] == level
    attester.sealing_key()
    assert kernel.key_requests[0][3] == level


@pytest.mark.parametrize("text", [b"", b"4\n", b"-1\n", b"zero"])
def test_a_privilege_level_that_is_none_is_refused(
    attester: SevGuestAttester, kernel: SevGuestKernel, text: bytes
) -> None:
    kernel.level = text
    assert told(refusal(attester, FormatError)) == ("attester.answer", "VMPL")
    assert not kernel.codes


def test_a_privilege_level_that_can_not_be_read(attester: SevGuestAttester, kernel: SevGuestKernel) -> None:
    kernel.failures["read vmpl"] = [errno.EIO]
    assert refusal(attester, Unavailable).actual == "EIO"


def test_a_device_that_is_not_there(attester: SevGuestAttester, kernel: SevGuestKernel) -> None:
    kernel.failures["open sev-guest"] = [errno.EACCES]
    assert refusal(attester, Unavailable).actual == "EACCES"


@pytest.mark.parametrize(
    ("number", "firmware", "hypervisor"), [(errno.EIO, 0x16, 0), (errno.EIO, 0, 2), (errno.EBADMSG, 0, 0)]
)
def test_an_error_is_told_with_the_firmwares_and_the_hypervisors_number(
    attester: SevGuestAttester, kernel: SevGuestKernel, number: int, firmware: int, hypervisor: int
) -> None:
    kernel.broken = (number, firmware, hypervisor)
    error = refusal(attester, Unavailable)
    assert error.actual == errno.errorcode[number]
    assert f"Firmware error {firmware:#x}, hypervisor error {hypervisor:#x}" in error.hint
    assert kernel.codes == [SNP_GET_EXT_REPORT]
    assert refusal(attester, Unavailable).actual == "ENOTTY"  # the driver has forgotten its key
    assert not kernel.handles


def test_a_status_of_the_firmware_is_no_report(attester: SevGuestAttester, kernel: SevGuestKernel) -> None:
    kernel.status = 0x16
    assert told(refusal(attester, Unavailable)) == ("attester.refused", "status")


@pytest.mark.parametrize("size", [0, 1183, 1185, 4000])
def test_a_report_of_another_length_is_refused(
    attester: SevGuestAttester, kernel: SevGuestKernel, size: int
) -> None:
    kernel.size = size
    assert told(refusal(attester, FormatError)) == ("attester.answer", "size")


def test_a_report_over_other_report_data_is_refused(
    attester: SevGuestAttester, kernel: SevGuestKernel
) -> None:
    kernel.make = lambda *_: snp_report(bytes(64))
    assert told(refusal(attester, FormatError)) == ("attester.answer", "report data")


def test_what_is_no_report_is_refused(attester: SevGuestAttester, kernel: SevGuestKernel) -> None:
    kernel.make = lambda *_: b"\xff" * 1184
    refusal(attester, EvidenceError)


def test_report_data_of_another_length_is_refused(attester: SevGuestAttester, kernel: SevGuestKernel) -> None:
    with pytest.raises(UsageError) as caught:
        attester.evidence(bytes(63))
    assert caught.value.code == "attester.report-data"
    assert not kernel.codes


def test_a_derived_key_is_bound_to_measurement_and_policy(
    attester: SevGuestAttester, kernel: SevGuestKernel
) -> None:
    key = attester.sealing_key()
    assert len(key) == 32
    assert kernel.codes == [SNP_GET_DERIVED_KEY]
    # Root key VCEK; fields policy, image id, family id, measurement; VMPL 0; no SVN or TCB mixed in.
    assert kernel.key_requests == [(0, 0, 0b1111, 0, 0, 0)]
    assert KEY_FIELDS == 0b1111
    kernel.key = b"K" * 32
    assert attester.sealing_key() != key


def test_the_firmwares_key_is_wiped_and_never_used_as_it_is(
    attester: SevGuestAttester, kernel: SevGuestKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiped = []
    clear = ctypes.memset
    monkeypatch.setattr(ctypes, "memset", lambda memory, *rest: (wiped.append(memory), clear(memory, *rest)))
    assert kernel.key not in attester.sealing_key().reveal()
    assert [ctypes.string_at(memory, 64) for memory in wiped] == [bytes(64)]


def test_no_key_is_no_key(attester: SevGuestAttester, kernel: SevGuestKernel) -> None:
    kernel.key = bytes(32)
    with pytest.raises(FormatError):
        attester.sealing_key()
    kernel.status = 1
    with pytest.raises(Unavailable):
        attester.sealing_key()


@pytest.mark.skipif(not Path("/usr/include/linux/sev-guest.h").is_file(), reason="no kernel headers here")
def test_the_numbers_are_those_of_the_kernels_header() -> None:
    text = Path("/usr/include/linux/sev-guest.h").read_text()
    for number, name in ((0, "SNP_GET_REPORT"), (1, "SNP_GET_DERIVED_KEY"), (2, "SNP_GET_EXT_REPORT")):
        assert (
            f"#define {name} _IOWR(SNP_GUEST_REQ_IOC_TYPE, {number:#x}, struct snp_guest_request_ioctl)"
            in text
        )
        expected = 3 << 30 | 32 << 16 | ord("S") << 8 | number
        assert {SNP_GET_REPORT, SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT} >= {expected}
