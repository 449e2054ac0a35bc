"""A child that lies: whatever it sends is refused, ends it, and reaches nobody but its own owner."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.core.encoding import decode, encode
from cloister.core.oip import DTYPES
from cloister.enclave.worker import isolation, tensors
from cloister.enclave.worker.isolation import Children
from cloister.enclave.worker.models import ModelCache
from cloister.enclave.worker.packets import (
    MAX_PACKET,
    Line,
    parse_large,
    parse_loaded,
    parse_packet,
    parse_ran,
)
from cloister.errors import FormatError, InvalidRequest, Unavailable
from enclave.conftest import Sealed, hosting

X = np.arange(8, dtype=np.float32).reshape(2, 4)
SPECS = [[["x", "FP32", [-1, 4]]], [["y", "FP32", [-1, 4]], ["copy", "FP32", [-1, 4]]]]
Reply = Callable[[int, list[Any]], bytes]


class FakeProcess:
    """A child that a test plays: answers as ``replies`` say, by the kind of question."""

    replies: ClassVar[dict[str, Reply | bytes]] = {}
    first: bytes = encode([0, "ready", []])

    def __init__(self, command: list[str], *, pass_fds: list[int], **_: Any) -> None:
        self.pid, self.killed = 0, False
        self._link = socket.socket(fileno=os.dup(pass_fds[0]))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._link as link:
            link.send(self.first)
            while not self.killed:
                try:
                    packet, descriptors, _, _ = socket.recv_fds(link, MAX_PACKET, 1)
                except OSError:
                    return
                for each in descriptors:
                    os.close(each)
                if not packet:
                    return
                number, kind, fields = decode(packet, what="packet")
                reply = self.replies.get(kind)
                if reply is not None:
                    try:
                        link.send(reply if isinstance(reply, bytes) else reply(number, fields))
                    except OSError:
                        return

    def poll(self) -> int | None:
        return -9 if self.killed else None

    def kill(self) -> None:
        self.killed = True

    def wait(self) -> int:
        self._thread.join(5)
        return -9


def loaded(number: int, _: list[Any]) -> bytes:
    return encode([number, "loaded", [1000, *SPECS]])


def ran(*places: Any, seconds: Any = 0.0) -> Reply:
    return lambda number, fields: encode([number, "ran", [seconds, list(places)]])


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Children]]:
    made: list[Children] = []

    def start(first: bytes = FakeProcess.first, **replies: Reply | bytes) -> Children:
        kind = type("Played", (FakeProcess,), {"replies": {"load": loaded, **replies}, "first": first})
        monkeypatch.setattr(isolation.subprocess, "Popen", kind)
        monkeypatch.setattr(isolation, "PATIENCE", 3.0)
        made.append(Children(threads=1))
        return made[0]

    yield start
    for each in made:
        each.close()


async def attempt(children: Children, model: Sealed) -> dict[str, Any]:
    cache = ModelCache(hosting(model), budget=1 << 30, children=children)  # type: ignore[arg-type]
    try:
        async with cache.use(model.live) as (made, _):
            return await asyncio.to_thread(made.run, {"x": X}, ("y",))
    finally:
        if cache._freeing:
            await asyncio.wait(set(cache._freeing))


def refused(children: Children, model: Sealed, *codes: str) -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        asyncio.run(attempt(children, model))
    assert caught.value.code in (codes or ("unavailable.child-answer",)), str(caught.value)
    assert time.monotonic() - began < 2.5 or "silent" in str(caught.value)


def test_the_fake_can_tell_the_truth(play: Any, scale: Sealed) -> None:
    def place(number: int, fields: list[Any]) -> bytes:
        return encode([number, "ran", [0.0, [["FP32", [2, 4], fields[5], 32]]]])

    outputs = asyncio.run(attempt(play(run=place), scale))
    assert outputs["y"].shape == (2, 4)


HOSTILE = {
    "nothing at all": b"\x00",
    "no CBOR": b"\xff" * 40,
    "too long": b"\x5a" + (1 << 20).to_bytes(4) + b"x" * (MAX_PACKET - 5),
    "many items": b"\x9a" + (1 << 16).to_bytes(4) + b"\x80" * (1 << 16),
    "deep": b"\x81" * 1000 + b"\x80",
    "no list": encode({"number": 1}),
    "two fields": encode([1, "ran"]),
    "four fields": encode([1, "ran", [], []]),
    "a text for a number": encode(["1", "ran", []]),
    "a truth for a number": encode([True, "ran", []]),
    "another number": encode([77, "ran", [0.0, []]]),
    "a number below zero": encode([-1, "ran", [0.0, []]]),
    "the first word again": encode([0, "ready", []]),
    "indefinite": b"\x9f\x01\x63ran\x80\xff",
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("when", ["run", "load"])
def test_packets_out_of_form(play: Any, scale: Sealed, what: str, when: str) -> None:
    children = play(**{when: HOSTILE[what]})
    refused(children, scale)
    assert not any(each.alive for each in children._children.values())


@pytest.mark.parametrize("what", HOSTILE)
def test_a_first_word_out_of_form(play: Any, scale: Sealed, what: str) -> None:
    first = HOSTILE[what]
    if what == "the first word again":
        first = encode([0, "failed", []])
    refused(play(first=first), scale, "unavailable.child-answer", "unavailable.child")


LOADED = {
    "no fields": [],
    "no bytes": ["1", *SPECS],
    "bytes below zero": [-1, *SPECS],
    "very many bytes": [1 << 60, *SPECS],
    "a float of bytes": [1.0, *SPECS],
    "no inputs": [1, None, SPECS[1]],
    "a spec that is none": [1, [["x"]], SPECS[1]],
    "a name that is none": [1, [[1, "FP32", []]], SPECS[1]],
    "a long name": [1, [["x" * 5000, "FP32", []]], SPECS[1]],
    "a long datatype": [1, [["x", "F" * 100, []]], SPECS[1]],
    "a shape of text": [1, [["x", "FP32", ["n"]]], SPECS[1]],
    "a side below -1": [1, [["x", "FP32", [-2]]], SPECS[1]],
    "a side that is True": [1, [["x", "FP32", [True]]], SPECS[1]],
    "a high rank": [1, [["x", "FP32", [1] * 40]], SPECS[1]],
    "a name twice": [1, [["x", "FP32", []]] * 2, SPECS[1]],
    "very many": [1, [[str(index), "FP32", []] for index in range(300)], SPECS[1]],
}


@pytest.mark.parametrize("what", LOADED)
def test_answers_to_a_load(play: Any, scale: Sealed, what: str) -> None:
    refused(play(load=lambda number, _: encode([number, "loaded", LOADED[what]])), scale)


def test_other_answers_to_a_load(play: Any, scale: Sealed) -> None:
    refused(play(load=lambda number, _: encode([number, "ran", [0.0, []]])), scale)


def at(datatype: Any, shape: Any, offset: int, length: Any) -> Reply:
    """An answer whose tensor begins so far behind the beginning of its part."""
    return lambda number, fields: encode(
        [number, "ran", [0.0, [[datatype, shape, fields[5] + offset, length]]]]
    )


RAN = {
    "no tensors": ran(),
    "two for one": ran(["FP32", [1], 512, 4], ["FP32", [1], 512, 4]),
    "a tensor that is none": ran("FP32"),
    "a tensor of three": ran(["FP32", [1], 512]),
    "no seconds": ran(["FP32", [1], 512, 4], seconds="0"),
    "seconds below zero": ran(["FP32", [1], 512, 4], seconds=-1.0),
    "no number of seconds": ran(["FP32", [1], 512, 4], seconds=float("nan")),
    "another datatype": at("FP64", [1], 0, 8),
    "no datatype": at(None, [1], 0, 4),
    "unknown datatype": at("FP33", [1], 0, 4),
    "the inputs": at("FP32", [1], -64, 4),
    "before the memory": at("FP32", [1], -100_000, 4),
    "behind the memory": at("FP32", [1], 1 << 30, 4),
    "across the end": at("FP32", [1 << 24], (16 << 20) - 4, 1 << 26),
    "a length below zero": at("FP32", [1], 0, -4),
    "a length of text": at("FP32", [1], 0, "4"),
    "a truth for a length": at("INT8", [1], 0, True),
    "too short for its shape": at("FP32", [2], 0, 4),
    "too long for its shape": at("FP32", [1], 0, 8),
    "sides whose product overflows": at("FP32", [1 << 39, 1 << 39, 0], 0, 0),
    "a side below zero": at("FP32", [-1], 0, 4),
    "a side of text": at("FP32", ["1"], 0, 4),
    "a high rank": at("FP32", [1] * 33, 0, 4),
    "no shape": at("FP32", 1, 0, 4),
    "nothing needs room": lambda number, _: encode([number, "large", [0]]),
    "room below zero": lambda number, _: encode([number, "large", [-5]]),
    "room of text": lambda number, _: encode([number, "large", ["5"]]),
    "another kind": lambda number, _: encode([number, "loaded", [1, *SPECS]]),
    "an unknown kind": lambda number, _: encode([number, "x" * 1000, []]),
}


@pytest.mark.parametrize("what", RAN)
def test_answers_to_a_run(play: Any, scale: Sealed, what: str) -> None:
    children = play(run=RAN[what])
    refused(children, scale)
    assert not any(each.alive for each in children._children.values())


@pytest.mark.parametrize("room", [1, 1000, 1 << 28, 1 << 40, (1 << 64) - 1])
def test_room_that_is_never_enough(play: Any, scale: Sealed, room: int) -> None:
    children = play(run=lambda number, _: encode([number, "large", [room]]))
    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(attempt(children, scale))
    assert caught.value.code == "request.execution"


def test_silence(play: Any, scale: Sealed) -> None:
    refused(play(), scale, "unavailable.child")


def test_descriptors_of_a_child_are_not_taken() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line = Line(ours, patience=3.0)
    before = len(os.listdir("/proc/self/fd"))
    with theirs:
        socket.send_fds(theirs, [encode([0, "ready", []])], [theirs.fileno()] * 8)
        line.greet()
        assert len(os.listdir("/proc/self/fd")) == before
    line.close()


def test_one_reads_for_all() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line, count, results = Line(ours, patience=10.0), 8, {}

    def ask(index: int) -> None:
        results[index] = line.ask("run", [index])

    threads = [threading.Thread(target=ask, args=[index]) for index in range(count)]
    with theirs:
        for thread in threads:
            thread.start()
        asked = [decode(theirs.recv(MAX_PACKET), what="packet") for _ in threads]
        for number, _, (index,) in reversed(asked):
            theirs.send(encode([number, "ran", [index]]))
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
    assert results == {index: ("ran", [index]) for index in range(count)}
    with pytest.raises(Unavailable):
        line.ask("run", [])
    line.close()
    line.close()


def test_closing_wakes_all_who_wait() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line, failed = Line(ours, patience=30.0), []

    def ask() -> None:
        with pytest.raises(Unavailable):
            line.ask("run", [])
        failed.append(True)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    with theirs:
        for thread in threads:
            thread.start()
        for _ in threads:
            theirs.recv(MAX_PACKET)
        line.close()
        for thread in threads:
            thread.join(5)
    assert len(failed) == 4


def test_a_child_that_never_listens_is_not_waited_for(play: Any) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line = Line(ours, patience=30.0)
    began = time.monotonic()
    with theirs, pytest.raises(Unavailable):
        for _ in range(100_000):
            line.tell("drop", [0])
    assert time.monotonic() - began < 10
    line.close()


# -- any bytes -----------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_packet_or_refused(raw: bytes) -> None:
    try:
        number, (kind, fields) = parse_packet(raw)
    except FormatError:
        return
    assert (type(number), type(kind), type(fields)) == (int, str, list)


@given(st.lists(PLAIN, max_size=4))
def test_any_fields_are_an_answer_or_refused(fields: list[Any]) -> None:
    for parse in (parse_loaded, lambda it: parse_ran(it, outputs=1), parse_large):
        try:
            parse(fields)
        except FormatError:
            continue


NUMBERS = st.integers(-10, 300) | st.integers(-(1 << 63), 1 << 63)


@given(
    kind=st.sampled_from(sorted(DTYPES)),
    said=st.sampled_from(sorted(DTYPES)) | PLAIN,
    shape=st.lists(NUMBERS, max_size=4) | PLAIN,
    offset=NUMBERS | PLAIN,
    length=NUMBERS | PLAIN,
    content=st.binary(min_size=256, max_size=256),
)
def test_any_place_is_a_tensor_or_refused(
    kind: str, said: Any, shape: Any, offset: Any, length: Any, content: bytes
) -> None:
    memory = mmap.mmap(-1, 256)
    memory[:] = content
    try:
        array = tensors.copy(memory, [said, shape, offset, length], kind=kind, start=64)
    except FormatError:
        return
    assert said == kind
    assert list(array.shape) == shape
    assert offset >= 64
    if kind == "BOOL":
        assert set(array.reshape(-1).view(np.uint8).tolist()) <= {0, 1}


@given(st.lists(st.sampled_from(sorted(set(DTYPES) - {"BYTES", "BF16"})), max_size=4), st.integers(0, 3))
def test_what_is_written_is_read(kinds: list[str], rows: int) -> None:
    arrays = [np.ones((rows, index + 1), DTYPES[kind]) for index, kind in enumerate(kinds)]
    parts = tensors.parts_of(arrays)
    memory = mmap.mmap(-1, max(1, tensors.size_of(parts)))
    places, end = tensors.write(memory, parts, 0)
    assert end <= len(memory)
    for array, kind, place in zip(arrays, kinds, places, strict=True):
        for read in (tensors.view(memory, place), tensors.copy(memory, place, kind=kind, start=0)):
            assert read.dtype == array.dtype
            assert np.array_equal(read, array)


def test_what_does_not_fit_is_not_written() -> None:
    parts = tensors.parts_of([np.ones(100)])
    with pytest.raises(ValueError):
        tensors.write(mmap.mmap(-1, 512), parts, 0)
