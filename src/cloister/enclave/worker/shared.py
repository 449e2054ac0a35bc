"""Memory that a worker shares with an owner's child process: a model's plaintext, tensors of runs."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import threading
from collections.abc import Iterator
from typing import Final

from cloister.enclave.worker import tensors
from cloister.enclave.worker.loading import Region
from cloister.errors import Overloaded

_F_SEAL_FUTURE_WRITE: Final = 0x10


class SharedRegion(Region):
    """Memory for one model's plaintext that a child may map, to read alone.

    Attributes:
        descriptor: For the child, until `hand_over`.
    """

    __slots__ = ("descriptor",)

    def _map(self, size: int) -> mmap.mmap:
        self.descriptor = tensors.make_memory(size)
        try:
            memory = mmap.mmap(self.descriptor, size)
        except OSError:
            self.hand_over()
            raise
        with contextlib.suppress(OSError):  # before Linux 5.1 a child could change its own weights
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        return memory

    def hand_over(self) -> None:
        """Close the descriptor: nobody else needs it."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def release(self) -> None:
        """Wipe, and give the memory back; pages are free when the child lets go, too."""
        if not self.released:
            self.hand_over()
        super().release()


class Buffer:
    """Memory for the tensors of one run: inputs first, then outputs.

    Raises:
        Overloaded: the enclave has not that much memory.
    """

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.descriptor = -1
        try:
            self.descriptor = tensors.make_memory(size)  # until the child has it
            self.memory = mmap.mmap(self.descriptor, size)
        except OSError as error:
            self.hand_over()
            raise Overloaded(
                "the enclave's memory is full", code="overloaded.memory", claim="enclave memory"
            ) from error

    def hand_over(self) -> None:
        """Close the descriptor: the child has it."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def close(self) -> None:
        """Give the memory back, with what is in it."""
        self.hand_over()
        with contextlib.suppress(OSError):
            self.memory.madvise(mmap.MADV_REMOVE)
        with contextlib.suppress(BufferError):  # the last view unmaps it
            self.memory.close()


class Buffers:
    """A child's buffers, each used by one run at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Buffer] = []
        self._numbers = itertools.count()
        self._closed = False

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[Buffer]:
        """A buffer of that size at least; the caller wipes it. Raises Overloaded."""
        with self._lock:
            buffer = self._free.pop() if self._free else None
        if buffer is None or len(buffer.memory) < size:
            number = next(self._numbers) if buffer is None else buffer.number
            if buffer is not None:
                buffer.close()
            buffer = Buffer(number, 1 << (size - 1).bit_length())
        try:
            yield buffer
        except BaseException:
            buffer.close()
            raise
        with self._lock:
            if not self._closed:
                self._free.append(buffer)
                return
        buffer.close()

    def close(self) -> None:
        """Give all of them back; those in use when they are not any more."""
        with self._lock:
            self._closed = True
            free, self._free = self._free, []
        for buffer in free:
            buffer.close()
