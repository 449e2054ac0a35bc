"""What every connection from the owner's desk to a service has: a carrier, a clock, and what was verified."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

import httpx

from cloister.core.protocol.conversation import Conversation, Trust
from cloister.core.protocol.document import VerifiedDocument
from cloister.core.protocol.flow import Flow
from cloister.core.verifier.appraisal import AppraisalPolicy
from cloister.owner.desk import Desk
from cloister.party.carry import Carrier


class Connection:
    """A desk's connection to one service. Use it as a context manager.

    Args:
        desk: Keys and what was signed before.
        url: Of any gateway of the service.
        service: The service id that the owner pinned (32 bytes).
        key_service: What the key service must be.
        now: The owner's own clock, Unix seconds.
        transport: An httpx transport, for tests.
    """

    def __init__(
        self,
        desk: Desk,
        url: str,
        *,
        service: bytes,
        key_service: AppraisalPolicy,
        now: Callable[[], int] = lambda: int(time.time()),
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._desk = desk
        self._now = now
        self._carrier = Carrier(url, transport)
        self._conversation = Conversation(trust=Trust(service=service, key_service=key_service))
        desk.memory(service).remind(self._conversation)

    def close(self) -> None:
        """Close the connections."""
        self._carrier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refresh(self) -> Flow[VerifiedDocument]:
        """Verify the service, and that it extends what this desk has seen of it."""
        self._desk.memory(self._conversation.trust.service).remind(self._conversation)
        try:
            return (yield from self._conversation.refresh(self._now()))
        finally:
            self._desk.remember(self._conversation)
