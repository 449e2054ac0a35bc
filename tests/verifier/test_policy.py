"""Appraisal policies: what is invalid, the forms they travel in, and which one admits more."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.core import encoding
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.core.verifier.roots import intel
from cloister.core.verifier.subset import compare_claims
from cloister.errors import AppraisalRefused, CloisterError, UsageError

VALID = """
tee = "sgx"
mr_enclave = ["{e}"]
attributes = "05000000000000000000000000000000"
attributes_mask = "ffffffffffffffff0000000000000000"
isv_prod_id = 0
min_isv_svn = 0
allowed_tcb = ["UpToDate", "SWHardeningNeeded"]
denied_advisories = []
any_platform = true
""".format(e="ab" * 32)


def with_line(line: str) -> str:
    name = line.split("=", maxsplit=1)[0].strip()
    kept = [old for old in VALID.splitlines() if old.split("=")[0].strip() != name]
    return "\n".join([*kept, line])


def invalid(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        AppraisalPolicy.from_toml(text)
    return caught.value.code


def test_form_in_the_documentation():
    policy = AppraisalPolicy.from_toml(VALID)
    assert policy.mr_enclave == {b"\xab" * 32}
    assert policy.allowed_tcb == {"UpToDate", "SWHardeningNeeded"}
    assert policy.any_platform
    assert not policy.anchors.is_simulated


@pytest.mark.parametrize("text", ["", "# nothing\n", 'tee = ""', "any_platform = false"])
def test_empty_file(text):
    assert invalid(text) == "policy.empty"


def test_empty_policy_has_no_other_form():
    for write in (AppraisalPolicy().to_data, AppraisalPolicy().to_toml, lambda: AppraisalPolicy().digest):
        with pytest.raises(UsageError) as caught:
            write()
        assert caught.value.code == "policy.empty"


def test_unknown_key():
    assert invalid(VALID + "mr_enclaves = []") == "policy.unknown-key"


@pytest.mark.parametrize(
    "text", ["a." * 99 + "a = 1", "x" * 300_000, "tee = ", "tee = 'sgx'\ntee = 'sgx'", "x" * 70000, "\0"]
)
def test_file_that_is_not_toml(text):
    assert invalid(text) == "policy.format"


@pytest.mark.parametrize(
    "name", ["tee", "mr_enclave", "attributes", "attributes_mask", "allowed_tcb", "any_platform"]
)
def test_complete_reference_values_are_demanded(name):
    text = "\n".join(line for line in VALID.splitlines() if not line.startswith(f"{name} "))
    assert invalid(text) == f"policy.{'platforms' if name == 'any_platform' else name}"


@pytest.mark.parametrize(
    "line",
    [
        'tee = "other"',
        "tee = 1",
        "mr_enclave = []",
        'mr_enclave = "{}"'.format("ab" * 32),
        'mr_enclave = ["abcd"]',
        'mr_enclave = ["{}"]'.format("ab " * 32),
        'mr_enclave = ["{}"]'.format("zz" * 32),
        'mr_enclave = ["{0}", "{0}"]'.format("ab" * 32),
        "mr_enclave = [1]",
        'attributes = "05"',
        'attributes = "07000000000000000000000000000000"',
        'attributes = "05000000000000000100000000000000"',
        "attributes = 5",
        'attributes_mask = "fdffffffffffffff0000000000000000"',
        'attributes_mask = ""',
        "isv_prod_id = -1",
        "isv_prod_id = 65536",
        "isv_prod_id = 0.0",
        "isv_prod_id = nan",
        "isv_prod_id = inf",
        "isv_prod_id = true",
        'isv_prod_id = "0"',
        "min_isv_svn = 1e3",
        "min_isv_svn = 2026-01-01",
        "min_tcb_evaluation = -1",
        "max_age = 0",
        "max_age = inf",
        "allowed_tcb = []",
        'allowed_tcb = ["Revoked"]',
        'allowed_tcb = ["uptodate"]',
        'allowed_tcb = "UpToDate"',
        "allowed_tcb = [[]]",
        'denied_advisories = [""]',
        'denied_advisories = ["a b"]',
        "denied_advisories = 1",
        'mr_signer = ["00"]',
        "any_platform = 1",
        'any_platform = "true"',
        "dangerous_simulated_roots = true",
        'dangerous_simulated_roots = ""',
        'dangerous_simulated_roots = "-----BEGIN CERTIFICATE-----"',
    ],
)
def test_value_that_is_wrong(line):
    assert invalid(with_line(line)) == f"policy.{line.split(chr(32))[0]}"


def test_platforms_and_any_platform_contradict():
    assert invalid(VALID + 'platforms = ["00906ea10000"]') == "policy.platforms"


def test_vendor_root_is_no_simulated_root(policy):
    with pytest.raises(UsageError) as caught:
        replace(policy, dangerous_simulated_roots=intel.INTEL_SGX_ROOT)
    assert caught.value.code == "anchors.simulated-root"


@pytest.mark.parametrize(
    "change",
    [
        {"mr_enclave": [b"e" * 32]},
        {"mr_enclave": {b"e" * 32}},
        {"mr_enclave": frozenset({"e" * 32})},
        {"attributes": "05" * 16},
        {"dangerous_simulated_roots": "PEM"},
        {"denied_advisories": frozenset({b"x"})},
        {"max_age": True},
    ],
)
def test_constructor_checks_types(change, policy):
    with pytest.raises(UsageError):
        replace(policy, **change)


def test_toml_round_trip(policy):
    for each in (policy, AppraisalPolicy.from_toml(VALID), replace(policy, dangerous_simulated_roots=None)):
        assert AppraisalPolicy.from_toml(each.to_toml()) == each


def test_data_round_trip_is_canonical(policy):
    raw = encoding.encode(policy.to_data())
    again = AppraisalPolicy.from_data(encoding.decode(raw, what="policy"))
    assert again == policy
    assert again.digest == policy.digest == encoding.digest(policy.to_data())


def test_digest_names_every_field(policy):
    changes = [
        {"mr_enclave": frozenset({b"x" * 32})},
        {"attributes": bytes(16)},
        {"attributes_mask": b"\xff" * 16},
        {"mr_signer": frozenset()},
        {"isv_prod_id": 1},
        {"min_isv_svn": 1},
        {"allowed_tcb": frozenset({"OutOfDate"})},
        {"denied_advisories": frozenset({"INTEL-SA-00001"})},
        {"min_tcb_evaluation": 1},
        {"platforms": frozenset({b"OTHER!"})},
        {"platforms": frozenset(), "any_platform": True},
        {"max_age": 1},
        {"dangerous_simulated_roots": None},
    ]
    digests = {replace(policy, **change).digest for change in changes} | {policy.digest}
    assert len(digests) == len(changes) + 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data | {"more": 1},
        lambda data: {name: value for name, value in data.items() if name != "max_age"},
        lambda data: data | {"kind": "cloister/v2/appraisal-policy"},
        lambda data: data | {"allowed_tcb": ["UpToDate", "OutOfDate"]},
        lambda data: data | {"allowed_tcb": ["UpToDate", "UpToDate"]},
        lambda data: data | {"allowed_tcb": [b"UpToDate"]},
        lambda data: data | {"allowed_tcb": [["UpToDate"]]},
        lambda data: data | {"allowed_tcb": {}},
        lambda data: data | {"mr_enclave": ["e" * 32]},
        lambda data: data | {"mr_enclave": []},
        lambda data: list(data.items()),
        lambda data: None,
    ],
)
def test_data_that_is_no_policy(spoil, policy):
    with pytest.raises(UsageError):
        AppraisalPolicy.from_data(spoil(policy.to_data()))


@given(st.text(max_size=200))
def test_any_text_gives_a_policy_or_our_error(text):
    with contextlib.suppress(CloisterError):
        AppraisalPolicy.from_toml(text)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=40) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@given(
    name=st.sampled_from([*AppraisalPolicy.__dataclass_fields__, "kind"]),
    value=PLAIN,
)
def test_any_field_gives_a_policy_or_our_error(name, value, policy):
    data = policy.to_data() | {name: value}
    try:
        again = AppraisalPolicy.from_data(data)
    except CloisterError:
        return
    assert again.to_data() == data


def test_policy_admits_itself(policy):
    policy.admits(policy)
    AppraisalPolicy.from_toml(VALID).admits(AppraisalPolicy.from_toml(VALID))


@pytest.mark.parametrize(
    "change",
    [
        {"min_isv_svn": 4},
        {"min_tcb_evaluation": 9},
        {"max_age": 60},
        {"denied_advisories": frozenset({"INTEL-SA-00001"})},
        {"attributes_mask": b"\xff" * 16},
    ],
)
def test_policy_admits_a_narrower_one(change, policy):
    narrower = replace(policy, **change)
    policy.admits(narrower)
    with pytest.raises(AppraisalRefused) as caught:
        narrower.admits(policy)
    assert caught.value.code == "appraisal.not-subset"


@pytest.mark.parametrize(
    ("claim", "broader", "narrower"),
    [
        ("mr_enclave", {}, {"mr_enclave": frozenset({b"e" * 32, b"x" * 32})}),
        ("mr_signer", {}, {"mr_signer": frozenset()}),
        ("mr_signer", {}, {"mr_signer": frozenset({b"x" * 32})}),
        ("isv_prod_id", {}, {"isv_prod_id": 8}),
        ("min_isv_svn", {}, {"min_isv_svn": 2}),
        ("allowed_tcb", {}, {"allowed_tcb": frozenset({"UpToDate", "OutOfDate"})}),
        ("denied_advisories", {"denied_advisories": frozenset({"INTEL-SA-00001"})}, {}),
        ("min_tcb_evaluation", {"min_tcb_evaluation": 5}, {}),
        ("platforms", {}, {"platforms": frozenset(), "any_platform": True}),
        ("platforms", {}, {"platforms": frozenset({b"OTHER!"})}),
        ("max_age", {"max_age": 60}, {}),
        ("attributes", {}, {"attributes": bytes([4]) + bytes(15)}),
        ("attributes", {}, {"attributes_mask": b"\xff" * 7 + bytes(9)}),
        ("simulated", {"dangerous_simulated_roots": None}, {}),
        ("simulated", {}, {"dangerous_simulated_roots": None}),
    ],
)
def test_policy_does_not_admit_a_broader_one(claim, broader, narrower, policy):
    with pytest.raises(AppraisalRefused) as caught:
        replace(policy, **broader).admits(replace(policy, **narrower))
    assert (caught.value.code, caught.value.claim) == ("appraisal.not-subset", claim)


def test_every_claim_that_admits_more_is_listed(policy, other_authority):
    def claims(narrower: AppraisalPolicy) -> list[str]:
        return [refusal.claim for refusal in compare_claims(policy, narrower)]

    assert claims(policy) == claims(replace(policy, max_age=60)) == []
    wide = {"mr_signer": frozenset(), "allowed_tcb": frozenset({"OutOfDate"}), "max_age": 366 * 86400}
    assert claims(replace(policy, **wide)) == ["mr_signer", "allowed_tcb", "max_age"]
    vendors = replace(policy, **wide, dangerous_simulated_roots=None)
    assert claims(vendors) == ["simulated", "trust anchors", "mr_signer", "allowed_tcb", "max_age"]
    others = replace(policy, dangerous_simulated_roots=other_authority.roots_der)
    assert claims(others) == ["trust anchors"]
    with pytest.raises(AppraisalRefused) as caught:
        policy.admits(replace(policy, **wide))
    assert caught.value.claim == "mr_signer"


def test_policies_of_two_tees_have_no_claims_to_compare(policy):
    pcrs = {f"pcr{index}": frozenset({bytes(48)}) for index in range(3)}
    (refusal,) = compare_claims(policy, AppraisalPolicy(tee="nitro", **pcrs))
    assert (refusal.code, refusal.claim) == ("appraisal.not-subset", "tee")


def test_policies_with_different_simulated_roots(policy, other_authority):
    with pytest.raises(AppraisalRefused) as caught:
        policy.admits(replace(policy, dangerous_simulated_roots=other_authority.roots_der))
    assert caught.value.claim == "trust anchors"


def test_any_platform_and_any_signer_admit_listed_ones(policy):
    replace(policy, platforms=frozenset(), any_platform=True, mr_signer=frozenset()).admits(policy)


def test_an_empty_policy_is_not_compared(policy):
    for broader, narrower in ((AppraisalPolicy(), policy), (policy, AppraisalPolicy())):
        with pytest.raises(AppraisalRefused):
            broader.admits(narrower)
