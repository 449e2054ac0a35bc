"""Builds ONNX Runtime sessions that borrow their weights from enclave memory.

The graph is checked, then the session is built, one at a time in a process. ONNX Runtime (1.31) borrows the
weights where they lie (``session.use_external_initializer_file_buffers_directly``) and copies what it stores
in another form.

While a session is built, the C library gives every freed tensor back to the system at once. By default glibc
raises its threshold with each large block that is freed, and the tensors that ONNX Runtime replaces would
stay in the process (ResNet50: 386 MB instead of 250).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import onnxruntime as ort

from cloister.core.model import WEIGHTS
from cloister.enclave.memory import overwrite_freed
from cloister.enclave.worker.graph import require_safe
from cloister.errors import InvalidRequest

# Bytes of weights from which matrices aren't kept a second time in the order that ONNX Runtime's kernels
# prefer ("prepacking"). Below, outputs are identical to the bit to those of ONNX Runtime's defaults.
PREPACK_LIMIT: Final = 256 << 20

_libc: Final = ctypes.CDLL(None)
_build_lock: Final = threading.Lock()  # the allocator's settings and its count are the process's
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE: Final = 64 << 10  # bytes; while building, a block from this size on is a mapping of its own
_USUAL: Final = 32 << 20  # bytes; what glibc's own threshold rises to


class Memory(Protocol):
    """Where a model's plaintext lies: a `loading.Region`, or a child process's mapping of one."""

    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def released(self) -> bool: ...  # noqa: D102
    def release(self) -> None:
        """Give it back; a second time does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A verified model: its graph and weights, which lie in ``region``."""

    region: Memory
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

    session: Any  # ort.InferenceSession, or an isolation.RemoteModel
    region: Memory
    memory: int


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
            start_runtime()
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
        raise unloadable() from None


def unloadable() -> InvalidRequest:
    """What a load fails with where ONNX Runtime refuses the model."""
    return InvalidRequest(
        "ONNX Runtime does not load the model",
        code="model.load",
        claim="model",
        expected="a loadable graph",
    )


# A graph of one Identity, opset 21: field numbers as in `graph`.
_IDENTITY: Final = (
    b'\x08\n:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02'
    b"\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x15"
)


@functools.cache
def start_runtime() -> None:
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
