"""Which attester serves a machine: by name, or by what is there, in a documented order."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from pathlib import Path

import pytest

from cloister.enclave.attester import open_attester
from cloister.enclave.attester.device import LINUX, Buffer, opened, read_file, silent, write_file
from cloister.enclave.attester.gramine import GramineAttester
from cloister.enclave.attester.nsm import NsmAttester
from cloister.enclave.attester.sev_guest import SevGuestAttester
from cloister.enclave.attester.simulated import SimulatedAttester
from cloister.enclave.attester.tsm import TsmAttester
from cloister.errors import FormatError, Unavailable, UsageError
from support.tees import REPORT_DATA, told, write

DEVICES = {
    "gramine": ("dev/attestation/attestation_type", GramineAttester),
    "nsm": ("dev/nsm", NsmAttester),
    "sev-guest": ("dev/sev-guest", SevGuestAttester),
    "tsm": ("sys/kernel/config/tsm/report/x", TsmAttester),
}


@pytest.mark.parametrize("name", DEVICES)
def test_the_device_that_is_there_is_used(tmp_path: Path, name: str) -> None:
    path, kind = DEVICES[name]
    write(tmp_path / path, b"")
    assert type(open_attester({}, root=tmp_path)) is kind


@pytest.mark.parametrize("name", DEVICES)
def test_a_named_one_is_used_whatever_else_is_there(tmp_path: Path, name: str) -> None:
    for path, _ in DEVICES.values():
        write(tmp_path / path, b"")
    assert type(open_attester({"CLOISTER_ATTESTER": name}, root=tmp_path)) is DEVICES[name][1]


def test_the_order_is_the_documented_one(tmp_path: Path) -> None:
    for path, _ in DEVICES.values():
        write(tmp_path / path, b"")
    for path, kind in DEVICES.values():
        assert type(open_attester({}, root=tmp_path)) is kind
        place = (tmp_path / path).parent if kind is TsmAttester else tmp_path / path
        (place / "x").unlink() if kind is TsmAttester else place.unlink()


def test_the_simulated_device_comes_first_and_only_where_it_is_meant(tmp_path: Path) -> None:
    write(tmp_path / "dev/nsm", b"")
    here, there = socket.socketpair()
    with here:
        descriptor = str(there.detach())
        assert (
            type(open_attester({"CLOISTER_TEE_FD": descriptor, "CLOISTER_ATTESTER": "nsm"}, root=tmp_path))
            is NsmAttester
        )
        attester = open_attester({"CLOISTER_TEE_FD": descriptor}, root=tmp_path)
        assert type(attester) is SimulatedAttester
        assert attester.simulated
        attester.close()


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        open_attester({"CLOISTER_ATTESTER": "tpm"}, root=tmp_path)
    assert told(caught.value) == ("attester.kind", "CLOISTER_ATTESTER")
    assert "gramine" in caught.value.expected


def test_without_a_tee_everything_that_was_looked_for_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        open_attester({}, root=tmp_path)
    assert told(caught.value) == ("attester.none", "TEE device")
    for path in (
        "dev/attestation/attestation_type",
        "dev/nsm",
        "dev/sev-guest",
        "sys/kernel/config/tsm/report",
    ):
        assert str(tmp_path / path) in caught.value.expected
    with pytest.raises(UsageError) as caught:
        open_attester({"CLOISTER_ATTESTER": "simulated"}, root=tmp_path)
    assert caught.value.expected == "the simulated device (CLOISTER_TEE_FD)"


def test_the_collateral_folder_comes_from_the_environment(tmp_path: Path) -> None:
    from support.tees import sgx_quote

    attester = open_attester(
        {"CLOISTER_ATTESTER": "gramine", "CLOISTER_COLLATERAL": str(tmp_path)}, root=tmp_path
    )
    quote = sgx_quote()
    for name, content in (
        ("attestation_type", b"dcap"),
        ("user_report_data", b""),
        ("my_target_info", (quote[112:144] + quote[96:112]).ljust(512, b"\0")),
        ("quote", quote),
    ):
        write(tmp_path / "dev/attestation" / name, content)
    with pytest.raises(Unavailable) as caught:
        attester.evidence(REPORT_DATA)
    assert str(tmp_path) in caught.value.hint


class TestLinux:
    """The real system calls, on plain files."""

    def test_files_are_read_and_written_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        write_file(LINUX, path, b"x" * 10_000)
        assert read_file(LINUX, path, 10_000, "file") == b"x" * 10_000
        with pytest.raises(FormatError):
            read_file(LINUX, path, 9_999, "file")

    def test_descriptors_are_not_inherited(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        with opened(LINUX, path, os.O_RDONLY) as descriptor:
            assert not os.get_inheritable(descriptor)

    def test_folders_are_for_this_user_alone(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        LINUX.mkdir(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        LINUX.rmdir(folder)
        assert not folder.exists()

    def test_an_ioctl_reaches_the_device(self) -> None:
        here, there = socket.socketpair()
        with here, there:
            here.send(b"seven B")
            argument = bytearray(4)
            LINUX.ioctl(there.fileno(), 0x541B, argument)  # FIONREAD
            assert int.from_bytes(argument, "little") == 7
            with pytest.raises(OSError) as caught:
                LINUX.ioctl(there.fileno(), 0xC0205300, bytearray(32))
            assert caught.value.errno in (errno.ENOTTY, errno.EINVAL)


def test_a_buffer_holds_what_it_was_given_and_can_be_wiped() -> None:
    buffer = Buffer(4, b"\0ab\0")
    assert buffer.content(100) == b"\0ab\0"
    assert ctypes.string_at(buffer.address, 4) == b"\0ab\0"
    buffer.wipe()
    assert buffer.content(4) == bytes(4)


def test_an_error_without_a_number_is_told_too() -> None:
    assert silent("the device", OSError("?")).actual == "unknown error"
