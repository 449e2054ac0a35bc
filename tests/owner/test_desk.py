"""The owner's desk and policy files: what is refused, and that nothing on it is readable by others."""

from __future__ import annotations

import base64
import dataclasses
import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.core.protocol.conversation import Conversation, Trust
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.statement import ServingOptions, SignedStatement
from cloister.core.secret import Secret
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.errors import FormatError, UsageError
from cloister.owner.desk import Desk, DeskModel
from cloister.owner.policy import ModelPolicy
from cloister.owner.seal import seal_model
from support.realm import KEY_SERVICE, NOW, STRANGER, WORKER, owner_key, policy, sealed_model, statement
from support.stage import DIGITS

LABEL = "cloister-owner-key-v1"


def refused(code, work):
    with pytest.raises(UsageError) as caught:
        work()
    assert caught.value.code == code, str(caught.value)
    return caught.value


def model(**changes) -> DeskModel:
    fields = {"name": "digits", "key": Secret(b"K" * 32), "sealed": sealed_model()}
    return DeskModel(**{**fields, **changes})


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_desk_is_made_once_and_private(tmp_path):
    old = os.umask(0)
    try:
        desk = Desk.create(tmp_path / "a" / "desk")
        desk.keep(model())
        desk.remember(talk(TreeHead.sign(owner_key("service"), size=1, root=bytes(32), time=1)))
    finally:
        os.umask(old)
    assert mode(desk.directory) == 0o700
    assert {mode(path) for path in desk.directory.iterdir()} == {0o600}
    before = (desk.directory / "owner.key").read_bytes()
    refused("owner.desk", lambda: Desk.create(desk.directory))
    assert (desk.directory / "owner.key").read_bytes() == before
    assert Desk.open(desk.directory).owner == desk.owner


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        LABEL.encode(),
        f"{LABEL} !!".encode(),
        f"{LABEL} {base64.b64encode(bytes(31)).decode()}".encode(),
        f"{LABEL} {base64.b64encode(bytes(33)).decode()}".encode(),
        f"other {base64.b64encode(bytes(32)).decode()}".encode(),
    ],
)
def test_a_file_that_is_no_owner_key(tmp_path, content):
    (tmp_path / "owner.key").write_bytes(content)
    refused("owner.key", lambda: Desk.open(tmp_path))


def test_unreadable(tmp_path):
    assert "owner init" in refused("owner.key", lambda: Desk.open(tmp_path / "none")).hint
    (tmp_path / "file").write_text("")
    refused("owner.desk", lambda: Desk.create(tmp_path / "file" / "below"))


def test_models_are_kept_whole(desk):
    signed = SignedStatement.sign(statement(bytes(32)), owner_key())
    for kept in (model(), model(statement=signed, pool=b"p" * 32)):
        desk.keep(kept)
        assert desk.model("digits") == kept
    assert desk.models() == ["digits"]
    assert [path.name for path in desk.directory.iterdir() if path.name.startswith(".")] == []
    assert model().current() is None
    assert model(statement=signed).current() == statement(bytes(32))


@pytest.mark.parametrize("name", ["", "..", "../owner", "a/b", "A", "a\0b", "owner.key/", "-x"])
def test_a_name_that_would_leave_the_desk(desk, name):
    with pytest.raises(UsageError):
        desk.model(name)
    with pytest.raises(UsageError):
        seal_model(desk, name, DIGITS, desk.directory / "out")
    assert not (desk.directory / "out").exists()


def test_a_model_that_is_not_there_or_damaged(desk):
    assert "owner seal" in refused("owner.model", lambda: desk.model("digits")).hint
    desk.keep(model())
    path = desk.directory / "digits.model"
    path.write_bytes(path.read_bytes()[:-1])
    error = refused("owner.model", lambda: desk.model("digits"))
    assert "KKKK" not in str(error)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_any_bytes_are_no_desk_file(raw):
    with pytest.raises(FormatError):
        DeskModel.from_bytes(raw)


def talk(head: TreeHead) -> Conversation:
    return Conversation(trust=Trust(service=head.service, key_service=AppraisalPolicy()), head=head)


def test_memory(desk):
    service = owner_key("service")
    assert desk.memory(service.thumbprint).head is None
    head = TreeHead.sign(service, size=3, root=bytes(32), time=NOW)
    desk.remember(talk(head))
    assert desk.memory(service.thumbprint).head == head
    assert desk.memory(bytes(32)).head is None
    next(desk.directory.glob("*.memory")).write_bytes(b"x")
    refused("memory.file", lambda: desk.memory(service.thumbprint))


def test_nothing_secret_is_shown(desk):
    shown = repr(desk.key) + repr(model()) + str(model())
    assert "KKKK" not in shown
    assert "<Secret, 32 B>" in shown


def test_a_damaged_or_full_desk(desk):
    gone = dataclasses.replace(model(), name="x")
    for path in desk.directory.iterdir():
        path.unlink()
    desk.directory.rmdir()
    refused("owner.desk", lambda: desk.keep(gone))


# -- sealing -------------------------------------------------------------------


def test_sealing_keeps_key_and_digests(desk, tmp_path):
    import hashlib

    seen = []
    target = tmp_path / "digits.sealed"
    kept = seal_model(desk, "digits", DIGITS, target, progress=lambda *done: seen.append(done))
    raw = target.read_bytes()
    assert hashlib.sha256(raw).digest() == kept.sealed.blob
    assert len(raw) == kept.sealed.size == seen[-1][0] == seen[-1][1]
    assert desk.model("digits") == kept
    assert kept.key.reveal() not in raw
    again = seal_model(desk, "digits", DIGITS, target)
    assert again.key != kept.key
    assert again.sealed.header != kept.sealed.header
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_sealing_what_is_no_model(desk, tmp_path, content):
    source = tmp_path / "m.onnx"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(UsageError):
        seal_model(desk, "digits", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert desk.models() == []


def test_sealing_to_a_place_that_is_none(desk, tmp_path):
    refused("owner.file", lambda: seal_model(desk, "digits", DIGITS, tmp_path / "no" / "out"))
    assert desk.models() == []


# -- policy files --------------------------------------------------------------

POLICY = ModelPolicy(
    release=policy(WORKER, STRANGER), key_service=policy(KEY_SERVICE), options=ServingOptions(slo_ms=50)
)
TEXT = POLICY.to_toml()


def test_policy_round_trip():
    assert ModelPolicy.from_toml(TEXT) == POLICY
    assert ModelPolicy.from_toml(TEXT.split("[options]")[0]).options == ServingOptions()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "policy.keys"),
        ("[[", "policy.format"),
        (TEXT.replace("[release]", "[worker]"), "policy.keys"),
        (TEXT + "\n[more]\n", "policy.keys"),
        ("release = 1\nkey_service = 2\n", "policy.format"),
        ("[release]\n[key_service]\n", "policy.empty"),
        (TEXT.replace("slo_ms = 50", "slo = 50"), "policy.options"),
        (TEXT.replace("slo_ms = 50", "slo_ms = -1"), "policy.options"),
        (TEXT.replace("slo_ms = 50", "slo_ms = 1.5"), "policy.options"),
        (TEXT.replace("slo_ms = 50", "slo_ms = nan"), "policy.options"),
        (TEXT.replace("slo_ms = 50", 'slo_ms = "50"'), "policy.options"),
        (TEXT.replace('batching = "none"', "batching = []"), "policy.options"),
        (TEXT.replace('batching = "none"', 'batching = "all"'), "policy.options"),
        (TEXT.replace('isolation = "shared"', 'isolation = "none"'), "policy.options"),
        (TEXT.replace('isolation = "shared"', "isolation = {}"), "policy.options"),
        (
            TEXT.replace('isolation = "shared"', 'isolation = "strict"').replace(
                'batching = "none"', 'batching = "same-user"'
            ),
            "policy.options",
        ),
        (TEXT.replace("max_age = ", "max_age = inf #"), "policy.max_age"),
        (TEXT.replace("max_age = ", "max_age = nan #"), "policy.max_age"),
        (TEXT.replace("min_isv_svn = 0", "min_isv_svn = true"), "policy.min_isv_svn"),
        (TEXT.replace('allowed_tcb = ["UpToDate"]', "allowed_tcb = []"), "policy.allowed_tcb"),
        (TEXT.replace('allowed_tcb = ["UpToDate"]', 'allowed_tcb = ["Revoked"]'), "policy.allowed_tcb"),
    ],
)
def test_a_file_that_is_no_policy(text, code):
    refused(code, lambda: ModelPolicy.from_toml(text))


@pytest.mark.parametrize(
    ("stated", "claim", "expected", "actual"),
    [
        ('slo_ms = "50"', "[options].slo_ms", "a whole number of milliseconds, 0 to 3600000", "'50'"),
        (
            'batching = "all"',
            "[options].batching",
            '"none" or "same-user" or "cross-user"',
            "'all'",
        ),
        (
            'batching = "same-user"\nisolation = "strict"',
            "[options].batching",
            '"none" with isolation "strict"',
            "'same-user'",
        ),
        ("slo = 50", "[options].slo", "slo_ms, batching, isolation", "'slo'"),
    ],
)
def test_an_option_that_is_invalid_is_named(stated, claim, expected, actual):
    text = TEXT[: TEXT.index("[options]")] + f"[options]\n{stated}\n"
    with pytest.raises(UsageError) as caught:
        ModelPolicy.from_toml(text)
    assert (caught.value.claim, caught.value.expected, caught.value.actual) == (claim, expected, actual)


@pytest.mark.parametrize(
    "options",
    [
        ServingOptions(batching="same-user"),
        ServingOptions(batching="cross-user", slo_ms=5),
        ServingOptions(isolation="strict"),
    ],
)
def test_options_that_are_served(options):
    text = dataclasses.replace(ModelPolicy.from_toml(TEXT), options=options).to_toml()
    assert ModelPolicy.from_toml(text).options == options


@given(st.text(max_size=60))
def test_any_text_is_no_policy(text):
    with pytest.raises(UsageError):
        ModelPolicy.from_toml(text)
