"""Which collateral evidence needs: read from a quote's own PCK certificate, real ones included."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.core.evidence.dcap import Quote
from cloister.core.evidence.pem import to_pem
from cloister.core.verifier.certificates import load_chain
from cloister.core.verifier.collateral_key import DcapKey, SnpKey, crl_file
from cloister.errors import EvidenceError
from cloister.sim.authority import FMSPC, SimulatedAuthority

NOW = 1_800_000_000


@pytest.fixture(scope="module")
def quote(authority: SimulatedAuthority) -> bytes:
    return authority.quote(
        report_data=bytes(64), mr_enclave=bytes(32), mr_signer=bytes(32), isv_prod_id=0, isv_svn=0, now=NOW
    )


def with_chain(quote: bytes, *ders: bytes) -> bytes:
    parsed = Quote.from_bytes(quote)
    pem = "".join(to_pem(der) for der in ders).encode()
    return replace(parsed, signature=replace(parsed.signature, certification_data=pem)).to_bytes()


def test_a_quote_names_its_family_and_its_ca(quote: bytes) -> None:
    key = DcapKey.from_quote(quote)
    assert (key.tee, key.fmspc, key.ca) == ("sgx", FMSPC, "processor")
    assert key.file == f"sgx/{FMSPC.hex()}-processor.json"


def test_a_td_quote_has_files_of_its_own(authority: SimulatedAuthority) -> None:
    raw = authority.td_quote(report_data=bytes(64), mr_td=bytes(48), now=NOW)
    assert DcapKey.from_quote(raw).file == f"tdx/{FMSPC.hex()}-processor.json"


def test_real_quotes_name_the_family_of_their_collateral(vectors: Path) -> None:
    seen, unreadable = set(), []
    for folder in sorted(each for each in vectors.iterdir() if (each / "quote.bin").exists()):
        try:
            key = DcapKey.from_quote((folder / "quote.bin").read_bytes())
        except EvidenceError as error:
            unreadable.append(error.claim)
            continue
        collateral = json.loads((folder / "collateral.json").read_text())
        assert json.loads(collateral["tcb_info"])["fmspc"].lower() == key.fmspc.hex(), folder.name
        assert json.loads(collateral["tcb_info"])["id"].lower() == key.tee, folder.name
        issuer = load_chain(collateral["pck_crl_issuer_chain"].encode())[0].common_name
        assert key.ca in issuer.lower(), folder.name
        seen.add((key.tee, key.ca))
    assert {("sgx", "platform"), ("tdx", "platform")} <= seen
    assert unreadable == []


def test_a_chain_of_another_length_is_refused(quote: bytes) -> None:
    leaf, issuer, root = load_chain(Quote.from_bytes(quote).signature.certification_data)
    for chain in ((leaf,), (leaf, issuer), (leaf, root, issuer)):
        with pytest.raises(EvidenceError) as caught:
            DcapKey.from_quote(with_chain(quote, *(each.der for each in chain)))
        assert caught.value.claim == "PCK CA"


def test_a_leaf_without_the_sgx_extension_is_refused(quote: bytes) -> None:
    _, issuer, root = load_chain(Quote.from_bytes(quote).signature.certification_data)
    with pytest.raises(EvidenceError) as caught:
        DcapKey.from_quote(with_chain(quote, root.der, issuer.der, root.der))
    assert caught.value.claim == "SGX extension"


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"tee": "snp"}, "tee"),
        ({"tee": "../sgx"}, "tee"),
        ({"ca": "root"}, "ca"),
        ({"ca": "platform/../.."}, "ca"),
        ({"fmspc": bytes(5)}, "fmspc"),
    ],
)
def test_no_key_names_a_file_elsewhere(changes: dict[str, object], claim: str) -> None:
    with pytest.raises(EvidenceError) as caught:
        DcapKey(**{"tee": "sgx", "fmspc": FMSPC, "ca": "platform", **changes})  # type: ignore[arg-type]
    assert caught.value.claim == claim


@pytest.mark.parametrize(
    ("chip_id", "tcb", "claim"), [(bytes(8), bytes(8), "chip id"), (bytes(64), bytes(7), "TCB")]
)
def test_snp_keys_have_fixed_lengths(chip_id: bytes, tcb: bytes, claim: str) -> None:
    with pytest.raises(EvidenceError) as caught:
        SnpKey(chip_id=chip_id, tcb=tcb)
    assert caught.value.claim == claim


def test_snp_files_are_named_by_chip_and_tcb_and_by_root() -> None:
    key = SnpKey(chip_id=b"\xab" * 64, tcb=b"\x01" * 8)
    assert key.file == f"snp/{'ab' * 64}-{'01' * 8}.pem"
    assert crl_file(b"") == "snp/e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855.crl"


@given(raw=st.binary(max_size=2000))
def test_any_bytes_give_our_error(raw: bytes) -> None:
    with pytest.raises(EvidenceError):
        DcapKey.from_quote(raw)


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_quote_gives_a_key_or_our_error(quote: bytes, data: st.DataObject) -> None:
    damaged = bytearray(quote)
    damaged[data.draw(st.integers(0, len(quote) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(EvidenceError):
        assert len(DcapKey.from_quote(bytes(damaged)).fmspc) == 6
