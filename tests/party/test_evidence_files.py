"""Evidence and collateral in the forms in which people have them, and the commands that read them."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import cbor2
import pytest
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cloister.cli.app import app
from cloister.cli.output import table
from cloister.cli.site import reference_policy
from cloister.core.evidence import Evidence
from cloister.core.evidence.bundle import Collateral
from cloister.core.evidence.pem import to_pem
from cloister.core.evidence.snp_table import MAX_TABLE, CertificateTable
from cloister.core.verifier import TrustAnchors, verify
from cloister.core.verifier.anchors import split_certificates
from cloister.core.verifier.certificates import AMD, load_chain, read_pem
from cloister.core.verifier.collateral_key import DcapKey, SnpKey, crl_file
from cloister.errors import CloisterError, EvidenceError, UsageError
from cloister.host.collateral import CollateralFolder
from cloister.party.evidence import open_evidence, read_evidence, read_signed
from cloister.party.file_kinds import MAX_FILE
from cloister.sim import tees
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.measurement import measure
from cloister.sim.snp import SnpFlaws

NOW = 1_800_000_000
VECTORS = Path(__file__).resolve().parents[3] / "shared" / "vectors"
RUNNER = CliRunner()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> SimulatedAuthority:
    return SimulatedAuthority.create(tmp_path_factory.mktemp("authority"), now=NOW)


@pytest.fixture(scope="module")
def measured():
    return measure("worker")


@pytest.fixture(scope="module")
def evidence(authority, measured):
    """Simulated evidence of every TEE."""
    return {tee: tees.evidence(authority, measured, tee, os.urandom(64), NOW) for tee in tees.TEES}


def files(evidence, tee: str) -> list[bytes]:
    """The collateral as files."""
    collateral = evidence[tee].collateral
    if collateral is None:
        return []
    if isinstance(collateral, Collateral):
        return [collateral.to_json().encode()]
    return [collateral.certificates, collateral.crl]


@pytest.mark.parametrize("tee", tees.TEES)
@pytest.mark.parametrize(
    "form",
    [
        lambda raw: raw,
        lambda raw: raw.hex().encode(),
        lambda raw: raw.hex().upper().encode() + b"\n",
        base64.b64encode,
        base64.encodebytes,
    ],
)
def test_forms_of_evidence(evidence, tee, form):
    signed = read_signed(form(evidence[tee].quote))
    assert (signed.tee, signed.raw) == (tee, evidence[tee].quote)
    assert read_signed(form(evidence[tee].quote), tee).tee == tee
    assert signed.parsed.to_bytes() == signed.raw


@pytest.mark.parametrize("tee", tees.TEES)
def test_what_was_read_verifies(evidence, tee, authority):
    read = read_evidence(evidence[tee].quote, files(evidence, tee))
    assert read == evidence[tee]
    assert verify(read, anchors=TrustAnchors.simulated(authority.roots_der), now=NOW).tee == tee


def test_a_pattern_in_a_tag_is_not_compiled():
    """CBOR's tag 35 holds a regular expression, which takes a parser as long as its author likes."""
    report = cbor2.dumps({"outblob": cbor2.CBORTag(35, "(" * 9000 + ")" * 9000), "auxblob": b""})
    before = time.process_time()
    with pytest.raises(EvidenceError):
        read_signed(report)
    assert time.process_time() - before < 0.5


def test_what_evidence_says_does_not_steer_the_terminal(capsys):
    table("title", ("field",), [("\x1b[2J\x1b[H accepted\x9b",)])
    assert "\x1b" not in capsys.readouterr().out


def test_evidence_of_another_tee_than_asked_for(evidence):
    with pytest.raises(EvidenceError) as caught:
        read_signed(evidence["tdx"].quote, "sgx")
    assert (caught.value.code, caught.value.claim) == ("evidence.tee", "tee")


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello", bytes(2000), b"\xff" * 64, b"zz" * 30, b"\xa1\x61a\x01", b"\xa2\xff\xff"]
)
def test_what_is_no_evidence(data):
    with pytest.raises(EvidenceError):
        read_signed(data)


def test_files_that_are_too_long(evidence):
    for what, read in (
        ("evidence", lambda: read_signed(bytes(MAX_FILE + 1))),
        ("collateral", lambda: read_evidence(evidence["snp"].quote, [bytes(MAX_FILE + 1)])),
    ):
        with pytest.raises(UsageError) as caught:
            read()
        assert (caught.value.claim, caught.value.expected) == (what, f"at most {MAX_FILE} B")


def parts(evidence) -> tuple[list[bytes], bytes]:
    collateral = evidence["snp"].collateral
    return read_pem(collateral.certificates, most=3), collateral.crl


def snp_forms(evidence, authority) -> dict[str, tuple[bytes, list[bytes]]]:
    report, (certificates, crl) = evidence["snp"].quote, parts(evidence)
    table = authority.amd.certificate_table()
    form = {
        "certificates": evidence["snp"].collateral.certificates.decode(),
        "crl": evidence["snp"].collateral.crl.hex(),
    }
    return {
        "pem and crl": (report, [evidence["snp"].collateral.certificates, crl]),
        "der, one by one": (report, [*certificates, crl]),
        "der, another order": (report, [crl, *reversed(certificates)]),
        "json": (report, [json.dumps(form).encode()]),
        "table": (report, [table, crl]),
        "table behind the report": (report + table, [crl]),
        "files of configfs-tsm": (cbor2.dumps({"outblob": report, "auxblob": table}), [crl]),
    }


@pytest.mark.parametrize(
    "name",
    [
        "pem and crl",
        "der, one by one",
        "der, another order",
        "json",
        "table",
        "table behind the report",
        "files of configfs-tsm",
    ],
)
def test_forms_of_amd_certificates(evidence, authority, name):
    data, collateral = snp_forms(evidence, authority)[name]
    read = read_evidence(data, collateral)
    assert read.collateral == evidence["snp"].collateral
    verify(read, anchors=TrustAnchors.simulated(authority.roots_der), now=NOW)


@pytest.fixture(scope="module")
def vlek(authority):
    """Evidence that a VLEK signed, and the two certificates of which its VCEK has others."""
    amd = authority.amd
    report = amd.report(report_data=bytes(64), measurement=b"m" * 48, vlek=True)
    return Evidence(tee="snp", quote=report, collateral=amd.collateral(NOW, flaws=SnpFlaws(vlek=True)))


@pytest.mark.parametrize("signer", ["VCEK", "VLEK"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_leaf_is_the_signers_own(evidence, vlek, authority, signer, turned):
    """A host with a VLEK gives its VCEK, too; AMD's table has one place for either's issuer."""
    proper = {"VCEK": evidence["snp"], "VLEK": vlek}[signer]
    both = [*read_pem(evidence["snp"].collateral.certificates, most=3)]
    both += read_pem(vlek.collateral.certificates, most=3)
    read = read_evidence(proper.quote, [*(reversed(both) if turned else both), proper.collateral.crl])
    assert read.collateral.certificates == proper.collateral.certificates
    verify(read, anchors=TrustAnchors.simulated(authority.roots_der), now=NOW)


def test_a_table_with_both_leaves(evidence, vlek, authority):
    vcek, (leaf, asvk, ark) = parts(evidence)[0][0], read_pem(vlek.collateral.certificates, most=3)
    table = CertificateTable.pack({"VCEK": vcek, "VLEK": leaf, "ASK": asvk, "ARK": ark}).to_bytes()
    read = read_evidence(vlek.quote + table, [vlek.collateral.crl])
    assert read == vlek
    verify(read, anchors=TrustAnchors.simulated(authority.roots_der), now=NOW)


@pytest.mark.parametrize("signer", ["VCEK", "VLEK"])
def test_a_leaf_of_the_other_kind_does_not_count(evidence, vlek, signer):
    proper, other = {"VCEK": (evidence["snp"], vlek), "VLEK": (vlek, evidence["snp"])}[signer]
    with pytest.raises(UsageError) as caught:
        read_evidence(proper.quote, [other.collateral.certificates])
    error = caught.value
    assert (error.code, error.claim) == ("usage.collateral", "--collateral")
    assert error.expected == f"the {signer} certificate of the report's signer"
    assert error.actual == "certificates of other keys"


def test_a_leaf_whose_issuer_nobody_knows(evidence):
    certificates, _ = parts(evidence)
    with pytest.raises(EvidenceError) as caught:
        read_evidence(evidence["snp"].quote, certificates[:1])
    assert caught.value.claim.startswith("issuer of")


@pytest.mark.parametrize(
    "collateral",
    [
        [b"{"],
        [b"{}"],
        [b'{"certificates": "", "crl": "zz"}'],
        [b'{"certificates": 1, "crl": ""}'],
        [b'{"certificates": "\\ud800", "crl": ""}'],
        [b"\x30\x03\x02\x01"],
        [b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"],
        [b"table"],
        [b"\1" * (70 << 10)],
        [],
    ],
)
def test_amd_collateral_that_is_none(evidence, collateral):
    with pytest.raises(CloisterError):
        read_evidence(evidence["snp"].quote, collateral)


@pytest.mark.parametrize("collateral", [[], [b"{}", b"{}"], [b"\xff"], [b"{}"], [b"["]])
def test_dcap_collateral_that_is_none(evidence, collateral):
    with pytest.raises(CloisterError):
        read_evidence(evidence["sgx"].quote, collateral)


TOML = b'# who may answer\ntee = "sgx"\n'
PAGE = b"<!DOCTYPE html>\n<html><body>404</body></html>"
ODDITIES = {
    "empty": (b"", "an empty file"),
    "page": (PAGE, "HTML or XML, as a web server's error page is"),
    "policy": (TOML, "a TOML file, as policies are"),
    "section": (b"[[all_of]]\ntee = 1\n", "a TOML file, as policies are"),
    "cut": (b'{"tcb_info": "', "JSON that is cut off or broken"),
    "utf-16": ('{"tcb_info": "ü"}'.encode("utf-16-le"), "JSON that is cut off or broken"),
    "deep": (b"[" * 100_000, "JSON that is cut off or broken"),
    "list": (b"[]", "JSON with other fields"),
    "pcs": (b'{"tcbInfo": {}, "signature": ""}', "a single answer of Intel's PCS (JSON)"),
    "key": (b"-----BEGIN EC PRIVATE KEY-----\nAAAA", "PEM of another kind (EC PRIVATE KEY)"),
    "crl": (b"-----BEGIN X509 CRL-----\nAAAA", "a revocation list (PEM)"),
    "der": (b"\x30\x82\0\1\0", "DER that is neither a certificate nor a revocation list"),
    "text": ("schlüssel".encode(), "10 B of text"),
    "cut text": (b"x" * 1023 + "ü".encode(), "1025 B of text"),
    "binary": (b"\0\1\2", "3 B of binary data"),
    "latin": ("schlüssel".encode("latin-1") + b"....", "13 B of binary data"),
    "zeros": (bytes(64), "64 B of zeros"),
}


def odd(evidence, name: str) -> tuple[bytes, str]:
    """What was given by mistake, and what an error calls it."""
    amd = evidence["snp"].collateral
    return {
        **ODDITIES,
        "sgx quote": (evidence["sgx"].quote, "an SGX quote"),
        "tdx quote in hex": (evidence["tdx"].quote.hex().encode(), "a TDX quote"),
        "report in base64": (base64.encodebytes(evidence["snp"].quote), "an SEV-SNP report"),
        "document": (evidence["nitro"].quote, "a Nitro document"),
        "dcap": (files(evidence, "tdx")[0], "DCAP collateral (JSON)"),
        "amd pem": (amd.certificates, "certificates (PEM)"),
        "amd der": (read_pem(amd.certificates, most=3)[0], "a certificate (DER)"),
        "amd crl": (amd.crl, "a revocation list (DER)"),
        "amd json": (b'{"certificates": "", "crl": ""}', "AMD certificates and revocation list (JSON)"),
    }[name]


EVIDENCE = ("sgx quote", "tdx quote in hex", "report in base64", "document")
OF_AMD = ("amd pem", "amd der", "amd crl", "amd json")


@pytest.mark.parametrize("name", [*ODDITIES, *EVIDENCE, "dcap"])
def test_an_error_says_what_was_given_for_amds_certificates(evidence, name):
    content, kind = odd(evidence, name)
    with pytest.raises(EvidenceError) as caught:
        read_evidence(evidence["snp"].quote, [evidence["snp"].collateral.certificates, content])
    error = caught.value
    assert (error.code, error.claim) == ("collateral.kind", "collateral")
    assert error.expected.startswith("certificates (PEM or DER)")
    assert error.actual == f"file 2: {kind}"
    hint = "--policy" if "TOML" in kind else "`cloister collateral fetch --into collateral --report FILE`"
    assert hint in error.hint


@pytest.mark.parametrize("name", [*ODDITIES, *EVIDENCE, *OF_AMD])
def test_an_error_says_what_was_given_for_dcap_collateral(evidence, name):
    content, kind = odd(evidence, name)
    with pytest.raises(EvidenceError) as caught:
        read_evidence(evidence["sgx"].quote, [content])
    error = caught.value
    assert (error.code, error.claim) == ("collateral.kind", "collateral")
    assert (error.expected, error.actual) == ("one JSON file of DCAP collateral", f"file 1: {kind}")
    hint = "--policy" if "TOML" in kind else "`cloister collateral fetch --into collateral --quote FILE`"
    assert hint in error.hint


@pytest.mark.parametrize("name", [*ODDITIES, *OF_AMD, "dcap"])
def test_an_error_says_what_was_given_for_evidence(evidence, name):
    content, kind = odd(evidence, name)
    with pytest.raises(EvidenceError) as caught:
        read_signed(content)
    error = caught.value
    assert (error.code, error.claim, error.actual) == ("evidence.format", "evidence", kind)
    assert "SEV-SNP report" in error.expected
    collateral = name in OF_AMD or name == "dcap"
    assert ("--collateral" in error.hint, "--policy" in error.hint) == (collateral, "TOML" in kind)


@pytest.mark.parametrize(
    "secret", [b"hunter2-hunter2", b"TOKEN = 'hunter2'", b'{"hunter2": 1}', b"\0hunter2"]
)
def test_errors_do_not_quote_what_was_given_by_mistake(evidence, secret):
    for read in (lambda: read_signed(secret), lambda: read_evidence(evidence["sgx"].quote, [secret])):
        with pytest.raises(EvidenceError) as caught:
            read()
        assert "hunter2" not in str(caught.value)
        assert b"hunter2".hex() not in str(caught.value)


@pytest.mark.parametrize("name", ["dcap", *OF_AMD])
def test_a_nitro_document_takes_no_collateral(evidence, name):
    content, kind = odd(evidence, name)
    with pytest.raises(EvidenceError) as caught:
        read_evidence(evidence["nitro"].quote, [content])
    error = caught.value
    assert (error.code, error.claim, error.actual) == ("collateral.kind", "collateral", f"file 1: {kind}")
    assert error.expected == "none, or certificates that the document brings itself"


def test_a_nitro_document_takes_the_certificates_that_it_brings(evidence):
    document = read_signed(evidence["nitro"].quote).parsed
    root = document.cabundle[0]
    bundle = "".join(map(to_pem, document.cabundle)).encode()
    for given in (root, document.certificate, to_pem(root).encode(), bundle):
        assert read_evidence(evidence["nitro"].quote, [given], "nitro") == evidence["nitro"]
    foreign = read_pem(evidence["snp"].collateral.certificates, most=3)[0]
    with pytest.raises(EvidenceError) as caught:
        read_evidence(evidence["nitro"].quote, [(to_pem(root) + to_pem(foreign)).encode()])
    assert caught.value.code == "collateral.kind"


@pytest.mark.parametrize(
    ("tee", "option", "expected"),
    [
        ("sgx", "--quote", "one JSON file of DCAP collateral"),
        ("tdx", "--quote", "one JSON file of DCAP collateral"),
        ("snp", "--report", "the VCEK certificate of the report's signer"),
    ],
)
def test_missing_collateral_comes_with_the_whole_command(evidence, tmp_path, tee, option, expected):
    path = tmp_path / "a quote"
    path.write_bytes(evidence[tee].quote)
    with pytest.raises(UsageError) as caught:
        open_evidence(path)
    error = caught.value
    assert (error.code, error.claim) == ("usage.collateral", "--collateral")
    assert (error.expected, error.actual) == (expected, "none")
    assert f"`cloister collateral fetch --into collateral {option} '{path}'`" in error.hint
    assert error.hint.endswith("`--collateral collateral`")


def test_two_files_of_dcap_collateral_are_too_many(evidence):
    with pytest.raises(UsageError) as caught:
        read_evidence(evidence["sgx"].quote, files(evidence, "sgx") * 2)
    assert (caught.value.code, caught.value.claim) == ("usage.collateral", "--collateral")
    assert caught.value.actual == "2 files"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"key_info": 1 << 2}, "VLEK"),
        ({"chip_id": bytes(64)}, "masks its chip"),
        (
            {"version": 2, "cpuid_family": 0, "cpuid_model": 0, "cpuid_stepping": 0},
            "--report FILE --product PRODUCT`",
        ),
    ],
)
def test_no_command_is_named_that_would_not_help(evidence, changes, said):
    report = replace(read_signed(evidence["snp"].quote).parsed, **changes)
    with pytest.raises(UsageError) as caught:
        read_evidence(report.to_bytes(), [evidence["snp"].collateral.crl])
    assert said in caught.value.hint
    assert ("cloister" in caught.value.hint) == ("PRODUCT" in said)


@pytest.mark.parametrize("name", ["pck_crl", "tcb_info", "qe_identity_signature"])
@pytest.mark.parametrize("change", ["missing", "number"])
def test_a_field_that_dcap_collateral_lacks_is_named(evidence, name, change):
    fields = json.loads(files(evidence, "sgx")[0])
    fields[name] = 7
    if change == "missing":
        del fields[name]
    with pytest.raises(EvidenceError) as caught:
        read_evidence(evidence["sgx"].quote, [json.dumps(fields).encode()])
    assert (caught.value.code, caught.value.claim) == ("evidence.collateral", name)
    assert caught.value.actual == ("no such field" if change == "missing" else "int")


@pytest.mark.parametrize(
    ("given", "claim", "actual"),
    [
        ({"crl": ""}, "certificates", "no such field"),
        ({"certificates": ""}, "crl", "no such field"),
        ({"certificates": 1, "crl": ""}, "certificates", "int"),
        ({"certificates": "", "crl": None}, "crl", "NoneType"),
    ],
)
def test_a_field_that_amds_json_lacks_is_named(evidence, given, claim, actual):
    with pytest.raises(EvidenceError) as caught:
        read_evidence(evidence["snp"].quote, [json.dumps(given).encode()])
    error = caught.value
    assert (error.code, error.claim, error.actual) == ("evidence.collateral", claim, actual)
    assert error.expected == {"certificates": "PEM", "crl": "hex digits"}[claim]


def test_a_list_that_is_not_hex_is_named(evidence):
    pem = evidence["snp"].collateral.certificates.decode()
    with pytest.raises(EvidenceError) as caught:
        read_evidence(evidence["snp"].quote, [json.dumps({"certificates": pem, "crl": "zz"}).encode()])
    assert (caught.value.code, caught.value.claim) == ("evidence.collateral", "crl")


STARTS = (
    b"",
    b"{",
    b'{"crl":"',
    b"\x30\x82",
    b"-----BEGIN CERTIFICATE-----\n",
    b"\xa2",
    b"\x02\0\0\0",
    b"<",
    b"[a]",
)


@hypothesis_given(start=st.sampled_from(STARTS), rest=st.binary(max_size=300), tee=st.sampled_from(tees.TEES))
def test_any_bytes_give_evidence_or_our_error(evidence, start, rest, tee):
    for read in (
        lambda: read_signed(start + rest),
        lambda: read_evidence(evidence[tee].quote, [start + rest]),
        lambda: read_evidence(evidence[tee].quote, [start + rest, *files(evidence, tee)]),
    ):
        with contextlib.suppress(UsageError):
            read()


@hypothesis_given(
    value=st.dictionaries(
        st.sampled_from(("certificates", "crl", "tcb_info", "qe_identity", "other")),
        st.none() | st.integers() | st.text() | st.lists(st.text()),
    )
)
def test_any_json_gives_evidence_or_our_error(evidence, value):
    for tee in ("sgx", "snp"):
        with contextlib.suppress(UsageError):
            read_evidence(evidence[tee].quote, [json.dumps(value).encode()])


def authority_table(evidence) -> bytes:
    return CertificateTable.pack(
        dict(zip(("VCEK", "ASK", "ARK"), parts(evidence)[0], strict=True))
    ).to_bytes()


def test_a_table_with_pem_inside_is_a_table(evidence):
    certificates, crl = parts(evidence)
    named = zip(("VCEK", "ASK", "ARK"), (to_pem(each).encode() for each in certificates), strict=True)
    table = CertificateTable.pack(dict(named)).to_bytes()
    assert b"-----BEGIN" in table[:256]
    assert read_evidence(evidence["snp"].quote, [table, crl]) == evidence["snp"]


@pytest.mark.parametrize("size", [MAX_TABLE, MAX_TABLE + 1])
def test_the_longest_table(evidence, size):
    """One limit, wherever the table comes from."""
    table = authority_table(evidence).ljust(size, b"\0")
    report, (_, crl) = evidence["snp"].quote, parts(evidence)
    tsm = cbor2.dumps({"outblob": report, "auxblob": table, "provider": "sev_guest"})
    for data, files_ in ((report, [table, crl]), (report + table, [crl]), (tsm, [crl])):
        if size == MAX_TABLE:
            assert read_evidence(data, files_) == evidence["snp"]
            continue
        with pytest.raises(EvidenceError) as caught:
            read_evidence(data, files_)
        assert caught.value.claim == "certificate table: size"


# -- folders -----------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path, evidence) -> Path:
    """A folder as `cloister collateral fetch` fills it, for every TEE."""
    folder = CollateralFolder(tmp_path / "collateral")
    for name, content in kept(evidence).items():
        folder.write(name, content)
    return folder.root


def kept(evidence) -> dict[str, bytes]:
    report, amd = read_signed(evidence["snp"].quote).parsed, evidence["snp"].collateral
    return {
        **{DcapKey.from_quote(evidence[tee].quote).file: files(evidence, tee)[0] for tee in ("sgx", "tdx")},
        SnpKey(chip_id=report.chip_id, tcb=report.reported_tcb).file: amd.certificates,
        crl_file(load_chain(amd.certificates, AMD)[-1].der): amd.crl,
    }


@pytest.fixture
def binaries(tmp_path, evidence) -> dict[str, Path]:
    for tee in tees.TEES:
        (tmp_path / f"{tee}.bin").write_bytes(evidence[tee].quote)
    return {tee: tmp_path / f"{tee}.bin" for tee in tees.TEES}


@pytest.mark.parametrize("tee", tees.TEES)
def test_a_folder_gives_what_the_evidence_needs(evidence, shelf, binaries, tee):
    assert open_evidence(binaries[tee], [shelf]) == evidence[tee]


def test_the_first_folder_that_has_a_file_gives_it(evidence, shelf, binaries, tmp_path):
    (tmp_path / "none").mkdir()
    assert open_evidence(binaries["snp"], [tmp_path / "none", shelf]) == evidence["snp"]


def test_files_come_before_folders(evidence, shelf, binaries, tmp_path):
    for name in kept(evidence):
        (shelf / name).write_bytes(b"unused")
    for tee in ("sgx", "snp"):
        paths = [shelf]
        for number, content in enumerate(files(evidence, tee)):
            paths.append(tmp_path / f"{number}")
            paths[-1].write_bytes(content)
        assert open_evidence(binaries[tee], paths) == evidence[tee]


def test_a_folder_gives_the_list_for_a_report_with_a_table(evidence, shelf, binaries, authority):
    (pem,) = (shelf / "snp").glob("*.pem")
    pem.unlink()
    with binaries["snp"].open("ab") as file:
        file.write(authority.amd.certificate_table())
    assert open_evidence(binaries["snp"], [shelf]) == evidence["snp"]


@pytest.mark.parametrize("name", ["sgx", "tdx", "pem", "crl"])
def test_what_a_folder_lacks_is_named_with_the_command_for_it(evidence, shelf, binaries, name):
    tee = name if name in binaries else "snp"
    (file,) = [each for each in kept(evidence) if each.startswith(name) or each.endswith(name)]
    (shelf / file).unlink()
    with pytest.raises(UsageError) as caught:
        open_evidence(binaries[tee], [shelf])
    error = caught.value
    assert (error.code, error.claim) == ("usage.collateral", file)
    assert error.actual == f"no such file in {shelf}"
    options = f"--product {read_signed(evidence['snp'].quote).parsed.product}"
    if name != "crl":
        options = f"--{'report' if tee == 'snp' else 'quote'} {binaries[tee]}"
    assert error.hint == f"Fetch it with `cloister collateral fetch --into {shelf} {options}`"


@pytest.mark.parametrize("content", [b"", PAGE, b'{"tcbInfo": 1}'])
@pytest.mark.parametrize("name", ["sgx", "pem", "crl"])
def test_a_folder_that_holds_something_else(evidence, shelf, binaries, name, content):
    tee = name if name in binaries else "snp"
    (file,) = [each for each in kept(evidence) if each.startswith(name) or each.endswith(name)]
    (shelf / file).write_bytes(content)
    with pytest.raises(EvidenceError) as caught:
        open_evidence(binaries[tee], [shelf])
    assert (caught.value.code, caught.value.claim) == ("collateral.kind", "collateral")
    assert caught.value.actual.startswith(f"{shelf / file}: ")


def test_a_folder_has_the_leaf_that_a_table_lacks(evidence, vlek, shelf, tmp_path):
    leaf, asvk, ark = read_pem(vlek.collateral.certificates, most=3)
    table = CertificateTable.pack({"VLEK": leaf, "ASK": asvk, "ARK": ark}).to_bytes()
    (tmp_path / "report").write_bytes(evidence["snp"].quote + table)
    assert open_evidence(tmp_path / "report", [shelf]) == evidence["snp"]


def test_certificates_of_cas_alone_are_not_enough(evidence, shelf, binaries):
    (pem,) = (shelf / "snp").glob("*.pem")
    pem.write_text("".join(map(to_pem, parts(evidence)[0][1:])))
    with pytest.raises(UsageError) as caught:
        open_evidence(binaries["snp"], [shelf])
    assert (caught.value.code, caught.value.claim) == ("usage.collateral", f"snp/{pem.name}")
    assert caught.value.actual == "certificates of other keys"


def test_what_is_in_the_way_is_said(shelf, binaries):
    (file,) = (shelf / "sgx").iterdir()
    file.unlink()
    file.mkdir()
    with pytest.raises(UsageError) as caught:
        open_evidence(binaries["sgx"], [shelf])
    assert (caught.value.code, caught.value.claim) == ("file.read", "collateral")
    assert str(file) in caught.value.actual


@pytest.mark.parametrize(("at", "claim"), [(0, "evidence"), (1, "collateral")])
def test_files_that_are_not_there(binaries, tmp_path, at, claim):
    paths = [binaries["sgx"], tmp_path / "none"]
    with pytest.raises(UsageError) as caught:
        open_evidence(*([paths[1], []] if at == 0 else [paths[0], [paths[1]]]))
    assert (caught.value.code, caught.value.claim) == ("file.read", claim)
    assert str(tmp_path / "none") in caught.value.actual
    assert ("collateral fetch --into collateral --quote" in caught.value.hint) == (at == 1)


def test_amds_own_intermediates_are_at_hand():
    """A real VCEK and a real VLEK alone will do."""
    folder = VECTORS / "snp" / "trustee-snp"
    if not folder.exists():
        pytest.skip("no real evidence here")
    for report, leaf in (("test-report.bin", "test-vcek.der"), ("test-vlek-report.bin", "test-vlek.der")):
        read = read_evidence((folder / report).read_bytes(), [(folder / leaf).read_bytes()])
        verify(read, anchors=TrustAnchors.vendor(), now=1_749_988_800)


# -- the commands ----------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    done = RUNNER.invoke(app, ["evidence", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        assert isinstance(done.exception, CloisterError)
        return 1, done.output + done.exception.code
    return done.exit_code, done.output


@pytest.fixture
def folder(tmp_path, evidence, authority, measured):
    """Files of every TEE: ``<tee>.bin``, ``<tee>.collateral0``, ``<tee>.toml``, and the roots."""
    for tee in tees.TEES:
        (tmp_path / f"{tee}.bin").write_bytes(evidence[tee].quote)
        for number, content in enumerate(files(evidence, tee)):
            (tmp_path / f"{tee}.collateral{number}").write_bytes(content)
        policy = reference_policy(measured, authority.roots_der, tee)
        (tmp_path / f"{tee}.toml").write_text(policy.to_toml())
    (tmp_path / "roots.pem").write_text("".join(map(to_pem, split_certificates(authority.roots_der))))
    return tmp_path


def given(folder: Path, tee: str) -> list[object]:
    """The options that name a TEE's collateral."""
    found = sorted(folder.glob(f"{tee}.collateral*"))
    return [item for path in found for item in ("--collateral", path)]


@pytest.mark.parametrize("tee", tees.TEES)
def test_show(folder, tee, evidence):
    code, output = run("show", folder / f"{tee}.bin", "--json")
    shown = json.loads(output)
    assert (code, shown["tee"], shown["verified"]) == (0, tee, False)
    assert len(shown["fields"]) > 5
    code, output = run("show", folder / f"{tee}.bin")
    assert code == 0
    assert "NOT verified" in output


@pytest.mark.parametrize("tee", tees.TEES)
def test_verify_without_a_policy(folder, tee):
    arguments = ["verify", folder / f"{tee}.bin", *given(folder, tee), "--at", NOW]
    code, output = run(*arguments, "--simulated-root", folder / "roots.pem", "--json")
    found = json.loads(output)
    assert code == 0
    assert found.keys() >= {
        "tee",
        "tcb_status",
        "advisories",
        "simulated",
        "debug",
        "measurements",
        "steps",
    }
    assert (found["tee"], found["simulated"], found["debug"]) == (tee, True, False)
    assert found["tcb_status"] == ("UpToDate" if tee in ("sgx", "tdx") else None)
    assert all(step.keys() == {"name", "outcome", "detail"} for step in found["steps"])
    code, output = run(*arguments, "--simulated-root", folder / "roots.pem")
    assert code == 0
    assert "no policy" in output
    assert "simulated" in output
    code, output = run(*arguments, "--json")  # the vendors' roots are the default
    assert code == 1
    assert json.loads(output)["error"] == "evidence.simulated"


@pytest.mark.parametrize("tee", tees.TEES)
def test_verify_under_a_policy(folder, tee):
    arguments = ["verify", folder / f"{tee}.bin", *given(folder, tee), "--at", NOW, "--tee", tee]
    code, output = run(*arguments, "--policy", folder / f"{tee}.toml", "--json")
    found = json.loads(output)
    assert code == 0
    assert len(found["policy"]) == 64
    assert {"debug", "max age"} <= {step["name"] for step in found["steps"]}
    assert run(*arguments, "--policy", folder / f"{tee}.toml")[0] == 0
    other = tees.TEES[tees.TEES.index(tee) - 1]
    code, output = run(*arguments, "--policy", folder / f"{other}.toml", "--json")
    refused = json.loads(output)
    assert (code, refused["error"], refused["claim"]) == (1, "appraisal.tee", "tee")
    assert (refused["expected"], refused["actual"]) == (other, tee)
    assert refused["steps"]
    code, output = run(*arguments, "--policy", folder / f"{other}.toml")
    assert code == 1
    assert "REFUSED" in output
    assert "appraisal.tee" in output


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["verify", "sgx.bin"], "usage.collateral"),
        (["verify", "nothing.bin"], "file.read"),
        (["verify", "sgx.bin", "--collateral", "nothing"], "file.read"),
        (["verify", "roots.pem"], "evidence.format"),
        (["show", "roots.pem"], "evidence.format"),
        (["show", "sgx.bin", "--tee", "tdx"], "evidence.tee"),
    ],
)
def test_bad_files(folder, arguments, code):
    here = [folder / each if "." in each and not each.startswith("-") else each for each in arguments]
    found, output = run(*here)
    assert found == 1
    assert code in output


def test_a_policy_and_roots_contradict(folder):
    arguments = ["verify", folder / "sgx.bin", *given(folder, "sgx"), "--policy", folder / "sgx.toml"]
    code, output = run(*arguments, "--simulated-root", folder / "roots.pem")
    assert (code, "usage.roots" in output) == (1, True)


@pytest.mark.parametrize("tee", tees.TEES)
def test_a_refusal_by_the_policy_shows_what_was_passed_and_what_was_not(folder, tee, measured, authority):
    register = {"sgx": "mr_enclave", "tdx": "rtmr3", "snp": "measurement", "nitro": "pcr2"}[tee]
    policy = reference_policy(measured, authority.roots_der, tee)
    size = len(next(iter(getattr(policy, register))))
    other = dataclasses.replace(policy, **{register: frozenset({b"x" * size})})
    (folder / "other.toml").write_text(other.to_toml())
    arguments = ["verify", folder / f"{tee}.bin", *given(folder, tee), "--at", NOW]
    code, output = run(*arguments, "--policy", folder / "other.toml", "--json")
    refused = json.loads(output)
    assert (code, refused["error"], refused["verdict"]) == (1, f"appraisal.{register}", "refused")
    *passed, last = refused["steps"]
    assert {"simulated", "tee", "debug"} <= {step["name"] for step in passed}
    assert {step["outcome"] for step in passed} <= {"ok", "note"}
    assert (last["name"], last["outcome"]) == (register, "refused")
    assert (b"x" * size).hex() in last["detail"]
    code, output = run(*arguments, "--policy", folder / "other.toml")
    assert code == 1
    assert re.search(rf"^{register} +refused  expected 78787878", output, re.MULTILINE)


@pytest.mark.parametrize("tee", tees.TEES)
def test_what_the_evidence_binds(folder, tee, evidence):
    bound = read_signed(evidence[tee].quote).parsed
    raw = bound.user_data if tee == "nitro" else getattr(bound, "body", bound).report_data
    root = ("--simulated-root", folder / "roots.pem")
    arguments = ["verify", folder / f"{tee}.bin", *given(folder, tee), "--at", NOW, *root]
    code, output = run(*arguments)
    assert code == 0
    assert raw.hex() in output
    assert "no --report-data" in output
    code, output = run(*arguments, "--report-data", raw.hex())
    assert (code, "no --report-data" in output) == (0, False)
    code, output = run(*arguments, "--report-data", "00" + raw.hex()[2:], "--json")
    refused = json.loads(output)
    assert (code, refused["error"]) == (1, "binding.report-data")
    assert refused["claim"] == ("user_data" if tee == "nitro" else "REPORTDATA")
    code, output = run(*arguments, "--report-data", "0g")
    assert (code, "usage.report-data" in output) == (1, True)


def test_zeros_behind_the_report_data_may_be_left_out(folder, authority, measured):
    short = tees.evidence(authority, measured, "sgx", b"nonce".ljust(64, b"\0"), NOW)
    (folder / "short.bin").write_bytes(short.quote)
    arguments = ["verify", folder / "short.bin", *given(folder, "sgx"), "--at", NOW]
    root = ("--simulated-root", folder / "roots.pem")
    assert run(*arguments, *root, "--report-data", b"nonce".hex())[0] == 0
    assert run(*arguments, *root, "--report-data", b"nonc".hex())[0] == 1


def test_verdicts(folder):
    arguments = ["verify", folder / "sgx.bin", *given(folder, "sgx"), "--at", NOW, "--json"]
    genuine = json.loads(run(*arguments, "--simulated-root", folder / "roots.pem")[1])
    accepted = json.loads(run(*arguments, "--policy", folder / "sgx.toml")[1])
    assert (genuine["verdict"], genuine["policy"]) == ("genuine", None)
    assert (accepted["verdict"], len(accepted["policy"])) == ("accepted", 64)
    assert accepted["not_after"] <= genuine["not_after"]


def test_real_debug_evidence_is_genuine_and_says_so_loudly():
    folder = VECTORS / "dcap" / "tdx-v4-debug"
    if not folder.exists():
        pytest.skip("no real evidence here")
    at = json.loads((folder / "expected.json").read_text())["verify_at"]
    arguments = ["verify", folder / "quote.bin", "--collateral", folder / "collateral.json", "--at", at]
    code, output = run(*arguments)
    assert (code, "DEBUG: whoever runs this machine" in output) == (0, True)
    found = json.loads(run(*arguments, "--json")[1])
    assert (found["verdict"], found["debug"]) == ("genuine", True)


def test_registers_are_shown_as_policies_name_them(folder):
    fields = json.loads(run("show", folder / "nitro.bin", "--json")[1])["fields"]
    assert all(len(fields[f"pcr{index}"]) == 96 for index in range(3))
    assert not [value for value in fields.values() if str(value).startswith(("{", "b'", "mappingproxy"))]


def test_expired_evidence_shows_how_far_it_came(folder):
    arguments = ["verify", folder / "sgx.bin", *given(folder, "sgx"), "--at", NOW + 60 * 86400]
    code, output = run(*arguments, "--simulated-root", folder / "roots.pem", "--json")
    refused = json.loads(output)
    assert (code, refused["error"]) == (1, "evidence.expired")
    assert [step["name"] for step in refused["steps"]][:2] == ["1 quote", "2 root certificate"]


@pytest.mark.parametrize("name", ["sgx-v3-config-swhardening", "tdx-v4-uptodate", "tdx-v5-uptodate"])
def test_real_quotes_through_the_command(name):
    folder = VECTORS / "dcap" / name
    if not folder.exists():
        pytest.skip("no real evidence here")
    said = json.loads((folder / "expected.json").read_text())
    code, output = run(
        "verify",
        folder / "quote.bin",
        "--collateral",
        folder / "collateral.json",
        "--at",
        said["verify_at"],
        "--json",
    )
    found = json.loads(output)
    assert code == 0
    assert found["tcb_status"] == said["intel_qvl_rules_status"]
    assert found["simulated"] is False
