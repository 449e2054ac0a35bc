"""The owner's desk: a folder with the signing key, the model keys, and what was last signed for each model.

Everything in it is secret (mode 0700, files 0600) and stays on the owner's machine.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.core.encoding import decode, encode, unpack
from cloister.core.identity import SigningKey
from cloister.core.protocol.head import TreeHead
from cloister.core.protocol.release import MODEL_KEY_SIZE
from cloister.core.protocol.statement import SealedModel, SignedStatement, Statement, model_id
from cloister.core.secret import Secret
from cloister.errors import FormatError, UsageError

_KEY_FILE: Final = "owner.key"
_LABEL: Final = "cloister-owner-key-v1"
_SUFFIX: Final = ".model"
MAX_STATE: Final = 8 << 20  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeskModel:
    """What the desk keeps of one model.

    Attributes:
        name: The model's name.
        key: Its key (32 bytes).
        sealed: The sealed file that was made last.
        statement: The statement that the service took last; None before the first.
        pool: The pool it was published to; None before the first.
    """

    name: str
    key: Secret
    sealed: SealedModel
    statement: SignedStatement | None = None
    pool: bytes | None = None

    def current(self) -> Statement | None:
        """The statement that the service took last."""
        return None if self.statement is None else self.statement.open()

    def to_bytes(self) -> bytes:
        """The content of the model's file."""
        return encode(
            {
                "key": self.key.reveal(),
                "name": self.name,
                "pool": self.pool,
                "sealed": self.sealed.to_data(),
                "statement": None if self.statement is None else self.statement.to_data(),
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> DeskModel:
        """Read what `to_bytes` gave; raises FormatError."""
        fields = unpack(
            decode(raw, what="desk file", limit=MAX_STATE),
            "desk file",
            key=MODEL_KEY_SIZE,
            name=str,
            pool=(bytes, type(None)),
            sealed=dict,
            statement=(dict, type(None)),
        )
        statement = fields["statement"]
        return cls(
            name=fields["name"],
            key=Secret(fields["key"]),
            sealed=SealedModel.from_data(fields["sealed"]),
            statement=None if statement is None else SignedStatement.from_data(statement),
            pool=fields["pool"],
        )


class Desk:
    """An opened desk."""

    def __init__(self, directory: Path, key: SigningKey) -> None:
        self.directory: Final = directory
        self.key: Final = key

    @classmethod
    def create(cls, directory: Path) -> Desk:
        """Make a desk with a new owner key; raises UsageError where one is there already."""
        key = SigningKey.generate()
        text = f"{_LABEL} {base64.b64encode(key.seed().reveal()).decode()}\n"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(directory / _KEY_FILE, text.encode(), exclusive=True)
        except OSError as error:
            raise UsageError(
                "the owner's desk can't be made",
                code="owner.desk",
                claim="owner's desk",
                expected="a folder without an owner key",
                actual=f"{directory}: {error.strerror}",
            ) from error
        return cls(directory, key)

    @classmethod
    def open(cls, directory: Path) -> Desk:
        """Open a desk; raises UsageError."""
        path = directory / _KEY_FILE
        try:
            words = path.read_text(encoding="ascii").split()
            seed = (
                base64.b64decode(words[1], validate=True) if len(words) == 2 and words[0] == _LABEL else b""
            )
        except OSError as error:
            raise UsageError(
                "the owner's key can't be read",
                code="owner.key",
                claim="owner's key",
                expected="a readable file",
                actual=f"{path}: {error.strerror}",
                hint="Make one with: cloister owner init",
            ) from error
        except ValueError:
            seed = b""
        if len(seed) != 32:
            raise UsageError(
                "the file is no owner key",
                code="owner.key",
                claim=str(path),
                expected=_LABEL,
                actual="another",
            )
        return cls(directory, SigningKey(Secret(seed)))

    @property
    def owner(self) -> bytes:
        """The owner's thumbprint."""
        return self.key.thumbprint

    def model_id(self, name: str) -> str:
        """``<owner>/<name>``; raises UsageError for a name that can't be one."""
        return model_id(self.owner, name)

    def model(self, name: str) -> DeskModel:
        """What the desk keeps of a model; raises UsageError where it keeps nothing."""
        self.model_id(name)
        path = self._path(name)
        try:
            return DeskModel.from_bytes(path.read_bytes())
        except OSError as error:
            raise UsageError(
                "the desk has no such model",
                code="owner.model",
                claim="model",
                expected="one that was sealed here",
                actual=name,
                hint=f"Seal it first: cloister owner seal {name} FILE.onnx",
            ) from error
        except FormatError as error:
            raise UsageError(
                f"the desk's file of {name} is damaged", code="owner.model", claim=str(path)
            ) from error

    def models(self) -> list[str]:
        """Names of the models on the desk."""
        return sorted(path.name.removesuffix(_SUFFIX) for path in self.directory.glob(f"*{_SUFFIX}"))

    def keep(self, model: DeskModel) -> None:
        """Write a model's file, whole or not at all."""
        self._write(self._path(model.name), model.to_bytes())

    def head(self, service: bytes) -> TreeHead | None:
        """The newest tree head seen of a service."""
        path = self._head_path(service)
        if not path.exists():
            return None
        try:
            return TreeHead.from_bytes(path.read_bytes())
        except (OSError, FormatError) as error:
            raise UsageError(
                "the desk's last tree head can't be read", code="owner.desk", claim=str(path)
            ) from error

    def keep_head(self, head: TreeHead) -> None:
        """Remember a tree head."""
        self._write(self._head_path(head.service), head.to_bytes())

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}{_SUFFIX}"

    def _head_path(self, service: bytes) -> Path:
        return self.directory / f"{service.hex()[:32]}.head"

    def _write(self, path: Path, content: bytes) -> None:
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            write_private(fresh, content)
            fresh.replace(path)
        except OSError as error:
            raise UsageError(
                "the owner's desk can't be written", code="owner.desk", claim=str(path), actual=error.strerror
            ) from error


def write_private(path: Path, content: bytes, *, exclusive: bool = False) -> None:
    """Write a file that only its owner may read, and make it durable."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if exclusive else os.O_TRUNC)
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
