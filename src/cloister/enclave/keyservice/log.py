"""The durable log: sealed records in the host's store, a Merkle tree and the state they amount to in memory.

The host orders nothing: records stand at consecutive indices, each sealed under its index and the root of the
log before it. So it can neither reorder, swap nor drop one in the middle, nor join parts of two lines that
began alike. It can cut the end off while the service is down; the head that somebody saw then proves it
(DESIGN, 4.8).
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Final

from cloister.core.encoding import decode, encode, unpack
from cloister.core.identity import SigningKey
from cloister.core.merkle import MerkleTree
from cloister.core.protocol.head import TreeHead
from cloister.core.sealing.records import open_record, seal_record
from cloister.core.secret import Secret
from cloister.enclave.clock import HintedClock
from cloister.enclave.keyservice.entries import Entry, Kind
from cloister.enclave.keyservice.state import State
from cloister.enclave.link import HostLink
from cloister.errors import CloisterError, Tampered, Unavailable

IDENTITY_TABLE: Final = "identity"
LOG_TABLE: Final = "log"
_IDENTITY_KEY: Final = b"service"
MAX_UNCERTAIN: Final = 16  # entries without an answer that are kept in memory
_NO_SERVICE: Final = bytes(32)  # the identity record is sealed before a service id is known


class Log:
    """Owner of the service's identity and of its log. One writer at a time, by its own lock."""

    def __init__(
        self, *, link: HostLink, identity: SigningKey, state_key: Secret, clock: HintedClock
    ) -> None:
        self.identity: Final = identity
        self.state: Final = State()
        self.tree: Final = MerkleTree()
        self.clock: Final = clock
        self._link = link
        self._state_key = state_key
        self._lock = asyncio.Lock()
        self._uncertain: list[tuple[bytes, Entry]] = []  # written for the next index, without an answer

    @classmethod
    async def open(cls, link: HostLink, sealing_key: Secret, clock: HintedClock) -> Log:
        """Restore the service from the store, or make a new identity where the store has none.

        Raises:
            Tampered: a record doesn't open, or one is missing in the middle.
        """
        record = await link.record(IDENTITY_TABLE, _IDENTITY_KEY)
        if record is None:
            identity, state_key = SigningKey.generate(), Secret(os.urandom(32))
            plaintext = encode({"seed": identity.seed().reveal(), "state_key": state_key.reveal()})
            sealed = seal_record(
                sealing_key,
                service=_NO_SERVICE,
                table=IDENTITY_TABLE,
                record_key=_IDENTITY_KEY,
                version=1,
                plaintext=plaintext,
            )
            await link.apply([(IDENTITY_TABLE, _IDENTITY_KEY, 0, sealed)])
            return cls(link=link, identity=identity, state_key=state_key, clock=clock)
        version, sealed = record
        plaintext = open_record(
            sealing_key,
            sealed=sealed,
            service=_NO_SERVICE,
            table=IDENTITY_TABLE,
            record_key=_IDENTITY_KEY,
            version=version,
        )
        fields = unpack(decode(plaintext, what="identity"), "identity", seed=32, state_key=32)
        log = cls(
            link=link,
            identity=SigningKey(Secret(fields["seed"])),
            state_key=Secret(fields["state_key"]),
            clock=clock,
        )
        await log._replay()
        return log

    @property
    def service(self) -> bytes:
        """The service id (32 bytes)."""
        return self.identity.thumbprint

    def head(self) -> TreeHead:
        """A freshly signed head over everything that is durable."""
        return TreeHead.sign(self.identity, size=len(self.tree), root=self.tree.root(), time=self.clock.now())

    def consistency(self, older: TreeHead | None) -> tuple[bytes, ...]:
        """Proof that the log extends an older head of this service (its signature already checked).

        A head that is newer, or that the log does not extend, gives no proof: see `contradicts`.
        """
        if older is None or not 0 < older.size <= len(self.tree):
            return ()
        return tuple(self.tree.consistency_proof(older.size))

    def contradicts(self, head: TreeHead) -> bool:
        """Whether the log does not extend a head that this service signed: the store was put back."""
        return head.size > len(self.tree) or self.tree.root(head.size) != head.root

    async def append(self, kind: Kind, body: dict[str, Any], secret: Secret | None = None) -> int:
        """Make an entry durable, then let it take effect; returns its index.

        Raises:
            Refused: it does not fit what is durable by now; nothing was written.
            Unavailable: the host did not say that it is durable; it has no effect unless it turns out to be.
        """
        async with self._lock:
            await self._settle()
            if len(self._uncertain) >= MAX_UNCERTAIN:
                raise Unavailable("the host's store takes no entries", code="store.write")
            entry = Entry(kind=kind, time=self.clock.now(), body=body, secret=secret)
            self.state.require(entry)  # settling may have changed what the caller's own checks saw
            index = len(self.tree)
            key = _key(index)
            sealed = self._seal(index, entry)
            self._uncertain.append((sealed, entry))
            try:
                await self._link.apply([(LOG_TABLE, key, 0, sealed)])
            except CloisterError as error:
                raise Unavailable("the host's store did not take the entry", code="store.write") from error
            self._commit(entry)
            return index

    async def settle(self) -> None:
        """Take in an entry whose write seemed to fail and did not; whoever checks first settles first.

        Raises:
            Tampered: the store holds another entry there.
            Unavailable: it can't be asked.
        """
        async with self._lock:
            await self._settle()

    async def _settle(self) -> None:
        """Learn whether an entry whose write failed is durable after all; it may have arrived late."""
        if not self._uncertain:
            return
        index = len(self.tree)
        record = await self._link.record(LOG_TABLE, _key(index))
        if record is None:
            return
        for sealed, entry in self._uncertain:
            if record[1] == sealed:
                self._commit(entry)
                return
        raise Tampered(
            "the store holds an entry that this service didn't write",
            code="tampered.log",
            claim=f"log entry {index}",
            expected="absent or ours",
            actual="another",
        )

    def _commit(self, entry: Entry) -> None:
        self.state.apply(entry, len(self.tree))
        self.tree.append(entry.leaf)
        self._uncertain.clear()

    async def _replay(self) -> None:
        index = 0
        async for key, version, sealed in self._link.scan(LOG_TABLE):
            if key != _key(index) or version != 1:
                raise Tampered(
                    "the store lacks entries of the log",
                    code="tampered.log",
                    claim="log entry",
                    expected=index,
                    actual=key.hex(),
                )
            entry = Entry.from_bytes(
                open_record(
                    self._state_key,
                    sealed=sealed,
                    service=self.service,
                    table=LOG_TABLE,
                    record_key=self._place(index),
                    version=1,
                )
            )
            self.state.apply(entry, index)
            self.tree.append(entry.leaf)
            index += 1
        self.clock.raise_floor(self.state.time)

    def _seal(self, index: int, entry: Entry) -> bytes:
        return seal_record(
            self._state_key,
            service=self.service,
            table=LOG_TABLE,
            record_key=self._place(index),
            version=1,
            plaintext=entry.to_bytes(),
        )

    def _place(self, index: int) -> bytes:
        """What a record is sealed under: its index, and everything that was logged before it."""
        return _key(index) + self.tree.root(index)


def _key(index: int) -> bytes:
    return index.to_bytes(8)
