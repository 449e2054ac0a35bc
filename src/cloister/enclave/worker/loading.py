"""Sealed models into enclave memory: opened as they arrive, and used by ONNX Runtime where they lie.

The plaintext of a model is in one place, a `Region`: anonymous memory of this process alone, that no path
leads to. There is no file, no descriptor and no mount, so a graph can't name anything but its own weights,
which ONNX Runtime borrows there (`session`). In a shared pool it is memory that the owner's child process
maps too, to read (`memories`).

1. The loop collects ciphertext into one of two buffers while a thread opens the other: back-pressure is one
   piece, and other requests go on. A second thread has the kernel populate memory ahead.
2. Nothing is looked at before the last chunk and the whole verified (`Unsealer.finish`).
3. The session is built (`session`).
4. The region lives as long as the native session, whoever holds it, and is wiped behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Final

import numpy as np

from cloister.core.model import WEIGHTS
from cloister.core.sealing.header import PREFIX_SIZE, SealedHeader, header_size
from cloister.core.sealing.unseal import Unsealer
from cloister.core.secret import Secret
from cloister.enclave.worker.session import Opened
from cloister.errors import FormatError, Overloaded, Tampered

PIECE: Final = 1 << 20  # bytes of ciphertext that a thread opens at once

_libc: Final = ctypes.CDLL(None)
_POPULATE_WRITE: Final = 23  # madvise(2)
_STEP: Final = 16 << 20  # bytes of memory to have ready before the next chunks are opened


class Region:
    """Private anonymous memory for one model's plaintext.

    Attributes:
        size: In bytes.
        written: How many bytes from its start may hold plaintext; `release` wipes these.

    Raises:
        Overloaded: the enclave has not that much memory.
    """

    __slots__ = ("__weakref__", "_address", "_lock", "_memory", "released", "size", "written")

    def __init__(self, size: int) -> None:
        self.released = False
        self.size = size
        self.written = 0
        self._lock = threading.Lock()
        try:
            self._memory = self._map(max(size, 1))
        except OSError as error:
            self.released = True
            raise Overloaded(
                "the enclave's memory is full", code="overloaded.memory", claim="enclave memory"
            ) from error
        with contextlib.suppress(OSError, AttributeError):
            self._memory.madvise(mmap.MADV_DONTDUMP)
        pages = np.frombuffer(self._memory, np.uint8)
        self._address = int(pages.__array_interface__["data"][0])

    def _map(self, size: int) -> mmap.mmap:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def view(self) -> memoryview:
        """All of it, to write to."""
        return memoryview(self._memory)[: self.size]

    def place(self, part: memoryview) -> tuple[int, int]:
        """Where a view of a part of it begins and ends."""
        if not len(part):
            return 0, 0
        start = int(np.frombuffer(part, np.uint8).__array_interface__["data"][0]) - self._address
        return start, start + len(part)

    def populate(self, start: int, length: int) -> None:
        """Have the kernel give these pages now; ``start`` is a page's. Without effect before Linux 5.14."""
        length = min(length, self.size - start)
        _libc.madvise(ctypes.c_void_p(self._address + start), ctypes.c_size_t(length), _POPULATE_WRITE)

    def release(self) -> None:
        """Wipe, and give the memory back; a second time does nothing. Views that are left read zeros."""
        with self._lock:
            if self.released:
                return
            self.released = True
            if self.written:
                np.frombuffer(self._memory, np.uint8, self.written).fill(0)
            self._memory.madvise(mmap.MADV_DONTNEED)
            with contextlib.suppress(BufferError):  # the last view unmaps it
                self._memory.close()

    def __del__(self) -> None:
        self.release()


async def open_sealed(
    pieces: AsyncIterator[memoryview],
    *,
    key: Secret,
    digest: bytes,
    admit: Callable[[SealedHeader], None],
    take: Callable[[int], Region] | None = None,
) -> Opened:
    """Open a sealed model as it arrives; where that fails or is cancelled, nothing of it is left.

    Args:
        pieces: The container. A piece may be overwritten when the next is asked for.
        key: The model key.
        digest: Of the header, as the owner's statement has it.
        admit: Refuses a header by raising; called before memory is taken.
        take: Takes memory of so many bytes; a `Region` by default.

    Raises:
        FormatError: no header of a sealed model, or sections other than graph and weights.
        Tampered: not the model that its owner sealed.
        Overloaded: there is no memory for it.
    """
    with ThreadPoolExecutor(2, "open") as executor:
        raw, rest = await _read_header(pieces)
        header = SealedHeader.from_bytes(raw)
        header.require(digest)
        admit(header)
        region = (take or Region)(header.size)
        try:
            with Unsealer(key, header, digest=digest, into=region.view()) as unsealer:
                feeder = _Feeder(unsealer, region, executor)
                try:
                    await feeder.take(rest)
                    async for piece in pieces:
                        await feeder.take(piece)
                    sections = await feeder.finish()
                finally:
                    feeder.stop()
            return _require_sections(region, sections)
        except BaseException:
            await asyncio.shield(asyncio.wrap_future(executor.submit(region.release)))
            raise


async def _read_header(pieces: AsyncIterator[memoryview]) -> tuple[bytes, memoryview]:
    """The header, and what came with it of the rest."""
    start, length = bytearray(), PREFIX_SIZE
    async for piece in pieces:
        start += piece
        if len(start) >= PREFIX_SIZE:
            length = header_size(bytes(start[:PREFIX_SIZE]))
        if len(start) >= length > PREFIX_SIZE:
            return bytes(start[:length]), memoryview(start)[length:]
    raise Tampered("the sealed model ends in its header", code="sealing.truncated", claim="sealed model")


class _Feeder:
    """Feeds an `Unsealer` in a thread, one piece at a time, while the next is collected."""

    def __init__(self, unsealer: Unsealer, region: Region, executor: Executor) -> None:
        size = min(PIECE, unsealer.header.container_size)
        self._buffers = (bytearray(size), bytearray(size))
        self._unsealer = unsealer
        self._region = region
        self._executor = executor
        self._turn = 0  # which buffer is being filled
        self._fill = 0
        self._pending: Future[None] | None = None  # with the other
        self._ready = 0  # bytes of the region that were asked for in advance
        self._readying: Future[None] | None = None

    async def take(self, piece: memoryview) -> None:
        """Copy a piece; waits while two buffers full are not opened yet."""
        while len(piece):
            room = memoryview(self._buffers[self._turn])[self._fill :]
            count = min(len(room), len(piece))
            room[:count] = piece[:count]
            self._fill += count
            piece = piece[count:]
            if count == len(room):
                await self._send()

    async def finish(self) -> dict[str, memoryview]:
        """The sections, once all of it verified."""
        await self._send()
        await self._settle()
        return await asyncio.wrap_future(self._executor.submit(self._unsealer.finish))

    def stop(self) -> None:
        """Wait for the threads, at most the time of one piece; what they failed with isn't of interest."""
        for each in (self._pending, self._readying):
            if each is not None and not each.cancel():
                each.exception()

    async def _send(self) -> None:
        await self._settle()
        self._get_ready()
        self._pending = self._executor.submit(self._feed, memoryview(self._buffers[self._turn])[: self._fill])
        self._turn, self._fill = 1 - self._turn, 0

    async def _settle(self) -> None:
        if self._pending is not None:
            await asyncio.wrap_future(self._pending)  # where this is cancelled, `stop` waits
            self._pending = None

    def _get_ready(self) -> None:
        """Have memory populated ahead, beside the cipher: half of the time would go into page faults."""
        behind = self._ready < min(self._region.size, self._region.written + 2 * _STEP)
        if behind and (self._readying is None or self._readying.done()):
            self._readying = self._executor.submit(self._region.populate, self._ready, _STEP)
            self._ready += _STEP

    def _feed(self, piece: memoryview) -> None:
        # Plaintext is never longer than its ciphertext.
        self._region.written = min(self._region.size, self._region.written + len(piece))
        self._unsealer.feed(piece)


def _require_sections(region: Region, sections: dict[str, memoryview]) -> Opened:
    if sections.keys() != {"graph", WEIGHTS}:
        raise FormatError(
            "the sealed model has other sections",
            code="sealing.section",
            claim="sections",
            expected="graph, weights",
            actual=", ".join(sections),
        )
    return Opened(region=region, graph=sections["graph"], weights=sections[WEIGHTS])
