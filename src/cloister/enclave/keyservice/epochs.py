"""Keys that live for an epoch, in enclave memory alone: pools' and the service's (DESIGN, 4.10)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cloister.core.ohttp.hpke import WIRE_SUITES
from cloister.core.ohttp.kem import PrivateKey, generate_private_key
from cloister.core.ohttp.keyconfig import KeyConfiguration
from cloister.core.protocol.release import PoolKey


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochKey:
    """A private key and the configuration that names it."""

    configuration: KeyConfiguration
    private_key: PrivateKey


KeySet = tuple[EpochKey, ...]


@dataclass(slots=True, kw_only=True)
class Epoch:
    """The keys of one epoch.

    Attributes:
        number: Counts up over the whole life of the service.
        not_after: When the keys die, Unix seconds.
        service: The key service's own keys, one for each suite.
        pools: Each pool's keys, made when they are first asked for.
    """

    number: int
    not_after: int
    service: KeySet
    pools: dict[bytes, KeySet] = field(default_factory=dict)

    @classmethod
    def begin(cls, number: int, not_after: int) -> Epoch:
        """A new epoch with fresh keys."""
        return cls(number=number, not_after=not_after, service=make_keys(number))

    def pool(self, pool_id: bytes) -> KeySet:
        """The pool's keys in this epoch."""
        keys = self.pools.get(pool_id)
        if keys is None:
            keys = self.pools[pool_id] = make_keys(self.number)
        return keys

    def pool_keys(self, pool_id: bytes) -> list[PoolKey]:
        """The same, as they are released to the pool's workers."""
        return [
            PoolKey(
                epoch=self.number,
                not_after=self.not_after,
                configuration=key.configuration.to_bytes(),
                private_key=key.private_key.to_secret(),
            )
            for key in self.pool(pool_id)
        ]


class Epochs:
    """The epochs whose keys are alive; the last is the current one.

    Args:
        seconds: Life of an epoch's keys.
        overlap: How long before their end the next epoch takes over, so that documents in flight stay good.
    """

    def __init__(self, *, seconds: int, overlap: int) -> None:
        self._seconds: Final = seconds
        self._overlap: Final = min(overlap, seconds // 2)
        self._live: list[Epoch] = []

    @property
    def current(self) -> Epoch:
        """The epoch that documents name."""
        return self._live[-1]

    def make(self, number: int, now: int) -> Epoch:
        """Make an epoch with fresh keys; it is not the current one before `begin`."""
        return Epoch.begin(number, now + self._seconds)

    def begin(self, epoch: Epoch) -> None:
        """Make an epoch the current one; the one before lives on to its own end."""
        self._live.append(epoch)

    def due(self, now: int) -> bool:
        """Whether the next epoch should begin."""
        return now >= self.current.not_after - self._overlap

    def live(self, now: int) -> list[Epoch]:
        """Epochs whose keys have not died; the dead are forgotten."""
        self._live = [epoch for epoch in self._live if epoch.not_after > now or epoch is self._live[-1]]
        return self._live


def make_keys(epoch: int) -> KeySet:
    """One key for each suite of the wire, the preferred first. Key ids repeat after 128 epochs."""
    keys = []
    for index, suite in enumerate(WIRE_SUITES):
        private_key = generate_private_key(suite.kem_id)
        configuration = KeyConfiguration.for_key((epoch * len(WIRE_SUITES) + index) % 256, private_key)
        keys.append(EpochKey(configuration=configuration, private_key=private_key))
    return tuple(keys)
