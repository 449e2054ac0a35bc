"""Sealed models into enclave memory: opened as they arrive, and used by ONNX Runtime where they lie.

The plaintext of a model is in one place, a `Region`: anonymous memory of this process alone, that no path
leads to. There is no file, no descriptor and no mount, so a graph can't name anything but its own weights.
ONNX Runtime (1.31) borrows the weights there (``session.use_external_initializer_file_buffers_directly``)
and copies what it stores in another form.

1. The loop collects ciphertext into one of two buffers while a thread opens the other: back-pressure is one
   piece, and other requests go on. A second thread has the kernel populate memory ahead.
2. Nothing is looked at before the last chunk and the whole verified (`Unsealer.finish`).
3. The graph is checked, then the session is built, one at a time in a process.
4. The region lives as long as the native session, whoever holds it, and is wiped behind it.

While a session is built, the C library gives every freed tensor back to the system at once. By default glibc
raises its threshold with each large block that is freed, and the tensors that ONNX Runtime replaces would
stay in the process (ResNet50: 386 MB instead of 250).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import mmap
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnxruntime as ort

from cloister.core.model import WEIGHTS
from cloister.core.sealing.header import PREFIX_SIZE, SealedHeader, header_size
from cloister.core.sealing.unseal import Unsealer
from cloister.core.secret import Secret
from cloister.enclave.memory import overwrite_freed
from cloister.enclave.worker.graph import require_safe
from cloister.errors import FormatError, InvalidRequest, Overloaded, Tampered

PIECE: Final = 1 << 20  # bytes of ciphertext that a thread opens at once

# Bytes of weights from which matrices aren't kept a second time in the order that ONNX Runtime's kernels
# prefer ("prepacking"). Below, outputs are identical to the bit to those of ONNX Runtime's defaults.
PREPACK_LIMIT: Final = 256 << 20

_libc: Final = ctypes.CDLL(None)
_POPULATE_WRITE: Final = 23  # madvise(2)
_STEP: Final = 16 << 20  # bytes of memory to have ready before the next chunks are opened

_build_lock: Final = threading.Lock()  # the allocator's settings and its count are the process's
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE: Final = 64 << 10  # bytes; while building, a block from this size on is a mapping of its own
_USUAL: Final = 32 << 20  # bytes; what glibc's own threshold rises to


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
            self._memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            self.released = True
            raise Overloaded(
                "the enclave's memory is full", code="overloaded.memory", claim="enclave memory"
            ) from error
        with contextlib.suppress(OSError, AttributeError):
            self._memory.madvise(mmap.MADV_DONTDUMP)
        pages = np.frombuffer(self._memory, np.uint8)
        self._address = int(pages.__array_interface__["data"][0])

    def view(self) -> memoryview:
        """All of it, to write to."""
        return memoryview(self._memory)[: self.size]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A verified model: its graph and weights, which lie in ``region``."""

    region: Region
    graph: memoryview
    weights: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A session that borrows ``region``.

    Attributes:
        session: As long as its native part lives, so does the region.
        region: Released behind it.
        memory: Bytes that the model takes: its plaintext, and what ONNX Runtime allocated and kept while the
            session was made. What a run allocates isn't in it.
    """

    session: ort.InferenceSession
    region: Region
    memory: int


async def open_sealed(
    pieces: AsyncIterator[memoryview], *, key: Secret, digest: bytes, admit: Callable[[SealedHeader], None]
) -> Opened:
    """Open a sealed model as it arrives; where that fails or is cancelled, nothing of it is left.

    Args:
        pieces: The container. A piece may be overwritten when the next is asked for.
        key: The model key.
        digest: Of the header, as the owner's statement has it.
        admit: Refuses a header by raising; called before memory is taken.

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
        region = Region(header.size)
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


def build(opened: Opened, *, strict: bool = False) -> Built:
    """Check the graph and build the session; blocking. Where that fails, the plaintext is wiped.

    Args:
        opened: The model.
        strict: Whether runs shall leave nothing behind in ONNX Runtime's memory.

    Raises:
        FormatError, InvalidRequest: as `require_safe`, and where ONNX Runtime refuses it (``model.load``).
    """
    region = opened.region
    try:
        with _build_lock, _returning_memory():
            _start_runtime()
            before = _allocated()
            session = build_session(opened.graph, opened.weights, strict=strict)
            taken = max(0, _allocated() - before)
    except BaseException:
        region.release()
        raise
    # The wrapper may go before the native session does, which is what reads the region.
    keeper = weakref.finalize(getattr(session, "_sess", session), region.release)
    keeper.atexit = False  # threads may still be running it
    return Built(session=session, region=region, memory=region.size + taken)


def build_session(graph: memoryview, weights: memoryview, *, strict: bool = False) -> ort.InferenceSession:
    """Build a session that borrows ``weights``: the caller keeps them, unchanged, while the session lives.

    Raises:
        FormatError, InvalidRequest: as `build`.
    """
    require_safe(graph)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if strict:  # an arena would keep one request's intermediate results for the next; now a run frees them
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        overwrite_freed()
    # Else bytes that `require_safe` reads as a protocol buffer could be loaded as ONNX Runtime's own format.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
    if len(weights) >= PREPACK_LIMIT:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        if len(weights):
            options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
        return ort.InferenceSession(bytes(graph), options, providers=["CPUExecutionProvider"])
    except Exception:
        raise InvalidRequest(
            "ONNX Runtime does not load the model",
            code="model.load",
            claim="model",
            expected="a loadable graph",
        ) from None


# A graph of one Identity, opset 21: field numbers as in `graph`.
_IDENTITY: Final = (
    b'\x08\n:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02'
    b"\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x15"
)


@functools.cache
def _start_runtime() -> None:
    """Let ONNX Runtime allocate what a process has once, so that no model is charged for it."""
    build_session(memoryview(_IDENTITY), memoryview(b""))


class _MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``, malloc.h."""

    _fields_ = [(f"field{index}", ctypes.c_size_t) for index in range(10)]


_GLIBC: Final = hasattr(_libc, "mallinfo2") and hasattr(_libc, "malloc_trim")
if _GLIBC:
    _libc.mallinfo2.restype = _MallocInfo


def _allocated() -> int:
    """Bytes that the C library's allocator has given out; 0 where it can't say."""
    if not _GLIBC:
        return 0
    found = _libc.mallinfo2()
    return int(found.field7) + int(found.field4)  # uordblks, hblkhd


@contextlib.contextmanager
def _returning_memory() -> Iterator[None]:
    """Give freed blocks back to the system at once."""
    if not _GLIBC:
        yield
        return
    _libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        _libc.mallopt(_M_MMAP_THRESHOLD, _USUAL)
        _libc.mallopt(_M_TRIM_THRESHOLD, 2 * _USUAL)
        _libc.malloc_trim(ctypes.c_size_t(0))
