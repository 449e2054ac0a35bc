"""Evidence with collateral, as it travels."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.core import encoding
from cloister.core.evidence import Collateral, Evidence
from cloister.core.evidence.bundle import MAX_COLLATERAL_PART, AmdCollateral
from cloister.errors import EvidenceError

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "dcap"
COLLATERAL = Collateral(
    pck_crl_issuer_chain=b"chain",
    root_ca_crl=b"\x01\x02",
    pck_crl=b"\x03",
    tcb_info_issuer_chain=b"chain",
    tcb_info=b'{"a": 1}',
    tcb_info_signature=b"s" * 64,
    qe_identity_issuer_chain=b"chain",
    qe_identity=b"{}",
    qe_identity_signature=b"t" * 64,
)
EVIDENCE = Evidence(tee="sgx", quote=b"quote", collateral=COLLATERAL)


def test_round_trip():
    raw = encoding.encode(EVIDENCE.to_data())
    assert Evidence.from_data(encoding.decode(raw, what="evidence")) == EVIDENCE


def test_json_round_trip():
    assert Collateral.from_json(COLLATERAL.to_json()) == COLLATERAL


def test_real_collateral_keeps_the_exact_text():
    if not VECTORS.is_dir():
        pytest.skip("real attestation evidence (../shared/vectors/dcap) is not on this machine")
    text = (VECTORS / "sgx-v3-config-swhardening" / "collateral.json").read_text()
    collateral = Collateral.from_json(text)
    assert collateral.tcb_info == json.loads(text)["tcb_info"].encode()
    assert Collateral.from_json(collateral.to_json()) == collateral


@pytest.mark.parametrize("name", list(COLLATERAL.to_data()))
@pytest.mark.parametrize("value", [b"", None, "text", 1, bytes(MAX_COLLATERAL_PART + 1)])
def test_collateral_part_that_is_wrong(name, value):
    with pytest.raises(EvidenceError) as caught:
        Collateral.from_data(COLLATERAL.to_data() | {name: value})
    assert caught.value.claim == name


@pytest.mark.parametrize("name", ["tcb_info_signature", "qe_identity_signature"])
def test_signature_of_another_length(name):
    with pytest.raises(EvidenceError):
        replace(COLLATERAL, **{name: b"s" * 63})


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        EVIDENCE.to_data() | {"more": 1},
        EVIDENCE.to_data() | {"tee": "snp"},
        EVIDENCE.to_data() | {"tee": "nitro"},
        EVIDENCE.to_data() | {"tee": "sev"},
        EVIDENCE.to_data() | {"tee": ["sgx"]},
        EVIDENCE.to_data() | {"quote": b""},
        EVIDENCE.to_data() | {"quote": "text"},
        EVIDENCE.to_data() | {"quote": bytes(20000)},
        EVIDENCE.to_data() | {"collateral": None},
        EVIDENCE.to_data() | {"collateral": {**COLLATERAL.to_data(), "more": b"x"}},
    ],
)
def test_data_that_is_no_evidence(data):
    with pytest.raises(EvidenceError):
        Evidence.from_data(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100000,
        "1" * 5000,
        json.dumps(json.loads(COLLATERAL.to_json()) | {"pck_crl": "zz"}),
        json.dumps(json.loads(COLLATERAL.to_json()) | {"pck_crl": 1}),
        json.dumps(json.loads(COLLATERAL.to_json()) | {"tcb_info": "\ud800"}),
        json.dumps(json.loads(COLLATERAL.to_json()) | {"unknown": ""}),
        " " * (4 << 20) + "{}",
    ],
)
def test_text_that_is_no_collateral(text):
    with pytest.raises(EvidenceError):
        Collateral.from_json(text)


def test_collateral_that_has_no_json_form():
    with pytest.raises(EvidenceError, match="UTF-8"):
        replace(COLLATERAL, tcb_info=b"\xff").to_json()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=80) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*COLLATERAL.to_data(), "tee", "quote", "collateral"]), inner)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_any_data_gives_evidence_or_our_error(data):
    for parse in (Evidence.from_data, Collateral.from_data):
        with contextlib.suppress(EvidenceError):
            parse(data)


@given(st.text(max_size=200))
def test_any_text_gives_collateral_or_our_error(text):
    with contextlib.suppress(EvidenceError):
        Collateral.from_json(text)


AMD = AmdCollateral(certificates=b"PEM", crl=b"DER")


@pytest.mark.parametrize(
    "evidence",
    [
        EVIDENCE,
        replace(EVIDENCE, tee="tdx"),
        Evidence(tee="snp", quote=b"report", collateral=AMD),
        Evidence(tee="snp", quote=b"report", collateral=replace(AMD, crl=b"")),
        Evidence(tee="nitro", quote=b"document", collateral=None),
    ],
)
def test_evidence_of_every_tee_travels(evidence):
    assert Evidence.from_data(evidence.to_data()) == evidence


@pytest.mark.parametrize(
    "make",
    [
        lambda: Evidence(tee="snp", quote=b"report", collateral=COLLATERAL),
        lambda: Evidence(tee="snp", quote=b"report", collateral=None),
        lambda: Evidence(tee="nitro", quote=b"document", collateral=AMD),
        lambda: Evidence(tee="sgx", quote=b"quote", collateral=AMD),
        lambda: AmdCollateral(certificates=b""),
        lambda: AmdCollateral(certificates="PEM"),
        lambda: AmdCollateral(certificates=b"x", crl=bytes(600 << 10)),
        lambda: AmdCollateral.from_data({"certificates": b"x"}),
        lambda: AmdCollateral.from_data([]),
    ],
)
def test_collateral_of_another_kind(make):
    with pytest.raises(EvidenceError):
        make()
