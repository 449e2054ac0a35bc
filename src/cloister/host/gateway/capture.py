"""What the operator saw: every byte that the gateway received and sent, appended to one file.

For demonstrations and auditors. Each frame is a text line, then the bytes as they were, so that ``grep``
works on the file and `read_capture` takes it apart again::

    # <number of the connection> <label> <received or sent> <bytes>
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.errors import FormatError, UsageError
from cloister.net.messages import Buffer

MAX_FRAME: Final = 1 << 30  # bytes
_LINE: Final = re.compile(rb"# ([0-9]{1,18}) ([a-z-]{1,32}) (received|sent) ([0-9]{1,10})\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Bytes that were received or sent at once."""

    connection: int
    label: str
    received: bool
    data: bytes


class Capture:
    """A `cloister.net.messages.Tap` that appends to a file (mode 0600). A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._labels: dict[int, str] = {}
        self._count = 0

    def open(self) -> Capture:
        """Start to append.

        Raises:
            UsageError: the file can't be written.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            self._descriptor = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise UsageError(f"can't write {self.path}", code="gateway.capture") from error
        return self

    def close(self) -> None:
        """Stop; what connections still do is not captured."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def opened(self, label: str) -> int:
        """See `Tap`."""
        self._count += 1
        self._labels[self._count] = label
        return self._count

    def received(self, connection: int, data: Buffer) -> None:
        """See `Tap`."""
        self._append(connection, b"received", data)

    def sent(self, connection: int, data: Buffer) -> None:
        """See `Tap`."""
        self._append(connection, b"sent", data)

    def _append(self, connection: int, direction: bytes, data: Buffer) -> None:
        if self._descriptor < 0:
            return
        label = self._labels[connection].encode()
        line = b"# %d %s %s %d\n" % (connection, label, direction, len(data))
        frame = memoryview(b"".join([line, data, b"\n"]))
        while frame:
            frame = frame[os.write(self._descriptor, frame) :]

    def __enter__(self) -> Capture:
        return self.open()

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_capture(path: Path) -> Iterator[Frame]:
    """Read a capture back, frame by frame.

    Raises:
        FormatError: it isn't one, or it was cut.
    """
    with path.open("rb") as file:
        while line := file.readline(128):
            match = _LINE.fullmatch(line)
            length = int(match[4]) if match else 0
            data = file.read(length) if match and length <= MAX_FRAME else b""
            if match is None or len(data) != length or file.read(1) != b"\n":
                raise FormatError("not a capture", code="gateway.capture")
            yield Frame(
                connection=int(match[1]), label=match[2].decode(), received=match[3] == b"received", data=data
            )
