"""Questions to a child process and its answers, which are checked before they are believed.

Several threads ask at once over one socket of whole packets. One of those that wait reads for all.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from cloister.core.encoding import decode, encode
from cloister.core.oip import MAX_RANK, MAX_TENSORS
from cloister.enclave.worker.specs import TensorSpec
from cloister.errors import FormatError, Unavailable

MAX_PACKET: Final = 128 << 10  # bytes; a socket's buffer takes it whole
MAX_ITEMS: Final = 1 << 14  # in a packet
MAX_NAME: Final = 4096  # characters of a tensor's name
Answer = tuple[str, list[Any]]


class Line:
    """The worker's end of a child's socket.

    Args:
        link: Of packets; closed by `close`.
        patience: Seconds that an answer may take.
    """

    def __init__(self, link: socket.socket, *, patience: float) -> None:
        self._link = link
        self._link.settimeout(patience)
        self._patience = patience
        self._packet = bytearray(MAX_PACKET + 1)
        self._state = threading.Condition()  # over all that follows
        self._number = 0
        self._asked = {0}  # the child's first word answers nobody
        self._answers: dict[int, Answer] = {}
        self._reading = self._closed = self._greeted = False
        self._senders = 0

    def greet(self) -> None:
        """Wait until the child is ready."""
        with self._state:
            if not self._greeted:
                kind, _ = self._await(0)
                if kind != "ready":
                    raise child_lost("it could not give up what it must not have")
                self._greeted = True

    def ask(self, kind: str, fields: list[Any], descriptor: int = -1) -> Answer:
        """Ask, and wait for the answer; blocking.

        Args:
            kind: Of question.
            fields: Plain data.
            descriptor: Goes along where it isn't negative.

        Raises:
            Unavailable: the child is gone, silent, or answers out of form.
        """
        with self._state:
            self._number += 1
            number = self._number
            self._asked.add(number)
        packet = encode([number, kind, fields])
        if len(packet) > MAX_PACKET:
            raise FormatError(claim="packet", expected=f"at most {MAX_PACKET} B", actual=len(packet))
        with self._sending():
            socket.send_fds(self._link, [packet], [descriptor] if descriptor >= 0 else [])
        with self._state:
            return self._await(number)

    def tell(self, kind: str, fields: list[Any]) -> None:
        """Say what isn't answered; never waits. Raises Unavailable where the child doesn't listen."""
        packet = encode([0, kind, fields])
        with self._sending():
            os.write(self._link.fileno(), packet)  # `send` would wait

    def close(self) -> None:
        """Wake all who wait, and close the socket; a second time does nothing."""
        with self._state:
            if not self._closed:
                self._closed = True
                with contextlib.suppress(OSError):
                    self._link.shutdown(socket.SHUT_RDWR)
            while self._reading or self._senders:
                self._state.wait()
            self._link.close()
            self._state.notify_all()

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        """Keep the socket open meanwhile: its number may be another's as soon as it is closed."""
        with self._state:
            if self._closed:
                raise child_lost("it ended")
            self._senders += 1
        try:
            yield
        except OSError as error:
            raise child_lost("it doesn't listen") from error
        finally:
            with self._state:
                self._senders -= 1
                self._state.notify_all()

    def _await(self, number: int) -> Answer:
        """The answer under a number; the caller holds `_state` once."""
        until = time.monotonic() + self._patience
        while number not in self._answers:
            left = until - time.monotonic()
            if self._closed or left <= 0:
                raise child_lost("it ended" if self._closed else "it is silent")
            if self._reading:
                self._state.wait(left)
                continue
            self._reading = True
            self._state.release()
            try:
                came, answer = self._receive()
            finally:
                self._state.acquire()
                self._reading = False
                self._state.notify_all()
            if came not in self._asked:
                raise child_lied("number of an answer")
            self._asked.discard(came)
            self._answers[came] = answer
        return self._answers.pop(number)

    def _receive(self) -> tuple[int, Answer]:
        """One packet; descriptors that come along are not taken."""
        try:
            size = self._link.recv_into(self._packet)
        except TimeoutError:
            raise child_lost("it is silent") from None
        except OSError as error:
            raise child_lost("it ended") from error
        if not size:
            raise child_lost("it ended")
        try:
            return parse_packet(memoryview(self._packet)[:size])
        except FormatError as error:
            raise child_lied("packet") from error


def parse_packet(raw: bytes | memoryview) -> tuple[int, Answer]:
    """Number, kind and fields of an answer; raises FormatError."""
    packet = decode(raw, what="packet", limit=MAX_PACKET, items=MAX_ITEMS)
    if not isinstance(packet, list) or list(map(type, packet)) != [int, str, list]:
        raise FormatError(claim="packet", expected="number, kind, fields", actual="something else")
    return packet[0], (packet[1], packet[2])


def parse_loaded(fields: list[Any]) -> tuple[int, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Bytes that a model takes, its inputs and its outputs; raises FormatError."""
    if list(map(type, fields)) != [int, list, list] or not 0 <= fields[0] < 1 << 50:
        raise FormatError(claim="loaded", expected="bytes, inputs, outputs", actual="something else")
    return fields[0], _parse_specs(fields[1]), _parse_specs(fields[2])


def parse_ran(fields: list[Any], *, outputs: int) -> tuple[float, list[Any]]:
    """Processor seconds of a run, and as many tensors, not looked at; raises FormatError."""
    if list(map(type, fields)) != [float, list] or len(fields[1]) != outputs or not fields[0] >= 0:
        raise FormatError(claim="ran", expected=f"seconds, {outputs} tensors", actual="something else")
    return fields[0] if math.isfinite(fields[0]) else 0.0, fields[1]


def parse_large(fields: list[Any]) -> int:
    """Bytes that the outputs need; raises FormatError."""
    if list(map(type, fields)) != [int] or fields[0] <= 0:
        raise FormatError(claim="large", expected="bytes", actual="something else")
    return int(fields[0])


def _parse_specs(specs: list[Any]) -> tuple[TensorSpec, ...]:
    made = []
    for spec in specs:
        if not isinstance(spec, list) or list(map(type, spec)) != [str, str, list]:
            raise FormatError(claim="tensor spec", expected="name, datatype, shape", actual="something else")
        name, datatype, shape = spec
        fits = len(name) <= MAX_NAME and len(datatype) <= 64 and len(shape) <= MAX_RANK
        if not fits or not all(type(side) is int and -1 <= side < 1 << 40 for side in shape):
            raise FormatError(claim="tensor spec", expected="one within limits", actual="another")
        made.append(TensorSpec(name=name, datatype=datatype, shape=tuple(shape)))
    if len(made) > MAX_TENSORS or len({spec.name for spec in made}) != len(made):
        raise FormatError(claim="tensor specs", expected=f"at most {MAX_TENSORS}, unique", actual="others")
    return tuple(made)


def child_lost(why: str) -> Unavailable:
    """What a request fails with whose owner's child process is gone."""
    return Unavailable(
        "the process that runs this owner's models ended",
        code="unavailable.child",
        claim="child process",
        expected="an answer",
        actual=why,
    )


def child_lied(what: str) -> Unavailable:
    """What a request fails with whose owner's child process answers out of form."""
    return Unavailable(
        "the process that runs this owner's models answers with something else",
        code="unavailable.child-answer",
        claim=what,
        expected="an answer to the question",
        actual="something else",
    )
