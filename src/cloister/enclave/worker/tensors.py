"""Tensors in memory that a worker shares with an owner's child process: written, read, wiped.

Both sides map a memory file that neither can resize. Whoever reads what the child wrote checks where it lies
and of what type it is, and copies it before looking at it.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from cloister.core.oip import DTYPES, MAX_RANK, Array, datatype
from cloister.errors import FormatError

ALIGNMENT: Final = 64  # bytes
KEPT: Final = 8 << 20  # bytes of a buffer that stay populated between two runs
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

Tensor = list[Any]  # datatype, shape, offset, length: as it travels
Part = tuple[str, tuple[int, ...], Array | bytes]


def make_memory(size: int) -> int:
    """The descriptor of a new memory file, whose size is final; raises OSError."""
    descriptor = os.memfd_create("cloister", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def parts_of(arrays: Iterable[Array]) -> list[Part]:
    """What is to be written: text as the protocol's binary form, which has to be made first.

    Raises:
        InvalidRequest: a type that the Open Inference Protocol doesn't have.
    """
    parts: list[Part] = []
    for array in arrays:
        kind = datatype(array)
        parts.append((kind, array.shape, _text_bytes(array) if kind == "BYTES" else array))
    return parts


def size_of(parts: Iterable[Part]) -> int:
    """Bytes that the parts take at most, one behind the other."""
    return sum(_length(content) + ALIGNMENT for _, _, content in parts)


def write(memory: mmap.mmap, parts: Iterable[Part], start: int) -> tuple[list[Tensor], int]:
    """Copy the parts into ``memory`` from ``start`` on; gives where they lie, and where the last one ends.

    Raises:
        ValueError: they don't fit.
    """
    tensors: list[Tensor] = []
    for kind, shape, content in parts:
        start = -(-start // ALIGNMENT) * ALIGNMENT
        length = _length(content)
        if start + length > len(memory):
            raise ValueError("the tensors don't fit")
        if isinstance(content, bytes):
            memory[start : start + length] = content
        elif length:
            target = np.frombuffer(memory, content.dtype, content.size, start)
            np.copyto(target.reshape(shape), content)
        tensors.append([kind, list(shape), start, length])
        start += length
    return tensors, start


def view(memory: mmap.mmap, tensor: Tensor) -> Array:
    """A tensor of a trusted writer, where it lies; text is copied."""
    kind, shape, offset, length = tensor
    if kind == "BYTES":
        return _texts(memory[offset : offset + length], tuple(shape))
    count = math.prod(shape)
    if not count:
        return np.empty(shape, DTYPES[kind])
    return np.frombuffer(memory, DTYPES[kind], count, offset).reshape(shape)


def copy(memory: mmap.mmap, tensor: Any, *, kind: str, start: int) -> Array:
    """A copy of a tensor that an untrusted writer says is there.

    Args:
        memory: Which the writer may change at any time.
        tensor: What it says.
        kind: The datatype that it must have.
        start: Where the writer's part of the memory begins.

    Raises:
        FormatError: it isn't of that type, or doesn't lie there.
    """
    if not isinstance(tensor, list) or len(tensor) != 4 or tensor[0] != kind or kind not in DTYPES:
        raise FormatError(claim="tensor", expected=f"one of {kind}", actual="another")
    _, shape, offset, length = tensor
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        raise FormatError(claim="shape of a tensor", expected=f"at most {MAX_RANK} sizes", actual="others")
    if not (_is_size(offset) and _is_size(length) and start <= offset <= len(memory) - length):
        raise FormatError(claim="place of a tensor", expected="in the writer's part", actual="outside")
    if kind == "BYTES":
        return _texts(memory[offset : offset + length], tuple(shape))
    count, dtype = math.prod(shape), DTYPES[kind]
    if count * dtype.itemsize != length or math.prod(max(side, 1) for side in shape) > 1 << 40:
        raise FormatError(claim="length of a tensor", expected=f"{count * dtype.itemsize} B", actual=length)
    copied: Array = np.frombuffer(memory, np.uint8, length, offset).copy()
    copied = copied != 0 if kind == "BOOL" else copied.view(dtype)  # a byte beyond 1 would be neither
    return copied.reshape(shape)


def wipe(memory: mmap.mmap, end: int) -> None:
    """Overwrite what lies before ``end``, and give pages back where that is much."""
    np.frombuffer(memory, np.uint8, end).fill(0)
    if end > KEPT:
        memory.madvise(mmap.MADV_REMOVE)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


def _length(content: Array | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.nbytes


def _text_bytes(array: Array) -> bytes:
    out = bytearray()
    for item in array.reshape(-1).tolist():
        raw = item.encode("utf-8", "replace") if isinstance(item, str) else bytes(item)
        out += len(raw).to_bytes(4, "little") + raw
    return bytes(out)


def _texts(raw: bytes, shape: tuple[int, ...]) -> Array:
    """Text elements; raises FormatError where they are others than the shape says."""
    count, offset = math.prod(shape), 0
    if count > len(raw) // 4:
        raise FormatError(claim="text elements", expected=f"{count}", actual="fewer")
    made = np.empty(count, dtype=object)
    for index in range(count):
        end = offset + 4 + int.from_bytes(raw[offset : offset + 4], "little")
        if end > len(raw):
            raise FormatError(claim="text elements", expected="whole ones", actual="a truncated one")
        try:
            made[index] = raw[offset + 4 : end].decode()
        except UnicodeDecodeError:
            raise FormatError(claim="text elements", expected="UTF-8", actual="other bytes") from None
        offset = end
    if offset != len(raw):
        raise FormatError(claim="text elements", expected=f"{count}", actual="more")
    return made.reshape(shape)
