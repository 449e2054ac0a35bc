"""/dev/nsm: an attestation document with the report data as its user data, and every other answer."""

from __future__ import annotations

import errno
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.enclave.attester.nsm import MAX_RESPONSE, NsmAttester
from cloister.errors import CloisterError, FormatError, Unavailable, UsageError
from support.devices import ROOT, NsmKernel
from support.tees import REPORT_DATA, nitro_document, told, verified


@pytest.fixture
def kernel() -> NsmKernel:
    return NsmKernel(nitro_document)


@pytest.fixture
def attester(kernel: NsmKernel) -> NsmAttester:
    return NsmAttester(root=ROOT, kernel=kernel)


def refusal(attester: NsmAttester, kind: type[CloisterError]) -> CloisterError:
    with pytest.raises(kind) as caught:
        attester.evidence(REPORT_DATA)
    return caught.value


def test_a_document_verifies_and_needs_no_collateral(attester: NsmAttester, kernel: NsmKernel) -> None:
    evidence = attester.evidence(REPORT_DATA)
    assert (evidence.tee, evidence.collateral) == ("nitro", None)
    assert verified(evidence).report_data == REPORT_DATA
    assert kernel.requests == [{"Attestation": {"user_data": REPORT_DATA, "nonce": None, "public_key": None}}]
    assert not kernel.handles
    assert not attester.simulated


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBUSY, errno.ETIMEDOUT, errno.ENODATA])
def test_a_failing_device_is_told(attester: NsmAttester, kernel: NsmKernel, number: int) -> None:
    kernel.failures["ioctl"] = [number]
    assert refusal(attester, Unavailable).actual == errno.errorcode[number]
    assert not kernel.handles


def test_a_device_that_is_not_there(attester: NsmAttester, kernel: NsmKernel) -> None:
    kernel.failures["open"] = [errno.ENOENT]
    assert refusal(attester, Unavailable).code == "attester.refused"


@pytest.mark.parametrize("name", ["InvalidArgument", "InternalError", "x" * 500])
def test_the_modules_own_errors_are_told(attester: NsmAttester, kernel: NsmKernel, name: str) -> None:
    kernel.answer = {"Error": name}
    error = refusal(attester, Unavailable)
    assert error.code == "attester.refused"
    assert name[:80] in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    "answer",
    [
        {"Attestation": {}},
        {"Attestation": {"document": "text"}},
        {"Attestation": {"document": b"", "more": 1}},
        {"Attestation": {"document": b"x"}, "Error": None},
        {"DescribeNSM": {}},
        {"Error": 7},
        "Attestation",
        [1],
        7,
    ],
)
def test_another_answer_is_refused(attester: NsmAttester, kernel: NsmKernel, answer: Any) -> None:
    kernel.answer = answer
    assert refusal(attester, FormatError).code in ("attester.answer", "evidence.format", "format.cbor")


def test_a_document_over_other_user_data_is_refused(attester: NsmAttester, kernel: NsmKernel) -> None:
    kernel.document = lambda _: nitro_document(bytes(64))
    assert told(refusal(attester, FormatError)) == ("attester.answer", "report data")


def test_an_answer_that_the_driver_cut_is_refused(attester: NsmAttester, kernel: NsmKernel) -> None:
    kernel.document = lambda _: bytes(MAX_RESPONSE)
    assert refusal(attester, FormatError).code == "format.cbor"


@pytest.mark.parametrize("length", [0, MAX_RESPONSE + 1, 1 << 63])
def test_an_impossible_length_is_refused(attester: NsmAttester, kernel: NsmKernel, length: int) -> None:
    kernel.length = length
    assert told(refusal(attester, FormatError)) == ("attester.answer", "length of the answer")


@given(raw=st.binary(min_size=1, max_size=200))
def test_any_bytes_give_our_error(raw: bytes) -> None:
    kernel = NsmKernel(nitro_document, raw=raw)
    with pytest.raises(CloisterError):
        NsmAttester(root=ROOT, kernel=kernel).evidence(REPORT_DATA)


@given(document=st.binary(max_size=300))
def test_any_document_gives_our_error(document: bytes) -> None:
    kernel = NsmKernel(nitro_document, raw=cbor2.dumps({"Attestation": {"document": document}}))
    with pytest.raises(FormatError):
        NsmAttester(root=ROOT, kernel=kernel).evidence(REPORT_DATA)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_of_another_length_is_refused(
    attester: NsmAttester, kernel: NsmKernel, size: int
) -> None:
    with pytest.raises(UsageError) as caught:
        attester.evidence(bytes(size))
    assert caught.value.code == "attester.report-data"
    assert not kernel.requests


def test_nitro_has_no_sealing_key_and_says_what_to_do(attester: NsmAttester) -> None:
    with pytest.raises(UsageError) as caught:
        attester.sealing_key()
    assert told(caught.value) == ("attester.sealing-key", "sealing key")
    assert "SEV-SNP" in caught.value.hint
