"""The simulated authority: kept, private, recognisable."""

from __future__ import annotations

import stat
import threading

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.core.evidence import Evidence
from cloister.core.evidence.dcap import Quote
from cloister.core.verifier import TrustAnchors, dcap, verify
from cloister.core.verifier.certificates import load_chain
from cloister.core.verifier.tcb import TcbInfo
from cloister.errors import EvidenceError, UsageError
from cloister.sim.authority import FMSPC, FOLDER, SimulatedAuthority
from cloister.sim.tcb import QE_MR_SIGNER

NOW = 1_800_000_000
VALUES = {
    "report_data": b"r" * 64,
    "mr_enclave": b"e" * 32,
    "mr_signer": b"s" * 32,
    "isv_prod_id": 1,
    "isv_svn": 2,
}


def check(authority: SimulatedAuthority, by: SimulatedAuthority, now: int = NOW) -> None:
    evidence = Evidence(tee="sgx", quote=by.quote(**VALUES, now=now), collateral=by.collateral(now))
    verify(evidence, anchors=TrustAnchors.simulated(authority.roots_der), now=now)


def test_open_without_create(tmp_path):
    with pytest.raises(UsageError) as caught:
        SimulatedAuthority.open(tmp_path)
    assert caught.value.code == "sim.authority"


def test_create_twice(tmp_path):
    first = SimulatedAuthority.create(tmp_path, now=NOW)
    with pytest.raises(UsageError) as caught:
        SimulatedAuthority.create(tmp_path, now=NOW)
    assert caught.value.code == "sim.authority"
    assert SimulatedAuthority.open(tmp_path).roots_der == first.roots_der
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]  # no draft is left


def test_create_in_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        SimulatedAuthority.create(tmp_path / "file", now=NOW)


@pytest.mark.parametrize("name", ["root.key.pem", "pck.pem", "platform.secret"])
def test_file_that_is_damaged(name, tmp_path):
    SimulatedAuthority.create(tmp_path, now=NOW)
    (tmp_path / FOLDER / name).write_bytes(b"garbage")
    with pytest.raises(UsageError, match="damaged"):
        SimulatedAuthority.open(tmp_path)


def test_key_of_another_kind(tmp_path):
    SimulatedAuthority.create(tmp_path, now=NOW)
    other = SimulatedAuthority.create(tmp_path / "other", now=NOW)
    assert isinstance(other._root.key, ec.EllipticCurvePrivateKey)
    (tmp_path / FOLDER / "root.key.pem").write_bytes(
        (tmp_path / "other" / FOLDER / "root.key.pem").read_bytes()
    )
    with pytest.raises(UsageError, match="damaged"):
        SimulatedAuthority.open(tmp_path)


def test_key_that_others_can_read(tmp_path):
    SimulatedAuthority.create(tmp_path, now=NOW)
    (tmp_path / FOLDER / "pck.key.pem").chmod(0o644)
    with pytest.raises(UsageError, match="read by others"):
        SimulatedAuthority.open(tmp_path)


def test_private_files_are_private(tmp_path):
    SimulatedAuthority.create(tmp_path, now=NOW)
    folder = tmp_path / FOLDER
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    private = [*folder.glob("*.key.pem"), folder / "platform.secret"]
    assert len(private) == 12
    for path in private:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_private_is_printed(tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    secret = authority._platform_secret.reveal().hex()
    for text in (repr(authority), repr(authority._root), repr(authority._platform_secret)):
        assert secret not in text
        assert "BEGIN" not in text


def test_reopened_authority_is_the_same(tmp_path):
    created = SimulatedAuthority.create(tmp_path, now=NOW)
    opened = SimulatedAuthority.open(tmp_path)
    assert opened.roots_der == created.roots_der
    assert opened.sealing_key(b"e" * 32) == created.sealing_key(b"e" * 32)
    check(created, by=opened)


def test_two_directories_have_two_roots(tmp_path):
    first = SimulatedAuthority.create(tmp_path / "1", now=NOW)
    second = SimulatedAuthority.create(tmp_path / "2", now=NOW)
    assert first.roots_der != second.roots_der
    assert first.sealing_key(b"e" * 32) != second.sealing_key(b"e" * 32)


def test_many_makers_agree(tmp_path):
    made: list[SimulatedAuthority] = []
    threads = [
        threading.Thread(target=lambda: made.append(SimulatedAuthority.open_or_create(tmp_path, now=NOW)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({authority.roots_der for authority in made}) == 1
    assert len(made) == 6


def test_sealing_key_depends_on_the_measurement(tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    assert len(authority.sealing_key(b"e" * 32)) == 32
    assert authority.sealing_key(b"e" * 32) != authority.sealing_key(b"f" * 32)
    with pytest.raises(UsageError):
        authority.sealing_key(b"short")


def test_everything_announces_simulation(tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    quote = Quote.from_bytes(authority.quote(**VALUES, now=NOW))
    collateral = authority.collateral(NOW)
    chains = [
        quote.signature.certification_data,
        collateral.pck_crl_issuer_chain,
        collateral.tcb_info_issuer_chain,
    ]
    for chain in chains:
        assert all("Simulated" in certificate.common_name for certificate in load_chain(chain))
    assert TcbInfo.from_bytes(collateral.tcb_info).fmspc == FMSPC == b"SIMSGX"
    assert b"Simulated" in quote.header.user_data
    assert quote.signature.qe_report.mr_signer == QE_MR_SIGNER
    assert len(QE_MR_SIGNER) == 32


def test_collateral_numbers_grow_with_time(tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    numbers = [
        TcbInfo.from_bytes(authority.collateral(NOW + hours * 3600).tcb_info).evaluation_number
        for hours in range(4)
    ]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("later", [0, 1, 3599, 86400, 365 * 86400, 9 * 365 * 86400])
def test_collateral_is_in_force_whenever_it_is_issued(later, tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    check(authority, by=authority, now=NOW + later)


def test_authority_that_has_expired(tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    with pytest.raises(UsageError, match="expired"):
        authority.quote(**VALUES, now=NOW + 11 * 366 * 86400)


@pytest.mark.parametrize("change", [{"isv_svn": 65536}, {"isv_prod_id": -1}])
def test_number_that_is_out_of_range(change, tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    with pytest.raises(UsageError):
        authority.quote(**{**VALUES, **change}, now=NOW)


TD_VALUES = {"report_data": b"r" * 64, "mr_td": b"m" * 48}


@pytest.mark.parametrize(("version", "td_version"), [(4, "1.0"), (5, "1.0"), (5, "1.5")])
def test_td_quotes_announce_simulation_and_verify(version, td_version, tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    raw = authority.td_quote(**TD_VALUES, version=version, td_version=td_version, now=NOW)
    quote = Quote.from_bytes(raw)
    assert b"Simulated" in quote.header.user_data
    assert b"Simulated" in quote.body.mr_signer_seam
    assert b"Simulated" in quote.signature.qe_report.mr_signer
    assert (quote.header.version, len(quote.body.FIELDS)) == (version, 17 if td_version == "1.5" else 15)
    evidence = Evidence(tee="tdx", quote=raw, collateral=authority.collateral(NOW, tee="tdx"))
    result = dcap.verify(evidence, anchors=TrustAnchors.simulated(authority.roots_der), now=NOW)
    assert (result.tee, result.simulated, result.tcb_status) == ("tdx", True, "UpToDate")


def test_td_in_debug_mode(tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    body = Quote.from_bytes(authority.td_quote(**TD_VALUES, debug=True, now=NOW)).body
    assert body.debug
    assert body.td_attributes == bytes.fromhex("0100001000000000")


@pytest.mark.parametrize(
    "values",
    [
        {"version": 3},
        {"version": 4, "td_version": "1.5"},
        {"version": 5, "td_version": "2.0"},
        {"rtmrs": [bytes(48)] * 3},
    ],
)
def test_td_quote_that_does_not_exist(values, tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    with pytest.raises(UsageError, match="no such quote"):
        authority.td_quote(**TD_VALUES, **values, now=NOW)


def test_td_quote_after_expiry(tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    with pytest.raises(UsageError, match="expired"):
        authority.td_quote(**TD_VALUES, now=NOW + 11 * 366 * 86400)


@pytest.mark.parametrize("name", ["report_data", "mr_td", "mr_config_id", "td_attributes", "xfam"])
def test_td_value_of_another_length(name, tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    with pytest.raises(EvidenceError):
        authority.td_quote(**{**TD_VALUES, name: b"short"}, debug=True, now=NOW)


@pytest.mark.parametrize("name", ["report_data", "mr_enclave", "mr_signer"])
def test_value_of_another_length(name, tmp_path):
    authority = SimulatedAuthority.create(tmp_path, now=NOW)
    with pytest.raises(EvidenceError):
        authority.quote(**{**VALUES, name: b"short"}, now=NOW)
