"""Evidence and collateral in the forms in which people have them, and the commands that read them."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path

import cbor2
import pytest
from typer.testing import CliRunner

from cloister.cli.app import app
from cloister.cli.output import table
from cloister.cli.site import reference_policy
from cloister.core.evidence.bundle import Collateral
from cloister.core.verifier import TrustAnchors, verify
from cloister.core.verifier.anchors import split_certificates
from cloister.core.verifier.chain import read_pem, to_pem
from cloister.errors import CloisterError, EvidenceError, UsageError
from cloister.party.evidence import MAX_FILE, read_evidence, read_signed
from cloister.sim import tees
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.measurement import measure

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
    with pytest.raises(UsageError):
        read_signed(bytes(MAX_FILE + 1))
    with pytest.raises(UsageError):
        read_evidence(evidence["snp"].quote, [bytes(MAX_FILE + 1)])


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
