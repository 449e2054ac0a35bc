"""Errors of policy files say where: the file, the section, the joined policy, the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloister.cli.policies import read_appraisal_policy, read_model_policy, read_policy, read_user_policy
from cloister.core.protocol.trust import UserPolicy
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.core.verifier.policy import AllOf, AnyOf
from cloister.errors import UsageError
from cloister.owner.policy import ModelPolicy
from support.realm import KEY_SERVICE, WORKER, policy

KEYS = policy(KEY_SERVICE)
LAST = policy(WORKER, max_age=4711, mr_signer=frozenset({b"x" * 32}))
BARE = AnyOf(policy(WORKER), AllOf(policy(WORKER), LAST))
USER = UserPolicy(service=b"s" * 32, key_service=KEYS, worker=BARE).to_toml()
MODEL = ModelPolicy(release=BARE, key_service=KEYS).to_toml()


def refused(read: Callable[..., Any], *arguments: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        read(*arguments)
    return caught.value


SIGNER = f'mr_signer = ["{"78" * 32}"]'


@pytest.mark.parametrize(
    ("old", "new", "code", "key"),
    [
        ("max_age = 4711", "max_age = 0", "policy.max_age", "max_age"),
        ("max_age = 4711", "max_agee = 4711", "policy.unknown-key", "max_agee"),
        ("max_age = 4711", "any_of = []", "policy.any_of", "any_of"),
        ("max_age = 4711", "mr_td = []", "policy.unknown-key", "mr_td"),
        (SIGNER, 'mr_signer = ["78"]', "policy.mr_signer", "mr_signer"),
        (SIGNER, "mr_signer = 78", "policy.mr_signer", "mr_signer"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "text", "section"),
    [
        (AppraisalPolicy, BARE.to_toml(), ""),
        (UserPolicy, USER, "[worker]."),
        (ModelPolicy, MODEL, "[release]."),
    ],
)
def test_an_error_names_section_and_member(kind, text, section, old, new, code, key):
    assert text.count(old) == 1
    error = refused(kind.from_toml, text.replace(old, new))
    assert (error.code, error.claim) == (code, f"{section}any_of[2].all_of[2].{key}")
    assert error.claim in str(error)


def test_errors_of_whole_tables():
    for text, code, claim in (
        ("any_of = [1, 2]", "policy.empty", "any_of[1]"),
        ("[[any_of]]\n[[any_of]]", "policy.empty", "any_of[1]"),
        ("any_of = 1", "policy.any_of", "any_of"),
        ("", "policy.empty", ""),
    ):
        error = refused(AppraisalPolicy.from_toml, text)
        assert (error.code, error.claim) == (code, claim)
    service = f'service = "{"a" * 64}"\n'
    for text, code, claim in (
        (service + "[key_service]\n[worker]", "policy.empty", "[key_service]"),
        (service + "worker = 1\n[key_service]", "policy.empty", "[key_service]"),
        (service + "key_service = 1\n[worker]", "policy.format", "[key_service]"),
        (service + KEYS.to_toml("key_service") + "[worker]", "policy.empty", "[worker]"),
        (USER.replace("[consent]", "[consent]\nx = 1"), "policy.consent", "[consent].x"),
        (USER.replace("stages = false", "stages = 1"), "policy.consent", "[consent].allow_outside_stages"),
    ):
        error = refused(UserPolicy.from_toml, text)
        assert (error.code, error.claim) == (code, claim)


def test_the_same_mistake_in_two_sections_is_the_first_ones():
    """A section is named because it was being read, not because its error looks the same."""
    text = ModelPolicy(release=KEYS, key_service=KEYS).to_toml().replace("max_age = ", "max_age = -")
    assert refused(ModelPolicy.from_toml, text).claim == "[release].max_age"
    key_service = text.index("[key_service]")
    text = text[:key_service].replace("= -", "= ") + text[key_service:]
    assert refused(ModelPolicy.from_toml, text).claim == "[key_service].max_age"


# -- as commands say it --------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "text", "section"),
    [
        (read_appraisal_policy, BARE.to_toml(), ""),
        (read_user_policy, USER, "[worker]."),
        (read_model_policy, MODEL, "[release]."),
        (read_policy, USER, "[worker]."),
        (read_policy, MODEL, "[release]."),
    ],
)
def test_a_command_names_the_file_as_well(tmp_path: Path, read, text, section):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    assert read(path).to_toml() == text
    place = f"{section}any_of[2].all_of[2]"
    path.write_text(text.replace("max_age = 4711", "max_agee = 4711"))
    error = refused(read, path)
    assert str(error).startswith(f"{path}: {place}.max_agee: unknown key ")
    assert error.hint == "Did you mean max_age instead of max_agee?"
    path.write_text(text.replace(SIGNER, 'mr_signer = ["78ab"]'))
    error = refused(read, path)
    assert str(error).startswith(f"{path}: {place}.mr_signer: ")
    assert (error.expected, error.actual) == ("64 hex digits", "4 characters: 78ab")
    path.write_text("= no TOML")
    assert str(refused(read, path)).startswith(f"{path}: the ")
    path.write_text("")
    assert str(refused(read, path)).startswith(f"{path}: ")


def test_a_command_says_what_may_be_meant(tmp_path: Path):
    path = tmp_path / "policy.toml"
    for text, code, meant in (
        (USER.replace("service = ", "servce = ", 1), "policy.keys", "service instead of servce"),
        (USER.replace("allow_shared", "alow_shared"), "policy.consent", "allow_shared_pools instead of alow"),
        (USER.replace("any_of", "anyof"), "policy.unknown-key", "any_of instead of anyof"),
        (USER.replace('tee = "sgx"', 'tee = "sgx"\nmrenclave = []', 1), "policy.unknown-key", "mr_enclave "),
    ):
        path.write_text(text)
        error = refused(read_user_policy, path)
        assert error.code == code
        assert f"Did you mean {meant}" in error.hint
    path.write_text(USER.replace("service", "nothing", 1).replace("worker", "xyz"))
    assert "Did you mean" not in refused(read_user_policy, path).hint
