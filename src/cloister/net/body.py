"""A request's body while it arrives: in one buffer of its full length, which fills from the front."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable
from typing import Final

from cloister.errors import TransportError
from cloister.net.messages import Buffer

EAGER: Final = 1 << 20  # bytes up to which a body takes its memory at once, which saves page faults


class Body:
    """What a connection receives for its handler, which may look at the front before the end is there.

    One task waits at a time. `len` gives the declared length in bytes; `view` has that length at once, and
    only its first `received` bytes mean anything. A `lazy` one takes memory as it fills, others at once.
    A `watcher` is called whenever there is more, or will be no more.
    """

    __slots__ = ("_failure", "_left", "_waiter", "lazy", "length", "received", "view", "watcher")

    def __init__(self, length: int) -> None:
        self.length = length
        self.lazy = length > EAGER
        # A bytearray takes all of its memory at once; of a mapping, the system finds what is written to.
        self.view = memoryview(mmap.mmap(-1, length) if self.lazy else bytearray(length))
        self.received = 0
        self.watcher: Callable[[], None] | None = None
        self._failure: TransportError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._left: Callable[[], None] | None = None

    @classmethod
    def of(cls, content: Buffer) -> Body:
        """A body that is there as a whole; ``content`` is not copied."""
        body = cls(0)
        body.view = memoryview(content).cast("B")
        body.length = body.received = len(body.view)
        return body

    def __len__(self) -> int:
        return self.length

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return self.received == self.length

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for the answer any more, whether or not all of the request is there."""
        return self._failure is not None

    def when_abandoned(self, call: Callable[[], None]) -> None:
        """Have this called once when nobody waits for the answer any more; it replaces an earlier one."""
        self._left = call

    async def more(self, than: int) -> int:
        """Wait until more than ``than`` bytes are there, or all; gives how many.

        Raises:
            TransportError: the rest will not come.
        """
        while self.received <= than and not self.complete:
            self._require()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.received

    def since(self, given: int) -> memoryview:
        """What is there behind the first ``given`` bytes; raises TransportError where no more will come."""
        if self.received == given and not self.complete:
            self._require()
        return self.view[given : self.received]

    async def whole(self) -> memoryview:
        """Wait for all of it; raises TransportError."""
        await self.more(len(self.view))
        return self.view

    # --- what its connection calls ---

    def advance(self, count: int) -> None:
        """Count bytes that were received into `view`."""
        self.received += count
        self._wake()

    def fail(self) -> None:
        """Say that the rest will not come, and that nobody waits for the answer."""
        self._failure = TransportError("the peer did not send all of its request", code="transport.closed")
        self._wake()
        left, self._left = self._left, None
        if left is not None:
            left()

    def _require(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wake(self) -> None:
        if self.watcher is not None:
            self.watcher()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
