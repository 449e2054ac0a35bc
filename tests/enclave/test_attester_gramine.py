"""Gramine on SGX: a quote over the report data, the key of this MRENCLAVE, and how each fails."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from cloister.core.secret import Secret
from cloister.enclave.attester.gramine import GramineAttester
from cloister.enclave.attester.stapled import StapledCollateral
from cloister.errors import CloisterError, EvidenceError, FormatError, Unavailable, UsageError
from support.devices import ROOT, GramineKernel
from support.tees import MR_ENCLAVE, REPORT_DATA, sgx_quote, shelve, told, verified


@pytest.fixture
def kernel() -> GramineKernel:
    return GramineKernel(sgx_quote)


@pytest.fixture
def attester(kernel: GramineKernel, tmp_path: Path) -> GramineAttester:
    return GramineAttester(StapledCollateral(shelve(tmp_path)), root=ROOT, kernel=kernel)


def refusal(
    attester: GramineAttester, kind: type[CloisterError], report_data: bytes = REPORT_DATA
) -> CloisterError:
    with pytest.raises(kind) as caught:
        attester.evidence(report_data)
    return caught.value


def test_a_quote_over_the_report_data_verifies(attester: GramineAttester, kernel: GramineKernel) -> None:
    evidence = attester.evidence(REPORT_DATA)
    result = verified(evidence)
    assert (evidence.tee, result.report_data) == ("sgx", REPORT_DATA)
    assert result.measurements["mr_enclave"] == MR_ENCLAVE
    assert not attester.simulated
    assert not kernel.handles


@pytest.mark.parametrize("short", [1, 7, 4095])
def test_a_quote_that_comes_in_pieces_is_put_together(
    attester: GramineAttester, kernel: GramineKernel, short: int
) -> None:
    kernel.short = short
    assert verified(attester.evidence(REPORT_DATA)).report_data == REPORT_DATA


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_of_another_length_is_refused_before_anything_is_asked(
    attester: GramineAttester, kernel: GramineKernel, size: int
) -> None:
    assert refusal(attester, UsageError, bytes(size)).code == "attester.report-data"
    assert kernel.report_data == bytes(64)


@pytest.mark.parametrize("kind", [b"none", b"epid", b"", b"dcap!"])
def test_a_manifest_without_dcap_is_named(
    attester: GramineAttester, kernel: GramineKernel, kind: bytes
) -> None:
    kernel.kind = kind
    error = refusal(attester, UsageError)
    assert told(error) == ("attester.gramine", "attestation_type")
    assert "sgx.remote_attestation" in error.hint


def test_without_sgx_there_are_no_files(attester: GramineAttester, kernel: GramineKernel) -> None:
    kernel.failures["open"] = [errno.ENOENT]
    assert refusal(attester, Unavailable).actual == "ENOENT"


@pytest.mark.parametrize(
    "call", ["open quote", "read quote", "write user_report_data", "read attestation_type"]
)
def test_each_failing_call_is_told_and_leaves_nothing_open(
    attester: GramineAttester, kernel: GramineKernel, call: str
) -> None:
    kernel.failures[call] = [errno.EACCES]
    error = refusal(attester, Unavailable)
    assert (error.code, error.actual) == ("attester.refused", "EACCES")
    assert "AESM" in error.hint
    assert not kernel.handles
    assert attester.evidence(REPORT_DATA).tee == "sgx"


def test_report_data_that_is_taken_in_part_is_an_error(
    attester: GramineAttester, kernel: GramineKernel
) -> None:
    kernel.taken = 32
    assert refusal(attester, Unavailable).actual == "EIO"


def test_an_oversized_quote_is_cut_off(attester: GramineAttester, kernel: GramineKernel) -> None:
    kernel.quote = lambda data: sgx_quote(data).ljust((16 << 10) + 1, b"\0")
    assert told(refusal(attester, FormatError)) == ("attester.answer", "quote")


def test_a_quote_over_other_report_data_is_refused(attester: GramineAttester, kernel: GramineKernel) -> None:
    kernel.quote = lambda _: sgx_quote(bytes(64))
    assert told(refusal(attester, FormatError)) == ("attester.answer", "report data")


@pytest.mark.parametrize("quote", [b"", b"no quote", bytes(2000)])
def test_what_is_no_quote_is_refused(attester: GramineAttester, kernel: GramineKernel, quote: bytes) -> None:
    kernel.quote = lambda _: quote
    refusal(attester, EvidenceError)


def test_the_sealing_key_is_derived_from_the_mrenclave_key(
    attester: GramineAttester, kernel: GramineKernel
) -> None:
    key = attester.sealing_key()
    assert len(key) == 32
    assert key == attester.sealing_key()
    assert kernel.key not in key.reveal()
    kernel.key = bytes(range(1, 17))
    assert key != attester.sealing_key()


def test_the_derivation_never_changes(attester: GramineAttester) -> None:
    # HKDF-SHA256 of 00 01 ... 0f without salt, computed with HMAC alone (RFC 5869).
    expected = "7c2a642d88deacab2f07c56b3eff65eacd6999f998eb6691085ee482aea764f7"
    assert attester.sealing_key() == Secret(bytes.fromhex(expected))


@pytest.mark.parametrize("key", [b"", bytes(15), bytes(16), b"k" * 17])
def test_what_is_no_sealing_key_is_refused(
    attester: GramineAttester, kernel: GramineKernel, key: bytes
) -> None:
    kernel.key = key
    with pytest.raises(FormatError) as caught:
        attester.sealing_key()
    assert told(caught.value) == ("attester.answer", "sealing key")
    assert key.hex() not in str(caught.value) or not any(key)


def test_a_sealing_key_that_gramine_refuses_is_unavailable(
    attester: GramineAttester, kernel: GramineKernel
) -> None:
    kernel.failures["open _sgx_mrenclave"] = [errno.ENOENT]
    with pytest.raises(Unavailable) as caught:
        attester.sealing_key()
    assert caught.value.actual == "ENOENT"


@pytest.mark.parametrize("part", [slice(0, 32), slice(32, 48)])
def test_a_quote_that_another_enclave_asked_for(
    attester: GramineAttester, kernel: GramineKernel, part: slice
) -> None:
    """The quoting service is the host's: with our report data it may quote whom it likes."""
    own = bytearray(kernel.target_info())
    own[part] = bytes(len(own[part]))
    kernel.target = bytes(own)
    assert told(refusal(attester, FormatError)) == ("attester.answer", "measurement in the quote")


def test_a_processor_that_says_nothing_of_this_enclave(
    attester: GramineAttester, kernel: GramineKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> bytes:
        raise OSError(errno.ENOENT, "gone")

    monkeypatch.setattr(kernel, "target_info", gone)
    assert refusal(attester, Unavailable).code
