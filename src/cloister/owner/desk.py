"""The owner's desk: a folder with the signing key, the model keys, and what was last signed for each model.

Everything in it is secret (mode 0700, files 0600) and stays on the owner's machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.core.encoding import decode, encode, unpack
from cloister.core.identity import SigningKey
from cloister.core.protocol.conversation import Conversation
from cloister.core.protocol.release import MODEL_KEY_SIZE
from cloister.core.protocol.statement import SealedModel, SignedStatement, Statement, model_id
from cloister.core.secret import Secret
from cloister.errors import FormatError, UsageError
from cloister.party import files
from cloister.party.memory import Memory

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
        try:
            files.create_secret(directory / _KEY_FILE, _LABEL, key.seed())
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
            seed = files.read_secret(path, _LABEL, 32)
        except OSError as error:
            raise UsageError(
                "the owner's key can't be read",
                code="owner.key",
                claim="owner's key",
                expected="a readable file",
                actual=f"{path}: {error.strerror}",
                hint="Make one with: cloister owner init",
            ) from error
        if seed is None:
            raise UsageError(
                "the file is no owner key",
                code="owner.key",
                claim=str(path),
                expected=_LABEL,
                actual="another",
            )
        return cls(directory, SigningKey(seed))

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
            return DeskModel.from_bytes(files.read_start(path, MAX_STATE + 1))
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
        path = self._path(model.name)
        try:
            files.replace(path, model.to_bytes())
        except OSError as error:
            raise UsageError(
                "the owner's desk can't be written", code="owner.desk", claim=str(path), actual=error.strerror
            ) from error

    def memory(self, service: bytes) -> Memory:
        """What was seen of a service; raises UsageError."""
        return Memory.load(self._memory_path(service))

    def remember(self, conversation: Conversation) -> None:
        """Keep what a conversation saw of its service; raises UsageError."""
        Memory.of(conversation).save(self._memory_path(conversation.trust.service))

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}{_SUFFIX}"

    def _memory_path(self, service: bytes) -> Path:
        return self.directory / f"{service.hex()[:32]}.memory"
