"""A user's identity: one secret that never leaves the machine, and the user ids that follow from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from cloister.core.identity import SigningKey, derive_user_key
from cloister.core.secret import Secret
from cloister.errors import UsageError
from cloister.party import files

_LABEL: Final = "cloister-user-secret-v1"
_SIZE: Final = 32  # bytes


class Identity:
    """A user's secret. Its ``repr`` shows nothing of it."""

    __slots__ = ("_keys", "_secret")

    def __init__(self, secret: Secret) -> None:
        self._secret = secret
        self._keys: dict[bytes, SigningKey] = {}

    @classmethod
    def create(cls, path: Path) -> Identity:
        """Make an identity and write it to ``path`` (mode 0600); raises UsageError where the file exists."""
        secret = Secret(os.urandom(_SIZE))
        try:
            files.create_secret(path, _LABEL, secret)
        except OSError as error:
            raise UsageError(
                "the identity file can't be made",
                code="identity.file",
                claim="identity file",
                expected="a path where no file is yet",
                actual=f"{path}: {error.strerror}",
            ) from error
        return cls(secret)

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read an identity; raises UsageError."""
        try:
            secret = files.read_secret(path, _LABEL, _SIZE)
        except OSError as error:
            raise UsageError(
                "the identity file can't be read",
                code="identity.file",
                claim="identity file",
                expected="a readable file",
                actual=f"{path}: {error.strerror}",
                hint="Make one with: cloister user init",
            ) from error
        if secret is None:
            raise UsageError(
                "the file is no Cloister identity",
                code="identity.format",
                claim=str(path),
                expected=_LABEL,
                actual="another",
            )
        return cls(secret)

    def key_at(self, owner: bytes) -> SigningKey:
        """The signing key at one owner (its thumbprint, 32 bytes); derived once."""
        key = self._keys.get(owner)
        if key is None:
            key = self._keys[owner] = derive_user_key(self._secret, owner)
        return key

    def user_id(self, owner: bytes) -> bytes:
        """The user id at one owner (32 bytes): what that owner grants to. Ids at two owners don't link."""
        return self.key_at(owner).thumbprint

    def __repr__(self) -> str:
        return "<Identity>"
