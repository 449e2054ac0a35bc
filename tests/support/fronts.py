"""Handlers of the compact front for tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from cloister.net.body import Body
from cloister.net.connection import Handler
from cloister.net.messages import Answer, Head


def whole(handler: Callable[[Head, memoryview], Awaitable[Answer]]) -> Handler:
    """A handler that wants all of a body before it begins."""

    async def call(head: Head, body: Body) -> Answer:
        return await handler(head, await body.whole())

    return call
