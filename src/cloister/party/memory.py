"""What a relying party remembers of a service between runs, so that it notices older state (DESIGN, 4.7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cloister.core.encoding import decode, encode, unpack
from cloister.core.protocol.conversation import Conversation
from cloister.core.protocol.head import TreeHead
from cloister.core.verifier.result import CollateralMark, CollateralMemory
from cloister.errors import FormatError, Rollback, UsageError
from cloister.party import files

MAX_MEMORY: Final = 1 << 20  # bytes
_WHAT: Final = "memory of a service"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The newest tree head and the newest collateral that were seen.

    Attributes:
        head: None before the first visit.
        collateral: Marks by name.
    """

    head: TreeHead | None = None
    collateral: Mapping[str, CollateralMark] = field(default_factory=dict)

    @classmethod
    def of(cls, conversation: Conversation) -> Memory:
        """What a conversation leaves to remember."""
        return cls(head=conversation.head, collateral=conversation.collateral.marks)

    def join(self, other: Memory) -> Memory:
        """The newer of both in every part: what one process saw, another must not forget.

        Raises:
            Rollback: both saw logs of the same length, and not the same.
        """
        heads = [head for head in (self.head, other.head) if head is not None]
        if len({head.root for head in heads}) > len({head.size for head in heads}):
            raise Rollback(
                "two runs saw different logs of one length: the service was forked",
                code="rollback.fork",
                claim=f"root of {heads[0].size} entries",
                expected=heads[0].root.hex(),
                actual=heads[1].root.hex(),
            )
        marks = dict(self.collateral)
        for name, mark in other.collateral.items():
            known = marks.get(name, mark)
            marks[name] = CollateralMark(
                issued=max(known.issued, mark.issued), number=max(known.number, mark.number)
            )
        return Memory(head=max(heads, key=lambda head: head.size, default=None), collateral=marks)

    def remind(self, conversation: Conversation) -> None:
        """Have a conversation know what was seen before, by itself and by others.

        Raises:
            BindingRefused, Tampered: the remembered head is not the trusted service's.
        """
        joined = self.join(Memory.of(conversation))
        if joined.head is not None:
            joined.head.verify(conversation.trust.service)
        conversation.head, conversation.collateral = joined.head, CollateralMemory(joined.collateral)

    def to_bytes(self) -> bytes:
        """The content of its file."""
        marks = {name: [mark.issued, mark.number] for name, mark in self.collateral.items()}
        return encode({"collateral": marks, "head": self.head.to_data() if self.head else None})

    @classmethod
    def from_bytes(cls, raw: bytes) -> Memory:
        """Read what `to_bytes` gave; raises FormatError."""
        data = unpack(
            decode(raw, what=_WHAT, limit=MAX_MEMORY), _WHAT, collateral=dict, head=(dict, type(None))
        )
        marks = {}
        for name, mark in data["collateral"].items():
            match mark:
                case [int(issued), int(number)] if type(name) is str:
                    marks[name] = CollateralMark(issued=issued, number=number)
                case _:
                    raise FormatError(f"the {_WHAT} is damaged", claim="collateral mark")
        head = data["head"]
        return cls(head=None if head is None else TreeHead.from_data(head), collateral=marks)

    @classmethod
    def load(cls, path: Path | None) -> Memory:
        """What the file holds; nothing where there is none.

        Raises:
            UsageError: code ``memory.file``; it can't be read, or is damaged.
        """
        if path is None or not path.exists():
            return cls()
        try:
            return cls.from_bytes(files.read_start(path, MAX_MEMORY + 1))
        except (OSError, FormatError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not one of Cloister's"
            raise _unusable("read", path, reason) from error

    def save(self, path: Path | None) -> None:
        """Keep it, together with what others kept there meanwhile.

        Raises:
            UsageError: code ``memory.file``; it can't be read or written.
        """
        if path is None:
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with files.locked(path.parent):
                files.replace(path, self.join(Memory.load(path)).to_bytes())
        except OSError as error:
            raise _unusable("written", path, error.strerror) from error


def _unusable(what: str, path: Path, reason: str | None) -> UsageError:
    return UsageError(
        f"the {_WHAT} can't be {what}",
        code="memory.file",
        claim="newest tree head and collateral",
        expected="a file that can be read and written",
        actual=f"{path}: {reason}",
        hint="Without it, a service that was put back to an older state would not be noticed",
    )
