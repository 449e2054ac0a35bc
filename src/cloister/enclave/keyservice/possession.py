"""Proof of possession for many clients with one signature: their nonces become leaves of a small tree."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from cloister.core.merkle import MerkleTree
from cloister.core.protocol.exchange import MAX_BATCH, HeadRequest, Possession
from cloister.enclave.keyservice.log import Log
from cloister.errors import Overloaded

WINDOW: Final = 0.002  # seconds that a batch waits for company


class PossessionDesk:
    """Collects nonces for a moment, signs once, hands each its path. Driven by the loop's timer.

    Args:
        log: Signs, and proves consistency with older heads.
        document: Gives the digest to sign for a request that holds another: that one, if it was served a
            moment ago, or the one that is served now.
    """

    def __init__(self, log: Log, document: Callable[[bytes | None], bytes]) -> None:
        self._log = log
        self._document = document
        self._waiting: list[tuple[HeadRequest, asyncio.Future[Possession]]] = []

    async def prove(self, request: HeadRequest) -> Possession:
        """The proof for one client; raises Overloaded where a batch is full."""
        if len(self._waiting) >= MAX_BATCH:
            raise Overloaded(
                claim="proofs in a batch", expected=f"at most {MAX_BATCH}", actual=len(self._waiting)
            )
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Possession] = loop.create_future()
        self._waiting.append((request, answer))
        if len(self._waiting) == 1:
            loop.call_later(WINDOW, self._sign)
        return await answer

    def _sign(self) -> None:
        batch, self._waiting = self._waiting, []
        try:
            groups: dict[bytes, list[tuple[HeadRequest, asyncio.Future[Possession]]]] = {}
            for each in batch:
                groups.setdefault(self._document(each[0].document), []).append(each)
            for document, group in groups.items():
                self._answer(document, group)
        except Exception as error:  # whoever waits must not wait for ever
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)

    def _answer(self, document: bytes, batch: list[tuple[HeadRequest, asyncio.Future[Possession]]]) -> None:
        tree = MerkleTree(request.nonce for request, _ in batch)
        signature = Possession.sign(self._log.identity, document, tree)
        head, root = self._log.head(), tree.root()
        for index, (request, answer) in enumerate(batch):
            if answer.done():  # the client went away
                continue
            answer.set_result(
                Possession(
                    document=document,
                    root=root,
                    size=len(tree),
                    index=index,
                    path=tuple(tree.inclusion_proof(index)),
                    signature=signature,
                    head=head,
                    consistency=self._log.consistency(request.head),
                )
            )
