"""A user's identity file, and ids that don't link."""

from __future__ import annotations

import base64
import os
import stat

import pytest

from cloister.client.identity import Identity
from cloister.core.secret import Secret
from cloister.errors import UsageError

LABEL = "cloister-user-secret-v1"


def refused(code, work):
    with pytest.raises(UsageError) as caught:
        work()
    assert caught.value.code == code
    return caught.value


def test_made_once_and_readable_by_its_user_only(tmp_path):
    path = tmp_path / "new" / "user.identity"
    made = Identity.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert Identity.load(path).user_id(b"o" * 32) == made.user_id(b"o" * 32)
    before = path.read_bytes()
    refused("identity.file", lambda: Identity.create(path))
    assert path.read_bytes() == before


def test_a_loose_umask_does_not_open_it(tmp_path):
    old = os.umask(0)
    try:
        Identity.create(tmp_path / "id")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "id").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "",
        LABEL,
        f"{LABEL} {base64.b64encode(bytes(31)).decode()}",
        f"{LABEL} {base64.b64encode(bytes(33)).decode()}",
        f"{LABEL} {base64.b64encode(bytes(32)).decode()} more",
        f"other {base64.b64encode(bytes(32)).decode()}",
        f"{LABEL} !!!!",
        f"{LABEL} {'A' * 45}",
    ],
)
def test_a_file_that_is_no_identity(tmp_path, text):
    path = tmp_path / "id"
    path.write_text(text)
    error = refused("identity.format", lambda: Identity.load(path))
    assert text[len(LABEL) + 1 :] == "" or text[len(LABEL) + 1 :] not in str(error)


def test_unreadable(tmp_path):
    refused("identity.file", lambda: Identity.load(tmp_path / "none"))
    refused("identity.file", lambda: Identity.load(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    refused("identity.format", lambda: Identity.load(tmp_path / "binary"))
    refused("identity.file", lambda: Identity.create(tmp_path / "binary" / "below"))


def test_ids_at_two_owners_do_not_link():
    one, two = Identity(Secret(b"a" * 32)), Identity(Secret(b"b" * 32))
    ids = {user.user_id(owner * 32) for user in (one, two) for owner in (b"o", b"p")}
    assert len(ids) == 4
    assert one.key_at(b"o" * 32) is one.key_at(b"o" * 32)
    assert one.key_at(b"o" * 32).thumbprint == one.user_id(b"o" * 32)


def test_nothing_of_it_is_shown():
    made = Identity(Secret(b"secretsecretsecretsecretsecretse"))
    made.key_at(b"o" * 32)
    assert repr(made) == str(made) == "<Identity>"
    assert not hasattr(made, "__dict__")
