"""The examples of appraisal policies in docs/policies.md are what they say, and its tables name every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.core.verifier.claims import CLAIMS
from cloister.core.verifier.forms import FORMS
from cloister.errors import AppraisalRefused

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^```toml\n# (TDX|SEV-SNP|Nitro|any_of|all_of)\n(.*?)^```$", TEXT, re.M | re.S))
TEES = {"TDX": "tdx", "SEV-SNP": "snp", "Nitro": "nitro"}


def example(name: str) -> AppraisalPolicy:
    return AppraisalPolicy.from_toml(EXAMPLES[name])


@pytest.mark.parametrize(("name", "tee"), TEES.items())
def test_an_example_for_each_tee(name, tee):
    policy = example(name)
    assert policy.tee == tee
    assert not policy.anchors.is_simulated
    assert AppraisalPolicy.from_toml(policy.to_toml()) == policy
    policy.admits(policy)


def test_any_of_is_about_an_enclave_of_either_kind():
    policy = example("any_of")
    assert [member.tee for member in policy.any_of] == ["sgx", "nitro"]
    for member in policy.any_of:
        policy.admits(member)
        with pytest.raises(AppraisalRefused):
            member.admits(policy)


def test_all_of_is_what_both_reviewers_accept():
    policy = example("all_of")
    broad, narrow = policy.all_of
    policy.admits(narrow)
    broad.admits(policy)
    narrow.admits(policy)
    with pytest.raises(AppraisalRefused):
        policy.admits(broad)


def test_the_same_enclave_in_three_examples():
    nitro = example("Nitro")
    example("any_of").admits(nitro)
    example("all_of").admits(nitro)


def test_the_tables_name_every_key():
    keys = set(re.findall(r"^\| `([a-z0-9_]+)` \|", TEXT, re.MULTILINE))
    assert {name for claims in CLAIMS.values() for claim in claims for name in claim.fields} <= keys
    assert FORMS.keys() | {"tee", "any_of", "all_of"} <= keys
