"""Protocol steps without I/O: a generator yields what to send and is sent what came back.

So owners and users, blocking and asynchronous programs, and tests that play the host run the same steps.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from cloister.core.ohttp.encapsulation import SealedRequest
from cloister.errors import TransportError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One outer HTTP request.

    Attributes:
        method: For example ``b"POST"``.
        target: Origin form.
        fields: Header fields.
        content: The body; that of an encapsulated request is encrypted while it is sent.
        meanwhile: Work for the time between the request and its answer; whoever can't do it then leaves it.
    """

    method: bytes
    target: bytes
    fields: tuple[tuple[bytes, bytes], ...] = ()
    content: bytes | bytearray | SealedRequest = field(default=b"", repr=False)
    meanwhile: Callable[[], None] | None = None

    @property
    def body(self) -> bytes | bytearray:
        """The whole body."""
        return self.content.whole() if isinstance(self.content, SealedRequest) else self.content


@dataclass(frozen=True, slots=True)
class Pause:
    """A wait before the conversation goes on."""

    seconds: float


class Incoming(Protocol):
    """What a conversation looks at of an outer answer."""

    @property
    def status(self) -> int:
        """The status."""

    @property
    def body(self) -> bytes | bytearray | memoryview:
        """The whole body."""


Flow = Generator[Outgoing | Pause, Incoming, T]


def drive(flow: Flow[T], send: Callable[[Outgoing], Incoming], sleep: Callable[[float], None]) -> T:
    """Drive a flow with a blocking ``send``; where that raises TransportError, the flow decides."""
    value: Incoming | None = None
    failure: TransportError | None = None
    try:
        while True:
            try:
                outgoing = _next(flow, value, failure)
            except StopIteration as end:
                result: T = end.value
                return result
            value, failure = None, None
            if isinstance(outgoing, Pause):
                sleep(outgoing.seconds)
                continue
            try:
                value = send(outgoing)
            except TransportError as error:
                failure = error
    finally:
        flow.close()  # whatever interrupted it: what the flow holds is given back now


async def drive_async(
    flow: Flow[T], send: Callable[[Outgoing], Awaitable[Incoming]], sleep: Callable[[float], Awaitable[None]]
) -> T:
    """Drive a flow with an asynchronous ``send``."""
    value: Incoming | None = None
    failure: TransportError | None = None
    try:
        while True:
            try:
                outgoing = _next(flow, value, failure)
            except StopIteration as end:
                result: T = end.value
                return result
            value, failure = None, None
            if isinstance(outgoing, Pause):
                await sleep(outgoing.seconds)
                continue
            try:
                value = await send(outgoing)
            except TransportError as error:
                failure = error
    finally:
        flow.close()


def _next(flow: Flow[T], value: Incoming | None, failure: TransportError | None) -> Outgoing | Pause:
    if failure is not None:
        return flow.throw(failure)
    return next(flow) if value is None else flow.send(value)
