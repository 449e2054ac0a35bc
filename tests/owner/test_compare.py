"""`cloister measure --compare`: what an auditor is told of a policy that isn't the reference policy."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from cloister.cli.measure import _pins, measure
from cloister.cli.site import reference_policy
from cloister.core.protocol.trust import Consent, UserPolicy
from cloister.core.verifier.anchors import TrustAnchors
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.core.verifier.policy import AllOf, AnyOf
from cloister.errors import AppraisalRefused, UsageError
from cloister.owner.policy import ModelPolicy
from cloister.sim.authority import SimulatedAuthority
from cloister.sim.measurement import measure as measure_role

MEASURED = cache(measure_role)
TEES = ("sgx", "tdx", "snp", "nitro")
SERVICE = b"Z" * 32
Reference = Callable[..., AppraisalPolicy]
Compare = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source doesn't change meanwhile."""
    monkeypatch.setattr("cloister.sim.measurement.measure", MEASURED)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return SimulatedAuthority.create(tmp_path_factory.mktemp("sim"), now=int(time.time())).roots_der


@pytest.fixture
def reference(roots: bytes) -> Reference:
    """Makes the reference policy of a role, changed as a test wants it."""

    def make(role: str = "worker", tee: str = "sgx", **changes: Any) -> AppraisalPolicy:
        made = reference_policy(MEASURED(role), roots, tee)
        names = AppraisalPolicy.__dataclass_fields__
        return AppraisalPolicy(**{name: getattr(made, name) for name in names} | changes)

    return make


@pytest.fixture
def compare(reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Compares a user policy with this worker: the JSON object, with ``exit``."""

    def run(worker: AppraisalPolicy, **others: Any) -> dict[str, Any]:
        parts = {"service": SERVICE, "key_service": reference("key-service"), "worker": worker} | others
        return run_text(tmp_path, capsys, UserPolicy(**parts).to_toml())

    return run


def run_text(folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> dict[str, Any]:
    path = folder / "policy.toml"
    path.write_text(text)
    ended = 0
    try:
        measure(compare=path, as_json=True)
    except typer.Exit as error:
        ended = error.exit_code
    return {**json.loads(capsys.readouterr().out), "exit": ended}


def shown(path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What people see of a policy."""
    path.write_text(text)
    measure(compare=path)
    return " ".join(capsys.readouterr().out.split())


def weaker(found: dict[str, Any]) -> list[tuple[str, str]]:
    assert (found["error"], found["exit"]) == ("measure.weaker", 1)
    rows = [(row["section"], row["key"]) for row in found["weaker"]]
    assert found["claim"] == ", ".join(f"{section}.{key}" for section, key in rows)
    assert all(row["reference"] and row["found"] for row in found["weaker"])
    assert "match" not in found
    return rows


# -- what matches ------------------------------------------------------------------


@pytest.mark.parametrize("tee", TEES)
def test_the_reference_policy_matches(compare, reference, roots, tee):
    found = compare(reference(tee=tee))
    assert (found["match"], found["exit"]) == (True, 0)
    fingerprints = [each.fingerprint.hex() for (each,) in TrustAnchors.simulated(roots).roots.values()]
    assert found["roots"] == {"key_service": fingerprints, "worker": fingerprints}
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    ("tee", "changes"),
    [
        ("sgx", {"max_age": 60}),
        ("sgx", {"any_platform": False, "platforms": frozenset({b"fmspc6"})}),
        ("sgx", {"denied_advisories": frozenset({"INTEL-SA-00615"}), "min_tcb_evaluation": 17}),
        ("sgx", {"attributes_mask": b"\xff" * 16}),
        ("tdx", {"mr_owner": frozenset({bytes(48)})}),
        ("snp", {"any_tcb": False, "min_snp": 9, "any_platform": False, "products": frozenset({"Genoa"})}),
        ("nitro", {"max_age": 300, "pcr8": frozenset({bytes(48)})}),
    ],
)
def test_a_stricter_policy_matches(compare, reference, tee, changes):
    assert compare(reference(tee=tee, **changes))["match"] is True


def test_people_see_what_is_not_judged(reference, roots, tmp_path, capsys):
    key_service, worker = reference("key-service"), reference()
    user = UserPolicy(service=SERVICE, key_service=key_service, worker=worker).to_toml()
    path = tmp_path / "policy.toml"
    text = shown(path, user, capsys)
    assert text.startswith("match: ")
    assert f"not judged: whether {SERVICE.hex()} is the service" in text
    assert "[key_service] and [worker] stand under SIMULATED ROOTS, sha256 " in text
    assert "whoever has their keys can forge everything" in text
    for (root,) in TrustAnchors.simulated(roots).roots.values():
        assert root.fingerprint.hex() in text
    model = shown(path, ModelPolicy(release=worker, key_service=key_service).to_toml(), capsys)
    assert "[key_service] and [release] stand under SIMULATED ROOTS" in model
    assert "not judged" not in model
    mixed = re.sub(r'dangerous_simulated_roots = """.*?"""\n', "", user, count=1, flags=re.DOTALL)
    text = shown(path, mixed, capsys)
    assert "[key_service] stand under the vendors' roots" in text
    assert "no hardware meets this policy" in text
    assert "[worker] stand under SIMULATED ROOTS" in text


# -- what is weaker ----------------------------------------------------------------

WEAKER: list[tuple[str, str, dict[str, Any]]] = [
    ("sgx", "allowed_tcb", {"allowed_tcb": frozenset({"UpToDate", "OutOfDate"})}),
    ("sgx", "attributes", {"attributes": bytes(16), "attributes_mask": b"\x02" + bytes(15)}),
    ("sgx", "max_age", {"max_age": 366 * 86400}),
    ("tdx", "allowed_tcb", {"allowed_tcb": frozenset({"OutOfDate"})}),
    ("tdx", "td_attributes", {"td_attributes_mask": b"\x01\0\0\x30" + bytes(4)}),
    ("tdx", "mr_config_id", {"mr_config_id": frozenset({bytes(48), b"x" * 48})}),
    ("tdx", "mr_service_td", {"mr_service_td": frozenset({b"x" * 48})}),
    ("tdx", "max_age", {"max_age": 366 * 86400}),
    ("snp", "guest_policy", {"guest_policy": 0x30000, "guest_policy_mask": 0xF0000}),
    ("snp", "max_vmpl", {"max_vmpl": 3}),
    ("snp", "allow_vlek", {"allow_vlek": True}),
    ("snp", "allow_missing_crl", {"allow_missing_crl": True}),
    ("nitro", "max_age", {"max_age": 2678401}),
]


@pytest.mark.parametrize(("tee", "key", "changes"), WEAKER)
def test_a_weaker_key_is_named(compare, reference, tee, key, changes):
    assert weaker(compare(reference(tee=tee, **changes))) == [("[worker]", key)]


def test_every_weaker_key_is_listed(compare, reference, tmp_path, capsys):
    policies = {
        "key_service": reference("key-service", max_age=366 * 86400),
        "consent": Consent(allow_outside_stages=True),
    }
    worker = reference(
        allowed_tcb=frozenset({"OutOfDate"}), attributes=bytes(16), attributes_mask=b"\x02" + bytes(15)
    )
    keys = [
        ("[key_service]", "max_age"),
        ("[worker]", "attributes"),
        ("[worker]", "allowed_tcb"),
        ("[consent]", "allow_outside_stages"),
    ]
    found = compare(worker, **policies)
    assert weaker(found) == keys
    assert found["roots"].keys() == {"key_service", "worker"}
    path = tmp_path / "policy.toml"
    with pytest.raises(AppraisalRefused) as caught:
        measure(compare=path)
    assert caught.value.code == "measure.weaker"
    assert str(path) in str(caught.value)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["section", "key", "reference", "found"]
    assert [tuple(line[:2]) for line in lines[2:]] == keys


def test_a_weaker_release_of_a_model_policy(reference, tmp_path, capsys):
    release = reference(max_age=366 * 86400)
    text = ModelPolicy(release=release, key_service=reference("key-service")).to_toml()
    assert weaker(run_text(tmp_path, capsys, text)) == [("[release]", "max_age")]


@pytest.mark.parametrize("join", [AnyOf, AllOf])
def test_a_weaker_member_is_named(compare, reference, join):
    name = "any_of" if join is AnyOf else "all_of"
    old = reference(tee="tdx", max_age=366 * 86400)
    assert compare(join(reference(), reference(max_age=60)))["match"] is True
    assert weaker(compare(join(reference(), old))) == [(f"[worker].{name}[2]", "max_age")]
    nested = join(AnyOf(reference(max_age=60), old), reference())
    assert weaker(compare(nested)) == [(f"[worker].{name}[1].any_of[2]", "max_age")]


# -- what differs ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tee", "claim", "changes"),
    [
        ("sgx", "mr_enclave", {"mr_enclave": frozenset({b"x" * 32})}),
        ("sgx", "isv_prod_id", {"isv_prod_id": 7}),
        ("sgx", "min_isv_svn", {"min_isv_svn": 0}),
        ("sgx", "mr_signer", {"mr_signer": frozenset({b"x" * 32})}),
        ("tdx", "rtmr3", {"rtmr3": frozenset({b"x" * 48})}),
        ("snp", "measurement", {"measurement": frozenset({b"x" * 48})}),
        ("nitro", "pcr2", {"pcr2": frozenset({b"x" * 48})}),
    ],
)
def test_other_measurements_are_refused_before_anything_else(compare, reference, tee, claim, changes):
    with pytest.raises(AppraisalRefused) as caught:
        compare(reference(tee=tee, **changes, max_age=366 * 86400))
    assert (caught.value.code, caught.value.claim) == ("measure.difference", f"[worker].{claim}")
    with pytest.raises(AppraisalRefused) as caught:
        compare(AnyOf(reference(), reference(tee=tee, **changes)))
    assert caught.value.claim == f"[worker].any_of[2].{claim}"


def test_one_measurement_too_many(compare, reference):
    (ours,) = reference().mr_enclave
    with pytest.raises(AppraisalRefused) as caught:
        compare(reference(mr_enclave=frozenset({ours, b"x" * 32})))
    assert caught.value.actual == ", ".join(sorted((ours.hex(), (b"x" * 32).hex())))
    assert "manifest" in caught.value.hint


def test_a_policy_for_hardware_is_pointed_to_the_build(compare, reference):
    worker = reference(mr_enclave=frozenset({b"x" * 32}), dangerous_simulated_roots=None)
    with pytest.raises(AppraisalRefused) as caught:
        compare(worker)
    assert "deploy/README.md" in caught.value.hint


def test_a_file_that_no_command_would_take_is_not_compared(compare, reference, tmp_path, capsys):
    compare(reference())
    text = (tmp_path / "policy.toml").read_text()
    for change, code in (
        (("[consent]", "[consent]\nallow_all = true"), "policy.consent"),
        ((SERVICE.hex(), "SERVICE ID"), "policy.service"),
        (("[worker]", "[other]"), "policy.keys"),
        (("[worker]", "worker = 1\n[consent]\n[release]"), "policy.format"),
    ):
        with pytest.raises(UsageError) as caught:
            run_text(tmp_path, capsys, text.replace(*change))
        assert caught.value.code == code
        assert str(tmp_path) in str(caught.value)


# -- what the hint says of distributions -----------------------------------------------


def refusal(folder: Path, user: UserPolicy) -> AppraisalRefused:
    path = folder / "policy.toml"
    path.write_text(user.to_toml())
    with pytest.raises(AppraisalRefused) as caught:
        measure(compare=path)
    assert caught.value.code == "measure.difference"
    return caught.value


def test_another_version_than_the_pinned_one_is_named(reference, tmp_path, monkeypatch):
    other = UserPolicy(
        service=SERVICE,
        key_service=reference("key-service"),
        worker=reference(mr_enclave=frozenset({bytes(32)})),
    )
    versions = {name: each["version"] for name, each in MEASURED("worker").manifest["distributions"].items()}
    monkeypatch.setattr(
        "cloister.cli.measure._pins", lambda: {name: {each} for name, each in versions.items()}
    )
    assert "The versions are those of requirements/demo.txt" in refusal(tmp_path, other).hint
    pins = {name: {each} for name, each in versions.items()} | {"protobuf": {"1.0", "2.0"}}
    monkeypatch.setattr("cloister.cli.measure._pins", lambda: pins)
    hint = refusal(tmp_path, other).hint
    assert f"Not the pinned versions: protobuf {versions['protobuf']} (pinned: 1.0 or 2.0)." in hint
    monkeypatch.setattr("cloister.cli.measure._pins", lambda: None)
    assert f"protobuf {versions['protobuf']}" in refusal(tmp_path, other).hint


def test_the_pins_of_this_checkout_are_found():
    pins = _pins()
    assert pins is not None
    assert {"protobuf", "numpy", "onnxruntime", "uvloop"} <= pins.keys()
